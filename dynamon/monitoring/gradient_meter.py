"""Gradient norms, gradient noise, clipping, and how quickly gradients turn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from dynamon.board.custom_scalars import chart_layout
from dynamon.distributed.dtensor import holders, to_local, to_local_as
from dynamon.kernels import l2_norms, warm_up, widest_dtype
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.monitoring.accumulation import begins_window, compares_ranks, has_windows
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.gradient_source import AwaitedReading, GradientSource, SourceReading
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.meter import FULL_EVERY
from dynamon.monitoring.pair_meter import PairMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.quantities import Scope, meanings, quantities_of
from dynamon.quantities.histograms import histogram_table, read_histograms, reduce_tables
from dynamon.quantities.noise import SOURCES, noise_scale
from dynamon.quantities.primal_norms import reduce_steps, spread
from dynamon.quantities.readings import GradientReadings
from dynamon.quantities.scales import Scale, scaled
from dynamon.quantities.updates import local_smoothness

_GROWN = 1e-2  # a gradient that is longer by so much than it was read was not clipped but changed
_ROUNDING = 1e-4  # the two norms are summed up differently; clipping by less than this is no clipping


class GradientMeter(PairMeter):
    """Reads gradients before clipping, and their norm after it.

    The change since the step before needs two successive steps: gradients and weights are kept at one and compared
    at the next. Where a steering callback reads every step, its readings and its noise are shown, and nothing is
    read twice.

    Args:
        cadence: When.
        with_histograms: Whether to take histograms, every tenth reading.
    """

    name = "gradient"
    panels = chart_layout(quantities_of("gradient"))
    tags = meanings(quantities_of("gradient", scope=Scope.SCALAR))
    quantities = meanings(quantities_of("gradient", scope=Scope.PER_LAYER))
    histograms = meanings(quantities_of("gradient", scope=Scope.HISTOGRAMS))

    def __init__(self, cadence: Cadence, with_histograms: bool = False) -> None:
        """Start with nothing read."""
        super().__init__(cadence)
        self._with_histograms = with_histograms
        self._sources: dict[Optimizer, GradientSource] = {}
        self._read: dict[Optimizer, AwaitedReading] = {}  # on its way to the host until the batch ends
        self._reading = False  # this step is measured
        self._watching = False  # what its gradients are accumulated over is followed
        self._binned: dict[str, Tensor] = {}
        self._used: dict[Optimizer, UsedGradients] = {}  # as the steps take them, clipped
        self._moved: dict[Optimizer, list[Tensor]] = {}  # weights at which a closure ran for the second time
        self._clipped, self._clippable = 0, 0  # measured steps
        self._told: set[str] = set()
        self._saved: dict[str, Any] = {}

    def start(self, run: RunContext) -> None:
        """Have what a reading launches compiled before training."""
        warm_up(run.device, [as_real(to_local(layer.parameter.detach())).dtype for layer in run.all_layers])

    def before_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Keep or read this optimizer's gradients: of a closure that runs twice, those of the second time."""
        watch = run.steps.of(optimizer)
        if not run.steps.has_gradients(optimizer):
            if run.steps.frees_gradients:
                self._say(
                    "gone",
                    "gradients are gone before they can be read (an optimizer that works in backward, or "
                    "zero_grad before the step): gradient/ and noise/ are left out, weights and updates are measured.",
                )
                if self.is_due(run):
                    run.recorder.history.add("gradient/norm", run.step, float("nan"))
            return
        if not watch.is_last:
            return
        reads, keeps = self.is_due(run), self._watching and self.keeps(run)
        self._reading = reads
        source = self._source(run, optimizer, looks=reads or keeps)
        if not source.has_layers:
            return
        source.begin((run.loop.optimizer_steps, run.step, len(watch.outcomes)))
        if watch.is_repeated:
            source.again()
        if reads:
            with run.charge(self.name, waits=run.is_sharded):
                # An optimizer that steps twice in a batch is shown at its last step.
                try:
                    self._used.pop(optimizer, None)
                    self._read[optimizer] = source.read(run, optimizer)
                except Exception as error:  # whatever it was, what was read so far is given up
                    source.give_up()
                    self._reading = not run.ranks.is_collective_failure(error)  # else the others hear of it at the end
                    raise
                self._bin(run, optimizer)
                if keeps:
                    source.keep_weights(run, watch.evaluation > 1)
        elif keeps:
            with run.charge(self.name):
                source.keep(run, optimizer, watch.evaluation > 1)

    def at_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Measure the gradients that were read as they are after clipping."""
        if self._reading and optimizer in self._read and run.steps.of(optimizer).is_last:
            with run.charge(self.name):
                scale = run.loop.gradient_scale(optimizer)
                self._used[optimizer] = UsedGradients(self._read[optimizer], scale)
                if run.steps.of(optimizer).evaluation > 1:
                    self._moved[optimizer] = [
                        to_local(la.parameter).detach().clone() for la in self._read[optimizer].layers
                    ]

    def batch_start(self, run: RunContext, batch: Any) -> None:
        """Follow a window that will be read or kept.

        Of several processes, have each one's own gradients kept at a step that will be read.
        """
        # Where a step may come at any batch, it takes up what came before.
        is_open = not run.loop.knows_windows
        if is_open or begins_window(run.loop):
            self._watching = is_open or self.is_due(run) or self.keeps(run)
        if self._watching:
            run.loop.windows.batch_start(run.loop, batch)
        if compares_ranks(run.loop) and begins_window(run.loop) and self.is_due(run):
            with run.charge(self.name):
                for source in self._all_sources(run):
                    source.watch_ranks()

    def before_backward(self, run: RunContext) -> None:
        """Follow the window."""
        if self._watching:
            run.loop.windows.before_backward(run.loop)

    def after_backward(self, run: RunContext) -> None:
        """Follow the window, and in the middle of one that will be read, keep its first half."""
        if not self._watching:
            return
        windows = run.loop.windows
        windows.after_backward(run.loop)
        if not has_windows(run.loop) or not self.is_due(run):
            return
        for optimizer in run.loop.optimizers:
            share = windows.half(run.loop, optimizer)
            if share is not None:
                source = self._source(run, optimizer)
                if source.has_layers:
                    with run.charge(self.name):
                        source.keep_half(run, share)

    def batch_end(self, run: RunContext) -> None:
        """Hand on what was read in this batch."""
        read, self._read = self._read, {}
        used, self._used = self._used, {}
        reads, self._reading = self._reading, False
        if (reads or self.keeps(run)) and not run.steps.any_taken():
            self._settle(run, read)
            for source in self._sources.values():
                source.forget()  # what was read or kept is of no step
            return
        shown = {o: r for o, r in read.items() if o in run.steps.taken() and self._is_of_step(run, o, r)}
        self._moved = {}
        if reads and (shown or run.ranks.is_distributed):
            with run.together(self.name):
                arrived = {optimizer: awaited.wait() for optimizer, awaited in read.items()}
                self._hand_on(run, [arrived[o] for o in shown], [used.get(o) for o in shown])
            self.done(run)
        else:
            self._settle(run, read)

    def _settle(self, run: RunContext, read: Mapping[Optimizer, AwaitedReading]) -> None:
        """Have what is not shown counted all the same."""
        if read:
            with run.charge(self.name, waits=True):
                for awaited in read.values():
                    awaited.wait()

    def _is_of_step(self, run: RunContext, optimizer: Optimizer, read: AwaitedReading) -> bool:
        """Return whether a step has used the gradients that were read, and no others."""
        times = run.steps.of(optimizer).evaluations
        is_one_of_many = times > 2 or times > 1 and isinstance(optimizer, LBFGS)
        if times == 2 and optimizer in self._moved and not run.ranks.is_distributed:
            # A gradient taken where the step ends has judged it, as in a line search.
            ends = zip(self._moved[optimizer], read.layers, strict=True)
            is_one_of_many = is_one_of_many or all(torch.equal(there, la.parameter.detach()) for there, la in ends)
        if is_one_of_many:
            self._sources[optimizer].forget()
            self._say(
                "many",
                f"{type(optimizer).__name__} evaluates its closure {times} times in a step and uses more than one "
                "gradient: gradient/ and noise/ are left out at such steps, weights and updates are measured.",
            )
        return not is_one_of_many

    def _say(self, key: str, sentence: str) -> None:
        if key not in self._told:
            self._told.add(key)
            rank_zero_info(sentence)

    def is_idle(self, run: RunContext) -> bool:
        """Return False where a window may begin at any batch."""
        return run.loop.knows_windows

    def lapse(self, run: RunContext) -> None:
        """Forget what was kept: steps pass that are not seen."""
        for source in self._sources.values():
            source.forget()

    def _source(self, run: RunContext, optimizer: Optimizer, looks: bool = True) -> GradientSource:
        """The optimizer's source: a new one, with what the old one knew, where its parameters have changed.

        Args:
            run: The run.
            optimizer: The optimizer.
            looks: Whether to look at the parameters, and not only at their number.
        """
        known = self._sources.get(optimizer)
        if known is not None and known.is_complete(run, optimizer, looks):
            return known
        if known is not None:
            known.release()
        source = self._sources[optimizer] = GradientSource(run, optimizer)
        source.load_state_dict(self._saved if known is None else known.state_dict())
        return source

    def _all_sources(self, run: RunContext) -> list[GradientSource]:
        sources = [self._source(run, optimizer) for optimizer in run.loop.optimizers]
        return [source for source in sources if source.has_layers]

    def _bin(self, run: RunContext, optimizer: Optimizer) -> None:
        """Histograms of this optimizer's gradients before they are clipped, still on the device."""
        if not self._with_histograms or self.points % FULL_EVERY:
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = [la for la in run.layers if id(la.parameter) in own]
        dense = {la.name: _here(la, la.parameter.grad) for la in layers if la.parameter.grad is not None}
        if dense:
            scale = run.loop.gradient_scale(optimizer)
            table = histogram_table([scaled(g, scale) for g in dense.values()])
            self._binned |= zip(dense, table, strict=True)

    def _hand_on(self, run: RunContext, read: list[SourceReading], used: Sequence["UsedGradients | None"]) -> None:
        """Put the optimizers' readings together and give them to the recorder."""
        rows, steps = _to_host(run, read, used)
        clipped = _clipped_norm(read, used, rows)
        scalars = self._global(run, [r.readings for r in read], clipped) | _noise_scale(read)
        run.recorder.scalars(scalars, headline=True)
        self._per_layer(run, read, steps)
        binned, self._binned = self._binned, {}
        if binned:
            run.recorder.histograms("gradient/histogram", read_histograms(_table(run, binned)), list(binned))
        if scalars["gradient/nonfinite"] and "nonfinite" not in self._told:
            self._told.add("nonfinite")
            self._warn(run, read)

    def _global(self, run: RunContext, readings: list[GradientReadings], clipped: float | None) -> dict[str, float]:
        norm = _total(readings, "l2", power=2) ** 0.5
        scalars = {
            "gradient/norm": norm,
            "gradient/norm_dual": _total(readings, "dual"),
            "gradient/norm_l1": _total(readings, "l1"),
            "gradient/nonfinite": sum(float(r.nonfinite.sum()) for r in readings),
        }
        if run.loop.reads_before_clipping and clipped is not None:
            coefficient = min(clipped / norm, 1.0) if norm > 0 else 1.0
            self._clippable += bool(np.isfinite(coefficient))
            self._clipped += coefficient < 1 - _ROUNDING
            scalars["gradient/norm_clipped"], scalars["gradient/clip_coefficient"] = clipped, coefficient
            scalars["gradient/clip_share"] = self._clipped / max(self._clippable, 1)
        cosine = _cosine(readings)
        return scalars if cosine is None else {**scalars, "gradient/cosine": cosine}

    def _per_layer(self, run: RunContext, read: list[SourceReading], steps: list[NDArray[Any]]) -> None:
        tables: dict[str, dict[str, float]] = {quantity: {} for quantity in self.quantities}
        for r, norms in zip(read, steps, strict=True):
            found = r.readings
            tables["gradient/l2"] |= r.row(found.l2)
            tables["gradient/dual"] |= r.row(found.dual)
            smoothness = local_smoothness(found.difference_dual, norms)
            tables["gradient/local_smoothness"] |= r.row(smoothness)
            tables["noise/dual"] |= r.row(r.noise)
            tables["noise/independent"] |= r.row(r.independent)
            tables["noise/snr"] |= r.row(r.snr)
        # All layers each time, also those of an optimizer that did not step: rows of a table must line up.
        names = [layer.name for layer in run.layers]
        expected = {"noise/independent"} if any(s.has_independent for s in self._sources.values()) else set()
        for quantity, table in tables.items():
            row = np.array([table.get(name, np.nan) for name in names])
            if np.isfinite(row).any() or quantity in expected:
                run.recorder.layers(quantity, row, names)

    def _warn(self, run: RunContext, read: list[SourceReading]) -> None:
        bad = {la.name: n for r in read for la, n in zip(r.layers, r.readings.nonfinite, strict=True) if n}
        rank_zero_warn(
            f"step {run.step}: the gradient holds {sum(bad.values()):.0f} values that are NaN or infinite, first in "
            f"{next(iter(bad))} ({len(bad)} layers). Usual causes: too large a learning rate, or overflow in half "
            "precision."
        )

    def end(self, run: RunContext) -> None:
        """Stop watching backward passes."""
        self._release()

    def _release(self) -> None:
        for source in self._sources.values():
            source.release()

    def state_dict(self) -> dict[str, Any]:
        """Counts, noise averages and what was kept of the last step, where no steering callback saves it."""
        state = {**super().state_dict(), "clipped": self._clipped, "clippable": self._clippable}
        if not self._sources:
            return {**self._saved, **state}
        parts = [source.state_dict(everywhere=False) for source in self._sources.values()]
        return {
            **state,
            "noise": {name: value for part in parts for name, value in part["noise"].items()},
            "independent": {name: value for part in parts for name, value in part["independent"].items()},
            "signals": {s: {n: v for part in parts for n, v in part["signals"][s].items()} for s in SOURCES},
            "gradients": {
                kept: {n: value for part in parts for n, value in part["gradients"].get(kept, {}).items()}
                for kept in ("previous", "windows")
            },
            "weights": {n: w for part in parts for n, w in part["weights"].items() if self.saves_copies},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until the optimizers are met."""
        super().load_state_dict(state)
        self._release()
        self._sources, self._read, self._binned, self._reading = {}, {}, {}, False
        self._saved = state
        self._clipped, self._clippable = int(state.get("clipped", 0)), int(state.get("clippable", 0))


class UsedGradients:
    """Lengths of the gradients that were read, as the step uses them.

    Args:
        read: What was read of them before.
        scale: Factor on the gradients, for those an AMP scaler has not unscaled yet.

    Attributes:
        present: Whether a layer has a gradient ``[L]``.
        lengths: Euclidean norms ``[L]`` of what is here of them, on the device; zero where there is none.
    """

    def __init__(self, read: AwaitedReading, scale: Scale) -> None:
        """Measure them."""
        gradients = [la.parameter.grad for la in read.layers]
        self.present = np.array([g is not None for g in gradients])
        here = [_here(la, g) for la, g in zip(read.layers, gradients, strict=True) if g is not None]
        lengths = scaled(l2_norms(here).to(read.layers[0].parameter.device), scale)
        self.lengths = spread(lengths, np.flatnonzero(self.present).tolist(), len(gradients), 0.0)


def _to_host(
    run: RunContext, read: Sequence[SourceReading], used: Sequence[UsedGradients | None]
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Reduce the lengths of the gradients that steps used, and the steps measured before; copy them to the host."""
    if not read:
        return [], []
    device = run.device
    unknown = [torch.zeros(len(r.layers), dtype=widest_dtype(device), device=device) for r in read]
    gradients = [none if u is None else u.lengths for u, none in zip(used, unknown, strict=True)]
    holding = holders([layer.parameter for layer in run.all_layers], run.ranks)
    table = reduce_steps([r.steps for r in read], torch.cat(gradients), holding).cpu().numpy()
    lengths, steps = (np.split(row, np.cumsum([len(r.layers) for r in read])[:-1]) for row in table)
    return lengths, steps


def _clipped_norm(
    read: Sequence[SourceReading], used: Sequence[UsedGradients | None], lengths: Sequence[NDArray[Any]]
) -> float | None:
    """The norm of the gradients that steps used; None where they are not those that were read, made smaller."""
    for r, u, row in zip(read, used, lengths, strict=True):
        if u is None or (r.readings.present & ~u.present).any() or (u.present & ~r.readings.present & (row != 0)).any():
            return None
        if (row > r.readings.l2 * (1 + _GROWN)).any():
            return None
    return float(np.sqrt(sum(np.square(row.astype(np.float64)).sum() for row in lengths)))


def _total(readings: Sequence[GradientReadings], field: str, power: int = 1) -> float:
    """The sum over all layers that have a gradient; NaN where none has."""
    sums = [float((getattr(r, field)[r.present] ** power).sum()) for r in readings if r.present.any()]
    return sum(sums) if sums else float("nan")


def _here(layer: Layer, gradient: Tensor | None) -> Tensor:
    """Return what this process holds of a layer's gradient; zeros where there is none."""
    if gradient is None:
        return torch.zeros_like(as_real(to_local(layer.parameter.detach())))
    return to_local_as(_dense(gradient), layer.parameter)


def _table(run: RunContext, binned: Mapping[str, Tensor]) -> Tensor:
    """The table of histograms that was filled before the step, of whole gradients."""
    own = {layer.name: layer.parameter for layer in run.layers}
    return reduce_tables(torch.stack(list(binned.values())), [own[name] for name in binned], run.ranks)


def _noise_scale(read: Sequence[SourceReading]) -> dict[str, float]:
    """Noise over signal of all layers together; left out where no signal stands out, or nothing could be compared."""
    known = [r.signal for r in read if r.signal is not None]
    scale = noise_scale(known) if known and len(known) == len(read) else np.nan
    return {"noise/scale": scale} if np.isfinite(scale) else {}


def _dense(gradient: Tensor) -> Tensor:
    return as_real(gradient.detach().to_dense() if gradient.is_sparse else gradient.detach())


def _cosine(read: Sequence[GradientReadings]) -> float | None:
    """<g, g'> / (|g| |g'|) over all layers that can be compared."""
    inner = now = change = 0.0
    for r in read:
        seen = r.compared
        inner += float(r.inner[seen].sum())
        now += float(np.square(r.l2[seen]).sum())
        change += float(np.square(r.difference_l2[seen]).sum())
    before = change - now + 2 * inner
    return float(np.clip(inner / (now * before) ** 0.5, -1, 1)) if now > 0 and before > 0 else None
