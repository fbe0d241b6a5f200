"""Reading the gradients of a model's layers: one pass, one copy to the host, shared by all who ask."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.kernels import GradientStats, gradient_stats, warm_up, widest_dtype
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import Norm, dual_norms, update_norm
from dynamon.quantities.local_gradients import LocalGradients, agreed
from dynamon.quantities.readings import Known, PendingReadings
from dynamon.quantities.scales import Scale, all_scaled, without_dimensions
from dynamon.quantities.tensor_lists import copied
from dynamon.quantities.trends import Trends
from dynamon.quantities.updates import differences
from dynamon.quantities.windows import Window, load_window, window_state

_MOST_MIXTURES = 16  # sets of layers that have gradients, in turns
_ROUNDING = 1e-4, 1e-2  # of a gradient's length, in single precision and in half; measured: 1e-5 and 3e-3


class GradientReader:
    """Reads the gradients of a list of layers, at most once an optimizer step whoever asks.

    Args:
        layers: The layers, each with a floating parameter; sparse gradients are made dense.
        family: The optimizer's geometry, see :func:`dynamon.norms.geometry.optimizer_family`; with the layer's role it
            chooses the norm whose dual is taken.

    The gradient of one step before is stored (one copy, in the gradient's dtype) while differences are
    asked for; the memory is kept for the next one.

    Cost: :func:`dynamon.kernels.gradient_stats` and some ten small calls, some twenty-five with trends; nuclear norms
    of gradients and changes on top where the family needs them. Nothing waits for the device.

    Attributes:
        trends: Tells changes that go on from noise, for who asks; None for nobody.
        in_half_precision: Whether gradients come out of autocast to sixteen bits, which their dtype does not say.
        agrees_with_others: Whether the processes of a DDP run, which all read, find out together if the windows of all
            of them are alike: by an all-reduce of one number, without a host read.
    """

    def __init__(self, layers: Sequence[Layer], family: str) -> None:
        """Choose a norm for each layer."""
        self.layers = list(layers)
        self.norms: list[Norm] = [update_norm(layer, family) for layer in self.layers]
        self._need_matrix = {i for i, norm in enumerate(self.norms) if norm.needs_matrix}
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
        self._mixed: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._sent: dict[tuple[int, ...], Tensor] = {}

    def begin(self, key: Hashable) -> bool:
        """Say that an optimizer step is being taken.

        Returns:
            Whether it is a new one; the same key twice in a row is the same step.
        """
        if key == self._key:
            return False
        self._key, self._pending = key, None
        self.step += 1
        return True

    def again(self) -> None:
        """The gradients of this step were not those that it uses: forget what was read or stored of them."""
        self._pending = None
        self.forget()

    def forget(self) -> None:
        """Compare this step's gradients with no others."""
        self._previous, self._stored_at, self._followed_at = {}, -1, -1

    def follow_trends(self) -> None:
        """From here on tell changes that go on from noise."""
        self.trends = Trends(len(self.layers), self.layers[0].parameter.device) if self.layers else None

    def store(self, scale: Scale = 1.0, window: Window | None = None) -> None:
        """Keep this step's gradients, for a difference at the next step, without measuring them.

        Args:
            scale: As for :meth:`read`.
            window: Likewise.
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
        r"""Keep what has been accumulated so far of the gradients of the step to come.

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
            return  # somebody else has asked for it
        gradients = {i: g for i, g in enumerate(self._gradients()) if g is not None}
        self._part = (self.step + 1, share, copied(gradients, {}, scale))

    def settle_part(self, share: float | None) -> None:
        """Say which share of the window the part that was kept has turned out to be.

        Args:
            share: As for :meth:`store_part`; None where the window is not the sum of that part and a like one.
        """
        if self._part is not None:
            self._part = None if share is None else (self._part[0], share, self._part[2])

    def watch_ranks(self, group: Any = None) -> None:
        """Compare the gradients of the processes of a DDP run at the step to come.

        To be called on all of them before the first backward pass of that step, which all must then read, or give up:
        see :class:`dynamon.quantities.local_gradients.LocalGradients`, which says what is compared and in which unit.

        Args:
            group: The processes; all if None.
        """
        if self._local is None:
            self._local = LocalGradients(self.layers, group)
        self._local.open()

    def give_up_ranks(self) -> None:
        """Leave no other process waiting, where this one was watched and could not be read."""
        if self._local is not None:
            self._local.give_up()

    def forget_ranks(self) -> None:
        """Stop watching, on all processes at once."""
        if self._local is not None:
            self._local.close()

    def read(
        self,
        scale: Scale = 1.0,
        dual: bool = True,
        local_scale: Scale | None = None,
        window: Window | None = None,
    ) -> PendingReadings:
        """Measure this step's gradients and their change, and keep them for the next step.

        Args:
            scale: Factor on the gradients, for those an AMP scaler has not unscaled yet: a number, or a tensor of one
                entry on their device, which spares the host a wait.
            dual: Whether the dual norm of the gradients themselves is wanted. Without, it is NaN where it takes a
                nuclear norm, which is half of the cost there; who asks for it later in the same step gets it.
            local_scale: ``scale`` for what :meth:`watch_ranks` kept, which an AMP scaler never unscales; None for the
                same.
            window: What the gradients were accumulated over. They are compared with those of the step before only
                where it is the same; who says nothing says that it always is.
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
        """Before training, compile what readings launch, so that no step pays for it; nothing where there is nothing.

        Cost: some seconds where it has never been compiled.
        """
        if self.layers:
            dtypes = [as_real(layer.parameter.detach()).dtype for layer in self.layers]
            warm_up(self.layers[0].parameter.device, dtypes)

    def _gradients(self) -> list[Tensor | None]:
        """As they are in ``.grad``, dense and real."""
        gradients = [layer.parameter.grad for layer in self.layers]
        # At each step for every layer: a call only for those that are not plain already.
        return [
            g if g is None or g.layout == torch.strided and not g.requires_grad and not g.is_complex() else plain(g)
            for g in gradients
        ]

    def _comparable(self, window: Window | None) -> dict[int, Tensor]:
        """The gradients of one step before, if they were accumulated over a window like this one.

        What is left in ``.grad`` of a layer that is not trained is compared with nothing, now or later.
        """
        if self._stored_at != self.step - 1 or self._stored_window != window:
            return {}
        frozen = self._frozen()
        return {index: g for index, g in self._previous.items() if not frozen[index]}

    def _frozen(self) -> NDArray[Any]:
        return np.array([not layer.parameter.requires_grad for layer in self.layers], bool)

    def _measure(self, scale: Scale, dual: bool, local_scale: Scale, window: Window | None) -> PendingReadings:
        gradients, frozen = self._gradients(), self._frozen()
        stored = self._comparable(window)
        present = np.array([g is not None for g in gradients], bool)
        compared = present & np.array([i in stored for i in range(len(gradients))], bool)
        indices = np.flatnonzero(present).tolist()
        current = [g for g in gradients if g is not None]
        previous = self._previous_of(indices, current, stored)
        doubt = self._stored_at == self.step - 1 and self._stored_window != window
        followed = self._followed(compared, present)
        products = self._products(followed, gradients, stored, scale)
        special, special_change = self._special_duals(indices, current, previous, scale, dual)
        stats = gradient_stats(current, previous, self._wide, scale=scale)
        kept = {i: g for i, g in zip(indices, current, strict=True) if not frozen[i]}
        if previous is None:
            self._keep(copied(kept, self._room, scale), window)
        else:
            self._keep({i: p for i, p in zip(indices, previous, strict=True) if i in kept}, window)
        own = self._rows_of(indices, stats, special, special_change)
        alike: Tensor | None = None  # what all processes have agreed on
        if self._local is not None and self._local.is_open:
            means = dict(zip(indices, all_scaled(current, scale), strict=True))
            true = [means.get(i) for i in range(len(gradients))]
            rows, alike = self._local.compare(true, self._both_norms, without_dimensions(local_scale), doubt)
            places = self._positions(tuple(indices), rows)
            independent, parted = list(rows.index_select(1, places).to(own[0])), present
        else:
            independent, parted = self._independent(indices, current, own[0], scale)
            alike = agreed(doubt, own[0].device) if self.agrees_with_others and window is not None else None
        shared = [] if alike is None else [alike.to(own[0]).expand_as(own[0]), torch.ones_like(own[0])]
        trend = self._trend(followed, products, indices, shared[0][:1] if shared else None)
        rows = torch.stack([*own, *independent, trend.to(own[0]), *shared])
        known = Known(present, compared, parted, self._rounding(), frozen, window)
        return PendingReadings(rows, known, dual or not self._special_places(indices))

    def _previous_of(
        self, indices: list[int], current: list[Tensor], stored: Mapping[int, Tensor]
    ) -> list[Tensor] | None:
        """The gradients of one step before, zeros in place of those that are missing; None where all are."""
        if not stored:
            return None
        missing = {i: torch.empty_like(g) for i, g in zip(indices, current, strict=True) if i not in stored}
        if missing:
            torch._foreach_zero_(list(missing.values()))
        return [missing[i] if i in missing else stored[i] for i in indices]

    def _rows_of(
        self, indices: list[int], stats: GradientStats, special: Tensor | None, special_change: Tensor | None
    ) -> list[Tensor]:
        """The first seven rows of what is read ``[P]``, each."""
        l1, squares, change_l1, change_squares, inner = (
            *(stats.l1, stats.sum_squares),
            *(stats.difference_l1, stats.difference_sum_squares, stats.inner),
        )
        if change_l1 is None or change_squares is None or inner is None:
            change_l1 = change_squares = inner = torch.zeros_like(l1)
        lengths = torch.stack([squares, change_squares]).sqrt()
        both = None
        if special is not None and special_change is not None:
            both = torch.stack([special, special_change])
        dual, change_dual = self._duals(indices, torch.stack([l1, change_l1]), lengths, both)
        return [l1, lengths[0], dual, stats.nonfinite, change_dual, lengths[1], inner]

    def _followed(self, compared: NDArray[Any], present: NDArray[Any]) -> list[int]:
        """Layers whose trend is followed at this reading; with others who must agree all that are present are."""
        if self.trends is None or self._stored_at != self.step - 1 or not self._previous:
            return []
        return np.flatnonzero(present if self.agrees_with_others else compared).tolist()

    def _products(
        self, followed: list[int], gradients: Sequence[Tensor | None], stored: Mapping[int, Tensor], scale: Scale
    ) -> Tensor | None:
        if self.trends is None or not followed:
            return None
        current = [g for g in [gradients[i] for i in followed] if g is not None]
        known = self._followed_at == self.step - 1 and self.trends.has_seen(followed)
        if known and all([i in stored for i in followed]):
            self._followed_at = self.step  # what is stored is what the last call looked at
            return self.trends.products(followed, current, None, scale)
        self._followed_at = self.step
        missing = [(i, g) for i, g in zip(followed, current, strict=True) if i not in stored]
        filled = dict(zip([i for i, _ in missing], all_scaled([g for _, g in missing], scale), strict=True))
        previous = [filled[i] if i in filled else stored[i] for i in followed]
        return self.trends.products(followed, current, previous, scale)

    def _trend(self, followed: list[int], products: Tensor | None, indices: list[int], alike: Tensor | None) -> Tensor:
        """How far changes go on, ``[P]`` for the P layers that are present, 0 where it is not known."""
        if self.trends is None or products is None:
            return torch.zeros(len(indices), device=self.layers[0].parameter.device)
        found = self.trends.cosines(products, alike)
        if len(followed) == len(indices):
            return found
        position = {i: place for place, i in enumerate(indices)}
        places = self._positions(tuple(position[i] for i in followed), found)
        return found.new_zeros(len(indices)).index_copy(0, places, found)

    def _rounding(self) -> NDArray[Any]:
        halves = [la.parameter.dtype.itemsize < 4 or self.in_half_precision for la in self.layers]
        return np.where(halves, _ROUNDING[1], _ROUNDING[0])

    def _with_dual(self, pending: PendingReadings, scale: Scale) -> PendingReadings:
        """The same readings with the dual norms of the gradients, which are still there."""
        gradients = self._gradients()
        indices = np.flatnonzero(pending.known.present).tolist()
        special, _ = self._special_duals(indices, [g for g in gradients if g is not None], None, scale)
        rows = pending.rows.clone()
        rows[2] = self._duals(indices, rows[0], rows[1], special)
        return PendingReadings(rows, pending.known)

    def _independent(
        self, indices: list[int], current: list[Tensor], like: Tensor, scale: Scale
    ) -> tuple[list[Tensor], NDArray[Any]]:
        """Dual and Euclidean norm of the difference of two parts of the window, and who has one."""
        step, share, parts = self._part or (-1, 0.5, {})
        self._part = None
        parted = np.zeros(len(self.layers), bool)
        if step != self.step:
            return [torch.zeros_like(like)] * 2, parted
        parted[[i for i in indices if i in parts]] = True
        halves = self._previous_of(indices, current, parts) or [torch.zeros_like(g) for g in current]
        share_of_it = without_dimensions(scale) * share
        _, special = self._special_duals(indices, current, halves, share_of_it, dual=False)
        stats = gradient_stats(current, halves, self._wide, scale=share_of_it)
        assert stats.difference_l1 is not None and stats.difference_sum_squares is not None
        l2 = stats.difference_sum_squares.sqrt()
        unit = (2 / (share * (1 - share))) ** 0.5
        return [unit * self._duals(indices, stats.difference_l1, l2, special), unit * l2], parted

    def _both_norms(self, tensors: list[Tensor | None]) -> Tensor:
        """Dual and Euclidean norms ``[2, L]`` in float64, zero where there is no tensor."""
        found = torch.zeros(2, len(tensors), dtype=self._wide, device=self.layers[0].parameter.device)
        indices = [i for i, t in enumerate(tensors) if t is not None]
        given = [t for t in tensors if t is not None]
        if given:
            stats = gradient_stats(given, None, self._wide)
            l2 = stats.sum_squares.sqrt()
            special, _ = self._special_duals(indices, given, None, 1.0)
            duals = self._duals(indices, stats.l1, l2, special)
            found.index_copy_(1, self._positions(tuple(indices), found), torch.stack([duals, l2]).to(found))
        return found

    @property
    def _wide(self) -> torch.dtype:
        """What holds squares of gradients out of float32's range."""
        return widest_dtype(self.layers[0].parameter.device)

    def _special_duals(
        self,
        indices: list[int],
        current: list[Tensor],
        previous: list[Tensor] | None,
        scale: Scale,
        dual: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Dual norms that need the matrix itself, ``[S]`` each: of gradients, and of their changes where there are any.

        NaN in place of those that are not wanted; None where no layer needs any.
        """
        places = self._special_places(indices)
        if not places:
            return None, None
        layers = [self.layers[indices[place]] for place in places]
        norms = [self.norms[indices[place]] for place in places]
        chosen = all_scaled([current[place] for place in places], scale)
        found = chosen if dual else []
        if previous is not None:
            found = found + differences(chosen, [previous[place] for place in places])
        times = len(found) // len(places)
        row = torch.stack(dual_norms(layers * times, norms * times, found)) if found else None
        if row is not None and times == 2:
            return row[: len(places)], row[len(places) :]
        unknown = torch.full((len(places),), torch.nan, dtype=torch.float32, device=current[0].device)
        return (unknown, unknown) if row is None else (row, unknown) if dual else (unknown, row)

    def _special_places(self, indices: list[int]) -> list[int]:
        """Positions among ``indices`` of layers whose dual norm needs the matrix."""
        return [place for place, i in enumerate(indices) if i in self._need_matrix]

    def _duals(self, indices: list[int], l1: Tensor, l2: Tensor, special: Tensor | None) -> Tensor:
        """The dual norms ``[..., P]``: multiples of l1 or l2 where the norm allows, else the special ones."""
        of_l1, of_l2, where = self._mixture(tuple(indices), l1)
        duals = of_l1 * l1 + of_l2 * l2
        return duals if special is None else duals.index_copy(-1, where, special.to(duals.dtype))

    def _mixture(self, indices: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors on l1 and on l2, and the positions of the special norms; kept on the device."""
        if indices not in self._mixed:
            multiples = [self.norms[i].dual_multiples(self.layers[i].size) for i in indices]
            if len(self._mixed) >= _MOST_MIXTURES:
                self._mixed.clear()
            self._mixed[indices] = (
                like.new_tensor([of_l1 for of_l1, _ in multiples]),
                like.new_tensor([of_l2 for _, of_l2 in multiples]),
                self._positions(tuple(self._special_places(list(indices))), like),
            )
        return self._mixed[indices]

    def _positions(self, chosen: tuple[int, ...], like: Tensor) -> Tensor:
        """Positions on the device, sent there once: a copy to the device waits for what is queued."""
        if chosen not in self._sent:
            if len(self._sent) >= _MOST_MIXTURES:
                self._sent.clear()
            self._sent[chosen] = torch.tensor(chosen, dtype=torch.int64, device=like.device)
        return self._sent[chosen]

    def state_dict(self, everywhere: bool = True) -> dict[str, Any]:
        """The stored gradient by parameter name, if it is this step's.

        Args:
            everywhere: Says nothing here; see ``dynamon.quantities.sharded_gradients``.
        """
        if self._stored_at != self.step:
            return {"previous": {}}
        stored = {self.layers[i].name: g.clone() for i, g in self._previous.items()}
        return {"previous": stored, "windows": self._saved_windows(), **self._saved_trends()}

    def _saved_trends(self) -> dict[str, Any]:
        return {} if self.trends is None else {"trends": self.trends.state_dict([la.name for la in self.layers])}

    def _saved_windows(self) -> dict[str, Any]:
        """The window of each stored gradient: of one optimizer it is one, but states of several are put together."""
        window = window_state(self._stored_window)
        return {} if window is None else {self.layers[i].name: window for i in self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a stored gradient in place of what is here; names and shapes that no longer exist are left out."""
        self._key, self._pending, self._part, self._followed_at = None, None, None, -1
        index = {layer.name: i for i, layer in enumerate(self.layers)}
        self._previous = {
            index[name]: g.to(self.layers[index[name]].parameter.device)
            for name, g in state["previous"].items()
            if name in index and g.shape == as_real(self.layers[index[name]].parameter.detach()).shape
        }
        self._stored_at = self.step if self._previous else -1
        if self.trends is not None:
            names = [layer.name for layer in self.layers]
            self.trends.load_state_dict(state.get("trends", {}), names)
        windows = state.get("windows", {})
        self._stored_window = load_window(next((windows[la.name] for la in self.layers if la.name in windows), None))


def plain(gradient: Tensor) -> Tensor:
    """A gradient without a graph, dense and real, as it is where it is that already."""
    if gradient.layout == torch.strided and not gradient.requires_grad and not gradient.is_complex():
        return gradient
    return as_real(gradient.detach().to_dense() if gradient.is_sparse else gradient.detach())
