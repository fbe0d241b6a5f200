"""Measure what the sentinel looks at: norms of gradients and of what an optimizer keeps, in few device calls."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import any_sharded, to_local
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.optim.stepping import wrapped_optimizers
from dynamon.quantities.scales import Scale

MOST_LOSSES = 8  # of the batches of an accumulation window
_SQUARES = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum")  # running squares of gradients
_LARGEST = "exp_inf"  # Adamax: the same by magnitude
_AVERAGES = ("exp_avg", "momentum_buffer")  # running gradients
_SUMMED = {torch.float32, torch.float64}  # dtypes whose sums are accurate enough
_FEW = 512  # entries of a gradient that a check reads
_Place = tuple[int, Tensor, str]  # a layer, its parameter, and the key of something in its state


class OptimizerNorms:
    r"""Norms of the gradients of an optimizer's layers, and of its updates before the learning rate.

    The update of a layer is :math:`\lVert m \rVert / \sqrt{\sum v}` with the running gradient m and the running squares
    v (Adam and its kind, RMSprop, Adagrad), the root of the mean of :math:`m^2` over the mean of v. With a running
    gradient alone (SGD with momentum, Muon, Lion, :class:`dynamon.optim.Lanton`) it is its norm. An optimizer that
    keeps nothing has no update of its own. Bias correction is left out: it moves slowly and the level follows it.

    Args:
        optimizer: The optimizer.
        layers: All layers of the model.

    Attributes:
        layers: The L layers that the optimizer holds.

    Cost: one foreach norm for gradients, and one each for m and for v: three device calls where all have one dtype,
    which read gradients and state once. Nothing waits for the device. Of sharded tensors (FSDP2) the part of this
    process counts.
    """

    def __init__(self, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Find the optimizer's layers."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.layers = [layer for layer in layers if id(layer.parameter) in own]
        self._parameters = [layer.parameter for layer in self.layers]
        self._is_sharded = any_sharded(self._parameters)
        self._count = count_parameters(optimizer)
        self._optimizers = [optimizer, *wrapped_optimizers(optimizer)]
        self._planned_for = 0
        self._above: list[_Place] = []
        self._below: list[_Place] = []
        self._are_squares = self._own_gradients = False

    def is_complete(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer holds as many parameters as when its layers were found."""
        return self._count == count_parameters(optimizer)

    @property
    def rate(self) -> float:
        """Return the largest learning rate of its groups; 0 for one on a device, which would have to be waited for."""
        rates = [group.get("lr", 0.0) for group in self._optimizers[0].param_groups]
        return max([float(rate) for rate in rates if isinstance(rate, int | float)], default=0.0)

    def gradients(self) -> "Norms":
        """Measure the gradients as they are now; of frozen layers none."""
        found = [(i, p.grad) for i, p in enumerate(self._parameters) if p.requires_grad and p.grad is not None]
        return Norms([i for i, _ in found], _norms(self._local([g for _, g in found]), 2))

    def places(self) -> list[int]:
        """Return which layers have a gradient now."""
        return [i for i, p in enumerate(self._parameters) if p.grad is not None]

    def some(self, places: Sequence[int]) -> list[float]:
        """Measure the gradients of some layers on the host, the first entries of each: 0 for a layer that has none."""
        gradients = [self._parameters[i].grad for i in places]
        return [0.0 if gradient is None else _norm_of_first(gradient) for gradient in gradients]

    def updates(self) -> "tuple[Norms, Norms, float]":
        """Measure what the optimizer keeps, after its step: numerators, denominators, and the power of the latter."""
        state: Any = next((o.state for o in self._optimizers if o.state), {})
        if self._planned_for != len(state):
            self._plan(state)
        if self._own_gradients:
            above = self.gradients()
        else:
            above = self._kept(state, self._above, 2)
        below = self._kept(state, self._below, 1 if self._are_squares else 2)
        return above, below, 0.5 if self._are_squares else 1.0

    def _plan(self, state: Mapping[Tensor, Any]) -> None:
        """Find under which names the layers' running averages are, once the optimizer has them."""
        self._planned_for, self._above, self._below = len(state), [], []
        for i, parameter in enumerate(self._parameters):
            own = state.get(parameter) or {}
            above = next((key for key in _AVERAGES if isinstance(own.get(key), Tensor)), None)
            below = next((key for key in (*_SQUARES, _LARGEST) if isinstance(own.get(key), Tensor)), None)
            if above is not None:
                self._above.append((i, parameter, above))
            if below is not None and above != "momentum_buffer":  # RMSprop's buffer holds what has been divided
                self._below.append((i, parameter, below))
        self._are_squares = any(key != _LARGEST for _, _, key in self._below)
        self._own_gradients = bool(self._below) and not self._above

    def _kept(self, state: Mapping[Tensor, Any], places: Sequence[_Place], order: int) -> "Norms":
        """Measure what a state holds at some places."""
        held = [state[parameter][key] for _, parameter, key in places]
        return Norms([i for i, _, _ in places], _norms(self._local(held), order))

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return what is here of tensors, dense and real; a call only for those that are not plain already."""
        if self._is_sharded:
            return [_plain(t) for t in tensors]
        return [
            t if t.layout == torch.strided and not t.requires_grad and not t.is_complex() else _plain(t)
            for t in tensors
        ]


class Norms:
    """Hold norms on their way to the host.

    Args:
        places: The layers that have one; none where they were not measured.
        values: As many tensors without dimensions on the device, or an array where they are on the host already.
    """

    def __init__(self, places: Sequence[int] = (), values: "Sequence[Tensor] | NDArray[Any]" = ()) -> None:
        """Remember them."""
        self._places, self._known = places, values if isinstance(values, np.ndarray) else None
        self.on_device: Sequence[Tensor] = () if isinstance(values, np.ndarray) else values

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)

    def take(self, arrived: NDArray[Any], count: int) -> "tuple[NDArray[Any], NDArray[Any]]":
        """Return ``[count]`` numbers by layer, 0 where there is none, and what is left of those that have arrived."""
        taken = len(self.on_device)
        found = np.zeros(count)
        if len(self):
            found[self._places] = arrived[:taken] if self._known is None else self._known
        return found, arrived[taken:]


NOTHING = Norms()


class StepRow:
    """One step on its way to the host: gradients, updates, losses, and whether a scaler has skipped it.

    Args:
        gradients: Norms of the gradients.
        scale: Factor that brings them to their true size.
    """

    def __init__(self, gradients: Norms, scale: Scale = 1.0) -> None:
        """Start before the step."""
        self._gradients, self._scale = gradients, scale
        self._above, self._below, self._power = NOTHING, NOTHING, 1.0
        self._skipped: Tensor | None = None
        self._losses = 0
        self._host: Tensor | None = None
        self._event: Any = None

    @property
    def is_skipped(self) -> bool:
        """Return whether a scaler has skipped the step; waits for it where that is known on a device."""
        return self._skipped is not None and bool(self._skipped)

    def end(self, updates: tuple[Norms, Norms, float] | None, skipped: Tensor | None) -> None:
        """The step is over; its updates may not have been measured."""
        self._skipped = skipped
        if updates is not None:
            self._above, self._below, self._power = updates

    def send(self, losses: Sequence[Tensor], device: torch.device, samples: Sequence[Tensor] = ()) -> None:
        """Begin the copy to the host. The host does not wait.

        On a GPU the copy goes to pinned memory, and an event tells when it has arrived.

        Args:
            losses: Of the batches of the step.
            device: Where norms are.
            samples: Entries of the batches, ``[n]`` each.
        """
        self._losses = len(losses)
        numbers = [*losses, *(t for t in (self._scale, self._skipped) if isinstance(t, Tensor))]
        values = [norm for norms in (self._gradients, self._above, self._below) for norm in norms.on_device]
        values += [t.detach().reshape(()).to(device) for t in numbers]
        row = torch.stack(values) if values else torch.zeros(0, device=device)
        if samples:
            row = torch.cat([row, *samples])
        if row.device.type == "cuda":
            self._host = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            self._host.copy_(row, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(row.device))
        else:
            self._host = row.cpu()

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self._event is not None:
            self._event.synchronize()

    @property
    def has_arrived(self) -> bool:
        """Return whether the copy is complete."""
        return self._host is not None and (self._event is None or self._event.query())

    def read(self, count: int) -> "StepNumbers | None":
        """Return what has arrived, of ``count`` layers; None for a step that was skipped."""
        if self._host is None:
            raise RuntimeError("the row was not sent.")
        gradients, rest = self._gradients.take(self._host.double().numpy(), count)
        updates, rest = self._above.take(rest, count)
        below, rest = self._below.take(rest, count)
        losses, rest = rest[: self._losses].tolist(), rest[self._losses :]
        scale = self._scale
        if isinstance(scale, Tensor):
            scale, rest = float(rest[0]), rest[1:]
        if self._skipped is not None:
            if rest[0]:
                return None
            rest = rest[1:]
        if len(self._below):
            under = below**self._power
            updates = np.divide(updates, under, out=np.zeros(count), where=under != 0)
        return StepNumbers(
            gradients * scale if len(self._gradients) else None, updates if len(self._above) else None, losses, rest
        )


@dataclass(frozen=True)
class StepNumbers:
    """Hold the numbers of one step.

    Attributes:
        gradients: ``[L]`` norms by layer, 0 where there is none; None where none was measured.
        updates: ``[L]`` sizes, likewise.
        losses: Of the batches.
        samples: Entries of the batches, one after the other.
    """

    gradients: NDArray[Any] | None
    updates: NDArray[Any] | None
    losses: list[float]
    samples: NDArray[Any]


def count_parameters(optimizer: Optimizer) -> int:
    """Return how many parameters an optimizer holds."""
    return sum([len(group["params"]) for group in optimizer.param_groups])


def _plain(gradient: Tensor) -> Tensor:
    """Return the entries that are here of a gradient, real; of a sparse one those that it holds, each once.

    No collective: processes need not look at the same steps.
    """
    local = to_local(gradient)
    return as_real((local.coalesce().values() if local.is_sparse else local).detach())


def _entries(gradient: Tensor) -> Tensor:
    """Return the same, but entries of a sparse one as they are, some of which may belong together."""
    return as_real(gradient._values()) if gradient.is_sparse else _plain(gradient)


def _norm_of_first(gradient: Tensor) -> float:
    """The norm of the first entries, or of all where they do not lie in a row."""
    gradient = _entries(gradient)
    if gradient.dtype in _SUMMED and gradient.is_contiguous():
        first = gradient.view(-1)[:_FEW]  # a dot product takes two thirds of the time of a norm when caches are cold
        return math.sqrt(torch.dot(first, first).item())
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float32 if gradient.dtype.itemsize < 4 else None))


def _norms(tensors: list[Tensor], order: int) -> "Sequence[Tensor] | NDArray[Any]":
    """Return norms in at least float32, by one call for each dtype."""
    if not tensors:
        return []
    dtypes = {t.dtype for t in tensors}
    if order == 1 and tensors[0].is_cpu and dtypes <= _SUMMED:
        # None is negative, and a sum takes a tenth of the time of a norm.
        return torch.stack([t.sum() for t in tensors]).numpy()
    if len(dtypes) == 1:
        return _of_one_dtype(tensors, order, dtypes.pop())
    found: dict[int, Tensor] = {}
    for dtype in dtypes:
        own = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        found.update(zip(own, _of_one_dtype([tensors[i] for i in own], order, dtype), strict=True))
    return [found[i] for i in range(len(tensors))]


def _of_one_dtype(tensors: list[Tensor], order: int, dtype: torch.dtype) -> Sequence[Tensor]:
    return torch._foreach_norm(tensors, order, dtype=torch.float32 if dtype.itemsize < 4 else None)
