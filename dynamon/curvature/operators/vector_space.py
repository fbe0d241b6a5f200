"""Where the numbers of flat vectors lie: all here, or a part of them on each process."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.distributed.dtensor import gather, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels import l2_along, l2_norms, widened
from dynamon.layers.complex_pairs import as_real

_AT_A_TIME = 2**24  # numbers of a vector that are copied in a wider dtype


class VectorSpace:
    """Flat vectors ``[n]`` that are all here, and their inner product: what solvers ask instead of the vectors.

    Args:
        size: The dimension n.

    Attributes:
        size: The dimension n.
        length: How many of the n numbers of a vector are here.
    """

    def __init__(self, size: int, length: int | None = None) -> None:
        """Remember the dimension."""
        self.size, self.length = size, size if length is None else length

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """One flat vector ``[length]`` of a tensor a parameter, each the part of it that the optimizer has here."""
        return torch.cat([as_real(piece).reshape(-1) for piece in pieces])

    def piece(self, vector: Tensor, place: int) -> Tensor:
        """A whole parameter's worth of a vector: what belongs to the parameter in some place, already in its shape."""
        return vector

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the numbers that are here, to sums over all n; in place."""
        return sums

    def inner(self, vectors: Tensor, vector: Tensor) -> Tensor:
        """Inner products: ``[n]`` with ``[n]`` gives a number, ``[m, n]`` with ``[n]`` gives ``[m]``."""
        with full_precision():
            return self.total(vectors @ vector)

    def norm(self, vector: Tensor) -> Tensor:
        """Euclidean length, a 0-d tensor."""
        return l2_along(vector, None)

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Random numbers for the part of a vector that is here."""
        return torch.Generator(device).manual_seed(seed)


def wide_inner(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of the numbers here of two vectors, in the widest dtype of their device; some at a time.

    Memory: two copies of 2^24 numbers, not of the vectors, which may be most of what a device has.
    """
    parts = zip(one.split(_AT_A_TIME), other.split(_AT_A_TIME), strict=True)
    return torch.stack([widened(a) @ widened(b) for a, b in parts]).sum()


class Shards:
    """The parts of some parameters that lie on this process, and how they come together.

    Args:
        params: The parameters as an optimizer has them: ``DTensor``, or plain ones that every process has whole.
        ranks: The processes.

    Attributes:
        size: Numbers in all parameters.
        length: Those of them that are here.
    """

    def __init__(self, params: Sequence[Tensor], ranks: Ranks) -> None:
        """Count."""
        self._params, self._ranks = list(params), ranks
        self.size = sum(p.numel() for p in self._params)
        self.length = sum(to_local(p).numel() for p in self._params)

    def gather(self, parts: Sequence[Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        """Whole tensors in the shapes of the parameters, on every process.

        Args:
            parts: Of each parameter what this process has: of its gradient, its step, its second moment.
            places: Which of the parameters these belong to; all of them if None.

        Raises:
            OthersFailedError: Before anything is sent, where another process has failed.
        """
        owners = self._params if places is None else [self._params[place] for place in places]
        self._ranks.check()
        return [gather(part.reshape(to_local(owner).shape), owner) for owner, part in zip(owners, parts, strict=True)]


class GatheredSpace(VectorSpace):
    """Vectors that every process has whole, over parameters whose optimizer has a part of them on each.

    Args:
        shards: Where the parts are.
    """

    def __init__(self, shards: Shards) -> None:
        """Remember the parts."""
        super().__init__(shards.size)
        self._shards = shards

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Gathered from all processes: one message a parameter."""
        return torch.cat([tensor.reshape(-1) for tensor in self._shards.gather(pieces)])


class ShardedSpace(VectorSpace):
    """Vectors of which each process has the numbers of its shards and no others: n / R of them.

    Args:
        shards: Where the parts are.
        ranks: The processes.

    Cost: a reduction and a check for each inner product (or several at once).
    """

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        """Count."""
        super().__init__(shards.size, shards.length)
        self._shards, self._ranks = shards, ranks

    def piece(self, vector: Tensor, place: int) -> Tensor:
        """Gathered from all processes."""
        return self._shards.gather([vector], [place])[0]

    def total(self, sums: Tensor) -> Tensor:
        """Summed over the processes."""
        return self._ranks.sum(sums)

    def norm(self, vector: Tensor) -> Tensor:
        """Euclidean length of the whole vector."""
        return self.total(l2_norms([vector])[0].square()).sqrt().to(vector.dtype)

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Other numbers on each process."""
        return torch.Generator(device).manual_seed(seed * self._ranks.size + self._ranks.rank)


def space_of(operator: object) -> VectorSpace:
    """The space an operator works in; one in which all is here for matrices and operators of other people's."""
    space = getattr(operator, "space", None)
    return space if isinstance(space, VectorSpace) else VectorSpace(operator.shape[0])  # type: ignore[attr-defined]
