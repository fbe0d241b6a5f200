"""Helpers for DTensors: the local shard, the full tensor on every rank, and the full tensor on one rank."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynamon.distributed.ranks import Ranks

_AT_ONCE = 2**24  # entries of tensors that a process gathers in one round, or one larger tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing them: that takes half a second, and not every build has them."""
    return hasattr(tensor, "full_tensor")


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of some tensors is a DTensor."""
    return any(is_sharded(tensor) for tensor in tensors)


def holders(tensors: Sequence[Tensor], ranks: Ranks | None = None) -> Ranks:
    """Return the processes that hold shards of some tensors: this one alone where all are whole.

    Args:
        tensors: The tensors, at least one.
        ranks: The processes of the run; all where None.
    """
    device = to_local(tensors[0]).device
    if not any_sharded(tensors):
        return Ranks(device, alone=True)
    return Ranks(device) if ranks is None else ranks


@contextmanager
def holders_section(tensors: Sequence[Tensor], ranks: Ranks | None) -> Iterator[Ranks]:
    """Measure together on the :func:`holders` of some tensors.

    Args:
        tensors: The tensors, at least one.
        ranks: The processes of the run, who are in a section already; None for a section of the holders' own.
    """
    found = holders(tensors, ranks)
    with found.collective_section() if ranks is None else nullcontext():
        yield found


def to_local(tensor: Tensor) -> Tensor:
    """Return the shard on this process, in the same memory and without graph; a plain tensor is its own shard."""
    detached: Any = tensor.detach() if tensor.requires_grad else tensor
    return detached.to_local() if is_sharded(tensor) else detached


def to_local_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the shard of ``tensor`` that this process would hold if it were laid out as ``like``.

    Args:
        tensor: A gradient, or another tensor of the shape of ``like``, laid out in any way.
        like: A parameter.

    Cost: none where the layouts agree, as they do under FSDP2.
    """
    if not is_sharded(like):
        return tensor
    placements: Any = like.placements  # type: ignore[attr-defined]
    if getattr(tensor, "placements", None) != placements:
        tensor = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    return to_local(tensor)


def gather(part: Tensor, like: Tensor) -> Tensor:
    """Gather the whole tensor on every process.

    Args:
        part: The shard on this process, as :func:`to_local` returns it.
        like: The tensor that it is laid out as; for a plain tensor the part is the whole.

    Cost: one all-gather; every process must call it.
    """
    return _layout(part, like, like.placements).full_tensor() if is_sharded(like) else part  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut this process's shard out of a tensor that every process holds whole; the inverse of :func:`gather`.

    Args:
        tensor: The whole tensor, the same on every process.
        like: The tensor whose layout counts.

    Cost: no communication.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim  # type: ignore[attr-defined]
    placements = like.placements  # type: ignore[attr-defined]
    return to_local(_layout(tensor, like, everywhere).redistribute(placements=placements))


def has_whole_rows(like: Tensor) -> bool:
    """Whether every process holds whole slices along the first dimension, or none of a slice."""
    placements: Any = getattr(like, "placements", ())
    return all(place.is_replicate() or type(place).__name__ == "Shard" and place.dim == 0 for place in placements)


def reshard(module: nn.Module) -> None:
    """Free the whole weights that the root of an FSDP2 module keeps after an evaluation; it holds shards again."""
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "set_reshard_after_backward")]
    for part in parts:
        part.reshard()


