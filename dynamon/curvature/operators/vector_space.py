"""Spaces of flat vectors: all entries on this process, or a part of them on each."""

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
    """Flat vectors ``[n]`` held by this process, with their inner product; solvers ask it instead of the vectors.

    Args:
        size: The dimension n.

    Attributes:
        size: The dimension n.
        length: Number of entries of a vector on this process.
    """

    def __init__(self, size: int, length: int | None = None) -> None:
        """Store the dimension."""
        self.size, self.length = size, size if length is None else length

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join one tensor per parameter, each the optimizer's local part, into a flat vector ``[length]``."""
        return torch.cat([as_real(piece).reshape(-1) for piece in pieces])

    def piece(self, vector: Tensor, place: int) -> Tensor:
        """Return the full slice of ``vector`` for the parameter at ``place``, gathering it if it is sharded."""
        return vector

    def total(self, sums: Tensor) -> Tensor:
        """Sum local sums over all processes, in place."""
        return sums

    def inner(self, vectors: Tensor, vector: Tensor) -> Tensor:
        """Compute inner products: ``[n]`` with ``[n]`` gives a scalar, ``[m, n]`` with ``[n]`` gives ``[m]``."""
        with full_precision():
            return self.total(vectors @ vector)

    def norm(self, vector: Tensor) -> Tensor:
        """Compute the Euclidean length, a 0-d tensor."""
        return l2_along(vector, None)

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Return a random generator for the local part of a vector."""
        return torch.Generator(device).manual_seed(seed)

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return the numbers by which a solver decides what to do next, the same on every process."""
        return numbers

    def like(self, space: "VectorSpace") -> "VectorSpace":
        """Return the space of a part of the parameters in which solvers decide as in this one."""
        return space


def wide_inner(one: Tensor, other: Tensor) -> Tensor:
    """Compute the inner product of the local entries of two vectors in the device's widest dtype, a chunk at a time.

    Memory: two copies of 2^24 entries, not of the vectors, which may take most of a device.
    """
    parts = zip(one.split(_AT_A_TIME), other.split(_AT_A_TIME), strict=True)
    return torch.stack([widened(a) @ widened(b) for a, b in parts]).sum()


class Shards:
    """The local parts of some parameters, and how to gather them.

    Args:
        params: The parameters as an optimizer holds them: ``DTensor``, or plain tensors that every process has whole.
        ranks: The processes.

    Attributes:
        size: Number of entries in all parameters.
        length: Number of those on this process.
    """

    def __init__(self, params: Sequence[Tensor], ranks: Ranks) -> None:
        """Count entries."""
        self._params, self._ranks = list(params), ranks
        self.size = sum(p.numel() for p in self._params)
        self.length = sum(to_local(p).numel() for p in self._params)

    def gather(self, parts: Sequence[Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        """Gather tensors in the shapes of the parameters on every process.

        Args:
            parts: One local part per parameter: of its gradient, its step, or its second moment.
            places: Positions of the parameters these belong to; all of them if None.

        Raises:
            OthersFailedError: Before anything is sent, where another process has failed.
        """
        owners = self._params if places is None else [self._params[place] for place in places]
        self._ranks.check()
        return [gather(part.reshape(to_local(owner).shape), owner) for owner, part in zip(owners, parts, strict=True)]


class GatheredSpace(VectorSpace):
    """Vectors held in full by every process, over parameters whose optimizer holds a part on each.

    Args:
        shards: The local parts.
    """

    def __init__(self, shards: Shards) -> None:
        """Store the shards."""
        super().__init__(shards.size)
        self._shards = shards

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Gather from all processes and join; one message per parameter."""
        return torch.cat([tensor.reshape(-1) for tensor in self._shards.gather(pieces)])


class CommonSpace(VectorSpace):
    """Vectors that every process holds in full, with one decision for all of them: that of the first process.

    On unlike machines inner products of the same vectors differ by rounding. A solver that has converged on one process
    and not on another would leave that one alone in its next collective.

    Args:
        space: The space of the vectors.
        ranks: The processes.

    Cost: one reduction and one check per agreement.
    """

    def __init__(self, space: VectorSpace, ranks: Ranks) -> None:
        """Store space and processes."""
        super().__init__(space.size, space.length)
        self._space, self._ranks = space, ranks

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join as the space of the vectors does."""
        return self._space.join(pieces)

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return the first process's numbers."""
        return self._ranks.sum(numbers.clone() if self._ranks.rank == 0 else torch.zeros_like(numbers))

    def like(self, space: VectorSpace) -> VectorSpace:
        """Return one with the same processes."""
        return CommonSpace(space, self._ranks)


class ShardedSpace(VectorSpace):
    """Vectors of which each process holds the entries of its shards only: n / R of them.

    Args:
        shards: The local parts.
        ranks: The processes.

    Cost: one reduction and one check per inner product, or for several inner products at once.
    """

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        """Store shards and processes."""
        super().__init__(shards.size, shards.length)
        self._shards, self._ranks = shards, ranks

    def piece(self, vector: Tensor, place: int) -> Tensor:
        """Gather the slice from all processes."""
        return self._shards.gather([vector], [place])[0]

    def total(self, sums: Tensor) -> Tensor:
        """Sum over the processes."""
        return self._ranks.sum(sums)

    def norm(self, vector: Tensor) -> Tensor:
        """Compute the Euclidean length of the whole vector."""
        return self.total(l2_norms([vector])[0].square()).sqrt().to(vector.dtype)

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Return a generator with another seed on each process."""
        return torch.Generator(device).manual_seed(seed * self._ranks.size + self._ranks.rank)


def space_of(operator: object) -> VectorSpace:
    """Return the space of an operator; plain matrices and foreign operators have all entries here."""
    space = getattr(operator, "space", None)
    return space if isinstance(space, VectorSpace) else VectorSpace(operator.shape[0])  # type: ignore[attr-defined]
