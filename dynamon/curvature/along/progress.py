"""Slopes of a loss along the last step, before and after it, by layer; and how groups of layers interact."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.curvature.distributed.sharded import ShardedGradients, ShardedParameters
from dynamon.curvature.operators.backends import Gradients
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.evaluations import Evaluations
from dynamon.kernels import widest_dtype
from dynamon.layers.complex_pairs import as_real, real_numel
from dynamon.quantities.progress import Couplings, StepReading


class LastStep:
    r"""The last step of an optimizer, from the weights that were kept before it to those of now.

    Where the loss has random numbers or buffers, create it inside of
    :func:`dynamon.isolation.preserve.preserve_state`: all evaluations then start alike.

    Under DDP each process gives its own loss, and inner products are averaged over the processes, not gradients. With
    :class:`dynamon.curvature.ShardedParameters` they are summed over the shards.

    Args:
        loss_fn: The loss on the probe, called without arguments.
        params: L parameters, a mapping from their names, at the weights after the step.
        before: Their weights before it, one local tensor each.
        left: The fraction of each weight that decoupled weight decay has left in this step, 1 where there is none;
            None where there is none at all.
        ranks: The processes; None for this one alone.

    Raises:
        ValueError: On parameters of several dtypes or devices; in a reading, on a loss that depends on none of them.

    Memory: beside ``before`` two copies of the weights, in float32 at least, and that of a gradient of the loss.

    Example:
        >>> import torch
        >>> from dynamon.curvature.along.progress import LastStep
        >>> w = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> before = w.detach().clone()
        >>> _ = w.data.sub_(torch.tensor([1.0, 2.0]))  # the step
        >>> reading = LastStep(lambda: (w * w).sum() / 2, {"w": w}, [before]).read()
        >>> reading.before, reading.after, reading.decrease, reading.loss_before - reading.loss_after
        (array([-4.]), array([1.]), array([1.5]), 1.5)
    """

    def __init__(
        self,
        loss_fn: Callable[[], Tensor],
        params: Mapping[str, Tensor] | FlatParameters,
        before: Sequence[Tensor],
        left: Sequence[float] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Take the step apart, and evaluate nothing yet."""
        self._params, self._ranks = FlatParameters.of(params), ranks
        self._before = list(before)
        self._left = [1.0] * len(self._before) if left is None else list(left)
        is_sharded = isinstance(self._params, ShardedParameters)
        self._gradients = (ShardedGradients if is_sharded else Gradients)(loss_fn, self._params, Evaluations())
        size = 1 if ranks is None else ranks.size
        self._shares = (1.0 if is_sharded else 1 / size), 1 / size  # of an inner product here in that of all, of a loss
        self._names = tuple(self._params.names or map(str, range(len(self._before))))
        with torch.no_grad():
            flat = self._params.flatten(self._params.tensors) - self._params.flatten(self._before)
            if any(one != 1 for one in self._left):
                lost = torch._foreach_mul([w.to(flat.dtype) for w in self._weights()], [1 - one for one in self._left])
                torch._foreach_add_(self._parts(flat), lost)
        self._step = flat  # without decay

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Split a flat vector by parameter: views, where a complex entry is two numbers."""
        return list(flat.split([real_numel(p) for p in self._before]))

    def _weights(self) -> Iterator[Tensor]:
        """The weights before the step in that form."""
        return (as_real(weight).reshape(-1) for weight in self._before)

    def read(self, samples: float = float("nan")) -> StepReading:
        """Take one gradient on either side of the step.

        Args:
            samples: Samples in the probe of this process.

        Cost: two gradients of the loss, some 30 device calls whatever the number of layers, one reduction of 4 L + 3
        numbers, and one copy to the host.
        """
        after = self._slopes()
        before = self._slopes_at(self._before)
        rows, count = self._reduced([before, after], samples)
        (b, decay_b), (a, decay_a) = (np.split(row[:-1], 2) for row in rows)
        return StepReading(self._names, b, a, decay_b, decay_a, float(rows[0, -1]), float(rows[1, -1]), count)

    def couplings(self, groups: Mapping[str, Sequence[str]]) -> Couplings:
        """Take one gradient before the step, and one after the step of each group alone.

        Args:
            groups: The layers of each of G groups by name; those in no group stay where they were.

        Raises:
            ValueError: If a layer has no such step, or is in two groups.

        Cost: G + 1 gradients of the loss, one reduction and one copy to the host.
        """
        member = self._members(groups)
        keys = np.array([member.get(name, -1) for name in self._names])
        with torch.no_grad():
            ahead = [
                (weight + piece).to(weight.dtype)
                for weight, piece in zip(self._before, self._params.split(self._step), strict=True)
            ]
        slopes = [self._slopes_at(self._before)]
        for group in range(len(groups)):
            pairs = zip(keys, self._before, ahead, strict=True)
            slopes.append(self._slopes_at([moved if key == group else weight for key, weight, moved in pairs]))
        rows, _ = self._reduced(slopes, 0.0)
        sums = np.stack([rows[:, : len(keys)][:, keys == group].sum(1) for group in range(len(groups))], 1)
        return Couplings(tuple(groups), sums[1:] - sums[:1], sums[0], float(rows[0, -1]))

    def _members(self, groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Return the group of each layer by its number."""
        found: dict[str, int] = {}
        for index, (group, names) in enumerate(groups.items()):
            for name in names:
                if name not in self._names:
                    raise ValueError(f"group {group!r} has the layer {name!r}, of which no step was kept.")
                if name in found:
                    raise ValueError(f"the layer {name!r} is in two groups.")
                found[name] = index
        return found

    def _slopes_at(self, weights: Sequence[Tensor]) -> Tensor:
        with self._params.placed(weights):
            return self._slopes()

    def _slopes(self) -> Tensor:
        """Return the slopes along step and decay, ``[2 L + 1]`` with the loss at last: this process's share."""
        loss, gradient = self._gradients.evaluate()
        with torch.no_grad():
            along = _sums(self._parts(gradient * self._step))
            decay = torch.zeros_like(along)
            if any(left != 1 for left in self._left):
                lost = along.new_tensor(self._left) - 1
                decay = _sums(list(torch._foreach_mul(self._parts(gradient), list(self._weights())))) * lost
            of_products, of_loss = self._shares
            own = loss.to(along.dtype).reshape(1) * of_loss
            return torch.cat([along * of_products, decay * of_products, own])

    def _reduced(self, rows: Sequence[Tensor], count: float) -> tuple[NDArray[Any], float]:
        """Sum rows and a count over the processes, and bring them to the host."""
        packed = torch.cat([*rows, rows[0].new_tensor([count])])
        if self._ranks is not None and self._ranks.is_distributed:
            packed = self._ranks.sum(packed)
        host = packed.cpu().double().numpy()
        return host[:-1].reshape(len(rows), -1), float(host[-1])


def _sums(pieces: list[Tensor]) -> Tensor:
    """Sum the entries of each of L tensors in the widest dtype, ``[L]``: in few device calls, by their two signs."""
    wide = widest_dtype(pieces[0].device)
    up = torch.stack(torch._foreach_norm(torch._foreach_clamp_min(pieces, 0), 1, dtype=wide))
    return up - torch.stack(torch._foreach_norm(torch._foreach_clamp_max(pieces, 0), 1, dtype=wide))