class Gathering:
    """Gathers whole tensors, each on one process.

    A tensor that is cut along its first dimension over exactly the processes given is sent to its owner alone. One laid
    out in another way (on a mesh of two dimensions, or cut along another dimension) is gathered on every process and
    dropped on all but one; a plain tensor is there already.

    Args:
        likes: What each of the tensors is laid out as.
        owners: The rank of the process that each is for.
        ranks: The processes.

    Every process constructs it with the same arguments, then calls :meth:`run`. The memory is allocated at
    construction, so that a process that has none can report it before the others wait for it.
    """

    def __init__(self, likes: Sequence[Tensor], owners: Sequence[int], dtypes: Sequence[torch.dtype], ranks: Ranks):
        """Allocate the memory."""
        self._likes, self._owners, self._ranks = likes, owners, ranks
        self._padded: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}
        for i, (like, owner, dtype) in enumerate(zip(likes, owners, dtypes, strict=True)):
            if _is_cut_over(like, ranks):
                rows, rest = _longest_part(like, ranks.size), like.shape[1:]
                device = to_local(like).device
                self._padded[i] = torch.zeros(rows, *rest, dtype=dtype, device=device)
                if owner == ranks.rank:
                    self._received[i] = torch.empty(ranks.size * rows, *rest, dtype=dtype, device=device)

    def run(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the whole tensors that are for this process, None in place of the others.

        Args:
            parts: The shard of each on this process, of the dtype given.
        """
        found: list[Tensor | None] = []
        for i, (part, like, owner) in enumerate(zip(parts, self._likes, self._owners, strict=True)):
            mine = owner == self._ranks.rank
            if i in self._padded:
                self._padded[i][: len(part)].copy_(part)
                received = self._received.get(i)
                pieces = None if received is None else list(received.chunk(self._ranks.size))
                dist.gather(self._padded.pop(i), pieces, group=self._ranks.group, group_dst=owner)
                # Only the last part that is not empty can be short, so what was added lies behind all that counts.
                found.append(None if received is None else self._received.pop(i)[: like.shape[0]])
            else:
                complete = gather(part, like)
                found.append(complete if mine else None)
        return found


def gather_rounds(owned: Sequence[Sequence[int]], sizes: Sequence[int]) -> Iterator[list[list[int]]]:
    """Split the tensors that each process gathers into rounds of limited size.

    Args:
        owned: The positions of the tensors that each process takes, in order.
        sizes: The size of each tensor.

    Yields:
        A list of positions for each process: at most ``2**24`` entries, or a single tensor that is larger.
    """
    rounds = [list(_portions(items, sizes)) for items in owned]
    for index in range(max(map(len, rounds), default=0)):
        yield [own[index] if index < len(own) else [] for own in rounds]


def _portions(items: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    portion: list[int] = []
    for item in items:
        if portion and sum(sizes[i] for i in portion) + sizes[item] > _AT_ONCE:
            yield portion
            portion = []
        portion.append(item)
    if portion:
        yield portion


def gather_for_checkpoint(
    parts: Mapping[str, Tensor], likes: Mapping[str, Tensor], everywhere: bool = True
) -> dict[str, Tensor]:
    """Copy tensors for a checkpoint: sharded ones are gathered in main memory, the device holds one at a time.

    Args:
        parts: What this process holds, by name; where one is sharded, every process must call this with the same names.
        likes: What they are laid out as.
        everywhere: False leaves out what is sharded on all processes but the first, which writes checkpoints.

    Cost: a gather of each sharded tensor.
    """
    found = {}
    for name, part in parts.items():
        like = likes[name]
        if not is_sharded(like):
            found[name] = part.clone()
        elif everywhere:
            found[name] = gather(part, like).cpu()
        else:
            gathering = Gathering([like], [0], [part.dtype], Ranks(part.device))
            (complete,) = gathering.run([part])
            if complete is not None:
                found[name] = complete.cpu()
    return found


def _is_cut_over(like: Any, ranks: Ranks) -> bool:
    """Whether a tensor is cut along its first dimension, in equal parts as far as that goes, over just these."""
    if (
        not ranks.is_distributed
        or not is_sharded(like)
        or like.device_mesh.ndim != 1
        or like.device_mesh.size() != ranks.size
    ):
        return False
    if like.device_mesh.mesh.flatten().tolist() != list(range(ranks.size)):
        return False
    (place,) = like.placements
    return type(place).__name__ == "Shard" and place.dim == 0


def _longest_part(like: Tensor, processes: int) -> int:
    return math.ceil(like.shape[0] / processes)


def _layout(part: Tensor, like: Any, placements: Any) -> Any:
    return type(like).from_local(
        part, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
