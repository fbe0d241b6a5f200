"""Reads the gradients of a model's layers: one pass and one copy to the host, shared by all that ask."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.distributed.dtensor import any_sharded, gather_for_checkpoint, holders, shard_like, to_local, to_local_as
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats
from dynamon.kernels import warm_up
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import Norm, update_norm
from dynamon.quantities.gradient_statistics import GradientStatistics, Step
from dynamon.quantities.local_gradients import LocalGradients, all_certain
from dynamon.quantities.readings import DUAL, L1, L2, PendingReadings, ReadingContext
from dynamon.quantities.scales import Scale, all_scaled, without_dimensions
from dynamon.quantities.tensor_lists import copied
from dynamon.quantities.trends import Trends
from dynamon.quantities.windows import Window, load_window, window_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ROUNDING = 1e-4, 1e-2  # of a gradient's length, in single precision and in half; measured: 1e-5 and 3e-3


class GradientReader:
    """Reads the gradients of a list of layers, at most once per optimizer step.

    A gradient is whole, or sharded over several processes (DTensor, as FSDP2 and tensor parallelism make them): each
    measures its shard, one reduction brings the statistics together, and one formula finishes both. Every process must
    then read and store at the same steps; what is stored are shards.

    Args:
        layers: The layers, each with a floating parameter; sparse gradients are made dense.
        family: The optimizer's geometry, see :func:`dynamon.norms.geometry.optimizer_family`; with the layer's role it
            chooses the norm whose dual is taken.

    The gradient of the step before is stored (one copy, in the gradient's dtype); its memory is used again.

    Cost: :func:`dynamon.kernels.gradient_stats` and some ten small calls, some twenty-five with trends; nuclear norms
    of gradients and changes on top where the family needs them. Nothing waits for the device. Sharded: one
    all-reduce of ``13 L`` numbers for L layers, and for nuclear norms a check, which is a host read, and a gather of
    each gradient, of its change and of the difference of parts of windows.

    Attributes:
        trends: Tells changes that continue from noise; None where nobody asked for it.
        in_half_precision: Whether gradients come out of autocast to sixteen bits, which their dtype does not say.
        agrees_with_others: Whether the processes of a DDP run, which all read, check together that their windows are
            alike: by an all-reduce of three numbers, without a host read.
    """

    def __init__(self, layers: Sequence[Layer], family: str) -> None:
        """Choose a norm for each layer, and find the processes that hold them."""
        self.layers = list(layers)
        self.norms: list[Norm] = [update_norm(layer, family) for layer in self.layers]
        parameters = [layer.parameter for layer in self.layers]
        self._is_sharded = any_sharded(parameters)
        self._ranks = holders(parameters) if parameters else Ranks(torch.device("cpu"), alone=True)
        self._statistics = GradientStatistics(self.layers, self.norms, self._ranks)
        self.step = 0
        self._key: Hashable = None
        self._pending: PendingReadings | None = None
        self._previous: dict[int, Tensor] = {}
        self._followed_at = -1  # the step whose gradients the trends have seen and are stored
        self._room: dict[int, Tensor] = {}  # where gradients are kept, whatever is in it
        self._stored_at = -1  # the step whose gradients are stored
        self._stored_window: Window | None = None
        self._part: tuple[int, float, dict[int, Tensor]] | None = None  # step, share of its samples, their gradients
        self.trends: Trends | None = None
        self.in_half_precision = self.agrees_with_others = False
        self._local: LocalGradients | None = None
        self._everyone: Ranks | None = None  # the processes of a DDP run

    def begin(self, key: Hashable) -> bool:
        """Begin an optimizer step.

        Returns:
            Whether it is a new one; the same key twice is the same step.
        """
        if key == self._key:
            return False
        self._key, self._pending = key, None
        self.step += 1
        return True

    def again(self) -> None:
        """Discard what was read or stored of this step, which uses other gradients."""
        self._pending = None
        self.forget()

    def forget(self) -> None:
        """Discard the stored gradients, so that those of this step are compared with none."""
        self._previous, self._stored_at, self._followed_at = {}, -1, -1

    def follow_trends(self) -> None:
        """Tell changes that continue from noise, from the next reading on."""
        likes = [as_real(layer.parameter.detach()) for layer in self.layers]
        self.trends = Trends(likes, self._ranks) if likes else None

    def store(self, scale: Scale = 1.0, window: Window | None = None) -> None:
        """Store this step's gradients for the difference at the next step, without measuring them.

        Args:
            scale: As for :meth:`read`.
            window: As for :meth:`read`.
        """
        if self._stored_at == self.step:
            return
        frozen = self._frozen()
        gradients = {i: g for i, g in enumerate(self._gradients()) if g is not None and not frozen[i]}
        self._keep(copied(gradients, self._room, scale), window)
        self._followed_at = -1

    def _keep(self, gradients: dict[int, Tensor], window: Window | None) -> None:
        self._previous, self._room = gradients, self._room | gradients
        self._stored_at, self._stored_window = self.step, window

    def store_part(self, share: float, scale: Scale = 1.0) -> None:
        r"""Store what has been accumulated so far of the gradients of the next step.

        Where gradients are accumulated over several batches, two parts of the window are independent: with a share s
        of the samples in :math:`S`, and :math:`G` the whole,

        .. math:: \sqrt{\frac{2}{s (1 - s)}}\, (S - s G)

        has the mean square of the difference of two independent gradients of full batches. Both parts are taken at
        the same weights, so unlike the change between steps there is no curvature in it.

        Args:
            share: Samples accumulated so far over those of the whole window, in (0, 1).
            scale: Factor on the gradients, for those an AMP scaler has not unscaled yet.

        Raises:
            ValueError: If ``share`` is not in (0, 1).

        Memory: one copy of the gradients until the step is read.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must lie in (0, 1), got {share}.")
        if self._part is not None and self._part[:2] == (self.step + 1, share):
            return  # another caller has asked for it
        gradients = {i: g for i, g in enumerate(self._gradients()) if g is not None}
        self._part = (self.step + 1, share, copied(gradients, {}, scale))

    def settle_part(self, share: float | None) -> None:
        """Correct the share of the window that the stored part has.

        Args:
            share: As for :meth:`store_part`; None where the window is not the sum of that part and a like one.
        """
        if self._part is not None:
            self._part = None if share is None else (self._part[0], share, self._part[2])

    def watch_ranks(self, group: "ProcessGroup | None" = None) -> None:
        """Compare the gradients of the processes of a DDP run at the next step.

        All of them must call this before the first backward pass of that step, and then read it or give up. See
        :class:`dynamon.quantities.local_gradients.LocalGradients` for what is compared and in which unit.

        Args:
            group: The processes; all if None.

        Raises:
            ValueError: Where parameters are sharded.
        """
        if self._is_sharded:
            raise ValueError(
                "gradients of sharded parameters are summed over the processes as they arrive, and no process sees its "
                "own: compare successive gradients, or parts of an accumulation window."
            )
        if self._local is None:
            self._local = LocalGradients(self.layers, Ranks(self._device, group))
        self._local.open()

    def give_up_ranks(self) -> None:
        """Take part in the comparison without a gradient, where this process could not read its own."""
        if self._local is not None:
            self._local.give_up()

    def forget_ranks(self) -> None:
        """Stop watching; all processes must call this at the same step."""
        if self._local is not None:
            self._local.close()

    def read(
        self,
        scale: Scale = 1.0,
        dual: bool = True,
        local_scale: Scale | None = None,
        window: Window | None = None,
    ) -> PendingReadings:
        """Measure this step's gradients and their change, and store them for the next step.

        Args:
            scale: Factor on the gradients, for those an AMP scaler has not unscaled yet: a number, or a tensor of one
                entry on their device, which the host does not wait for.
            dual: Whether the dual norm of the gradients themselves is wanted. Without, it is NaN where it takes a
                nuclear norm, which is half of the cost there; a later call in the same step can still ask for it.
            local_scale: ``scale`` for what :meth:`watch_ranks` kept, which an AMP scaler never unscales; None for the
                same.
            window: What the gradients were accumulated over. They are compared with those of the step before only
                where it is the same; None everywhere: always.
        """
        if self._pending is None:
            try:
                self._pending = self._measure(scale, dual, scale if local_scale is None else local_scale, window)
            except Exception:  # whatever it was, other processes must not wait
                self.give_up_ranks()
                raise
        elif dual and not self._pending.has_dual:
            self._pending = self._with_dual(self._pending, scale)
        return self._pending

    def warm_up(self) -> None:
        """Compile what readings launch, before training, so that no step pays for it.

        Cost: some seconds where it has never been compiled.
        """
        if self.layers:
            dtypes = [as_real(to_local(layer.parameter)).dtype for layer in self.layers]
            warm_up(self._device, dtypes)

    @property
    def _device(self) -> torch.device:
        return self.layers[0].parameter.device

    def _gradients(self) -> list[Tensor | None]:
        """Return what is here of the gradients, dense and real, without a graph."""
        gradients = [layer.parameter.grad for layer in self.layers]
        if self._is_sharded:
            likes = [layer.parameter for layer in self.layers]
            return [None if g is None else _plain(g, like) for g, like in zip(gradients, likes, strict=True)]
        # At each step for every layer: a call only for those that are not plain already.
        return [
            g if g is None or g.layout == torch.strided and not g.requires_grad and not g.is_complex() else _plain(g)
            for g in gradients
        ]

    def _comparable(self, window: Window | None) -> dict[int, Tensor]:
        """Return the gradients of the step before, if they were accumulated over a window like this one.

        What is left in ``.grad`` of a frozen layer is never compared.
        """
        if self._stored_at != self.step - 1 or self._stored_window != window:
            return {}
        frozen = self._frozen()
        return {index: g for index, g in self._previous.items() if not frozen[index]}

    def _frozen(self) -> NDArray[Any]:
        return np.array([not layer.parameter.requires_grad for layer in self.layers], bool)

    def _measure(self, scale: Scale, dual: bool, local_scale: Scale, window: Window | None) -> PendingReadings:
        doubt = self._stored_at == self.step - 1 and self._stored_window != window
        gradients, frozen = self._gradients(), self._frozen()
        present = np.array([g is not None for g in gradients], bool)
        step = self._step(gradients, self._comparable(window))

        def measure() -> PartialStats:
            found = self._statistics.measure(step, scale, dual, self._products(step, scale))
            kept = step.current if step.previous is None else step.previous  # which are the current ones by now
            own = {i: g for i, g in zip(step.indices, kept, strict=True) if present[i] and not frozen[i]}
            self._keep(copied(own, self._room, scale) if step.previous is None else own, window)
            return found

        found = self._statistics.reduce(measure)
        l1, l2, duals = self._statistics.norms(step.indices, found)
        known, parts = self._between_ranks(step, found.known, scale, local_scale, window, doubt)
        if parts is not None:
            duals[2], l2[2] = parts
        if self.trends is None or not step.indices:
            trend = torch.zeros_like(l1[0])
        else:
            agreed = known is found.known and not self._ranks.is_distributed and all(step.compared)
            trend = self.trends.cosines(found.sums[8:], None if agreed else known[0]).to(l1)
        rows = torch.cat([l1[:1], l2, duals, found.sums[6:8], trend[None], known.to(l1)])
        read = np.isin(np.arange(len(self.layers)), step.indices)
        context = ReadingContext(present, read, self._rounding(), frozen, window)
        return PendingReadings(rows, context, dual or not self._statistics.takes_matrices(step.indices))

    def _between_ranks(
        self, step: Step, known: Tensor, scale: Scale, local_scale: Scale, window: Window | None, doubt: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of a DDP run, find out what all processes can compare, and how far apart their gradients are ``[2, I]``."""
        if self._local is not None and self._local.is_open:
            means: dict[int, Tensor] = dict(zip(step.indices, all_scaled(step.current, scale), strict=True))
            own = [means.get(i) for i in range(len(self.layers))]
            norms, alike = self._local.compare(own, self._statistics.of_tensors, without_dimensions(local_scale), doubt)
            at = on_device(step.indices, norms.device, torch.int64)
            return torch.stack([known[0] & alike, torch.ones_like(known[1])]), norms.index_select(1, at)
        if self.agrees_with_others and window is not None:
            self._everyone = self._everyone or Ranks(self._device)
            return torch.stack([known[0] & all_certain(doubt, self._everyone), known[1]]), None
        return known, None

    def _step(self, gradients: Sequence[Tensor | None], stored: Mapping[int, Tensor]) -> Step:
        """Collect what is compared at this step."""
        at, share, halves = self._part or (-1, 0.5, {})
        self._part, halves = None, halves if at == self.step else {}
        there = [i for i, g in enumerate(gradients) if g is not None]
        indices = list(range(len(gradients))) if self._ranks.is_distributed else there
        current = self._current(gradients, indices)
        return Step(
            indices,
            current,
            compared=[gradients[i] is not None and i in stored for i in indices],
            previous=_filled(indices, current, stored) if stored or self._ranks.is_distributed else None,
            parted=[gradients[i] is not None and i in halves for i in indices],
            halves=_filled(indices, current, halves) if halves else None,
            share=share,
        )

    def _current(self, gradients: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor]:
        """Return some gradients, zeros where there is none: other processes may be waiting for this shard."""
        chosen = [(i, gradients[i]) for i in indices]
        return [torch.zeros_like(as_real(to_local(self.layers[i].parameter))) if g is None else g for i, g in chosen]

    def _products(self, step: Step, scale: Scale) -> Tensor | None:
        """Follow the trends of the changes."""
        if self.trends is None or not step.indices:
            return None
        # What is stored is what the last call looked at, if it was of these layers.
        seen = self._followed_at == self.step - 1 and all(step.compared) and self.trends.has_seen(step.indices)
        previous = step.current if step.previous is None else step.previous
        self._followed_at = self.step
        return self.trends.products(step.indices, step.current, None if seen else previous, scale)

    def _rounding(self) -> NDArray[Any]:
        halves = [la.parameter.dtype.itemsize < 4 or self.in_half_precision for la in self.layers]
        return np.where(halves, _ROUNDING[1], _ROUNDING[0])

    def _with_dual(self, pending: PendingReadings, scale: Scale) -> PendingReadings:
        """Return the same readings with the dual norms of the gradients, which are still there."""
        indices, rows = np.flatnonzero(pending.context.read).tolist(), pending.rows.clone()
        current = self._current(self._gradients(), indices)
        rows[DUAL] = self._statistics.own_duals(indices, current, scale, rows[L1], rows[L2])
        return PendingReadings(rows, pending.context)

    def state_dict(self, everywhere: bool = True) -> dict[str, Any]:
        """Return the stored gradients by parameter name, if they are this step's; sharded ones whole, in main memory.

        Where parameters are sharded every process must call this. Cost: a gather of each gradient, one after the other.

        Args:
            everywhere: False for a checkpoint, which the first process writes: the others need no whole gradient.
        """
        if self._stored_at != self.step:
            return {"previous": {}}
        shards = {self.layers[i].name: g for i, g in self._previous.items()}
        stored = gather_for_checkpoint(shards, {layer.name: layer.parameter for layer in self.layers}, everywhere)
        return {"previous": stored, "windows": self._saved_windows(), **self._saved_trends()}

    def _saved_trends(self) -> dict[str, Any]:
        return {} if self.trends is None else {"trends": self.trends.state_dict([la.name for la in self.layers])}

    def _saved_windows(self) -> dict[str, Any]:
        """Return the window of each stored gradient: one per optimizer, but states of several are merged."""
        window = window_state(self._stored_window)
        return {} if window is None else {self.layers[i].name: window for i in self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load stored gradients; those whose name or shape no longer exists are left out."""
        self._key, self._pending, self._part, self._followed_at = None, None, None, -1
        own = {layer.name: (i, layer.parameter) for i, layer in enumerate(self.layers)}
        known = {name: g for name, g in state["previous"].items() if name in own}
        self._previous = {
            own[name][0]: shard_like(g.to(self._device), own[name][1])
            for name, g in known.items()
            if g.shape == as_real(own[name][1].detach()).shape
        }
        self._stored_at = self.step if self._previous else -1
        if self.trends is not None:
            names = [layer.name for layer in self.layers]
            self.trends.load_state_dict(state.get("trends", {}), names)
        windows = state.get("windows", {})
        self._stored_window = load_window(next((windows[la.name] for la in self.layers if la.name in windows), None))


def _plain(gradient: Tensor, like: Tensor | None = None) -> Tensor:
    """Return a gradient without a graph, dense and real; the shard of it here where it belongs to a sharded one."""
    gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    return as_real(gradient if like is None else to_local_as(gradient, like))


def _filled(indices: Sequence[int], current: Sequence[Tensor], stored: Mapping[int, Tensor]) -> list[Tensor]:
    """Return stored gradients, zeros in place of those that are missing."""
    missing = {i: torch.empty_like(g) for i, g in zip(indices, current, strict=True) if i not in stored}
    if missing:
        torch._foreach_zero_(list(missing.values()))
    return [missing[i] if i in missing else stored[i] for i in indices]
