"""Gradient norms, gradient noise and clipping."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from dynamon.callbacks.base import gradient_scale
from dynamon.callbacks.layerwise_lr import steering_of
from dynamon.callbacks.meter import Cadence, Meter, Run
from dynamon.callbacks.monitor import Monitor, check_arguments
from dynamon.gradients import Array, GradientReader, GradientReadings
from dynamon.layers import describe_layers
from dynamon.noise import NoiseEstimator
from dynamon.norms import optimizer_family
from dynamon.optim import LayerwiseRates
from dynamon.panels import GRADIENTS


class GradientMeter(Meter):
    """Reads gradients before clipping, and their norm after it.

    The change since the step before needs two successive steps: gradients are kept at one and read at the
    next. Where a steering callback reads every step, its readings and its noise are shown, and nothing is
    read twice.
    """

    name = "gradient"
    panels = GRADIENTS
    tags = {
        "gradient/norm": "l2 norm of all gradients before clipping",
        "gradient/norm_clipped": "the same after clipping (automatic optimisation)",
        "gradient/clip_coefficient": "after over before; 1 where nothing was clipped",
        "gradient/norm_dual": "sum of the layers' dual norms",
        "gradient/cosine": "cosine between this gradient and the one a step before",
        "gradient/nonfinite": "entries that are NaN or infinite",
    }
    quantities = {
        "gradient/l2": "l2 norm of the layer's gradient",
        "gradient/dual": "its dual norm, in the norm that fits optimizer and role",
        "noise/dual": "noise sqrt(H) in that dual norm",
    }

    def __init__(self, cadence: Cadence) -> None:
        """Nothing read yet."""
        super().__init__(cadence)
        self._sources: dict[Optimizer, _Source] = {}
        self._read: dict[Optimizer, tuple[_Source, GradientReadings]] = {}
        self._kept = False  # gradients of this step were kept without being read
        self._armed = False  # those of the step before were, so this step can be compared with it
        self._warned = False
        self._saved: dict[str, Any] = {}

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Keep or read this optimizer's gradients."""
        source = self._source(run, optimizer)
        source.begin((run.trainer.global_step, run.step))
        if self._due(run, source):
            with run.charge(self.name):
                # An optimizer that steps twice in a batch is shown at its last step.
                self._read[optimizer] = (source, source.read(gradient_scale(run.trainer, optimizer)))
        elif not source.steered and self._due_next(run):
            with run.charge(self.name):
                source.reader.store(gradient_scale(run.trainer, optimizer))
                self._kept = True

    def batch_end(self, run: Run) -> None:
        """Hand on what was read in this batch."""
        read, kept, self._read, self._kept = list(self._read.values()), self._kept, {}, False
        if read:
            with run.charge(self.name):
                self._hand_on(run, read)
            self.done(run)
        if self.cadence.every_n_steps is None:
            self._armed = kept or (bool(read) and self._planned(run, run.step + 1))

    def _due(self, run: Run, source: "_Source") -> bool:
        if self.cadence.every_n_steps is not None or source.steered or run.trying_out:
            return self._planned(run, run.step)
        return self._armed

    def _due_next(self, run: Run) -> bool:
        """Whether the next step will be read, so that this one's gradients are needed then."""
        fixed = self.cadence.every_n_steps is not None
        return self._planned(run, run.step + 1 if fixed else run.step)

    def _planned(self, run: Run, step: int) -> bool:
        return self.cadence.due(run, self.name, self.expected(run), step)

    def _source(self, run: Run, optimizer: Optimizer) -> "_Source":
        known = self._sources.get(optimizer)
        if known is not None and known.is_complete(optimizer):
            return known
        source = self._sources[optimizer] = _Source(run, optimizer)
        source.load_state_dict(self._saved if known is None else known.state_dict())
        return source

    def _hand_on(self, run: Run, read: list[tuple["_Source", GradientReadings]]) -> None:
        """Put the optimizers' readings together and give them to the recorder."""
        squares = sum(float(np.square(r.l2).sum()) for _, r in read)
        nonfinite = sum(float(r.nonfinite.sum()) for _, r in read)
        scalars = {
            "gradient/norm": squares**0.5,
            "gradient/norm_dual": sum(float(r.dual.sum()) for _, r in read),
            "gradient/nonfinite": nonfinite,
        }
        if run.module.automatic_optimization:  # by hand, gradients may be gone or stale by now
            clipped = _l2([layer.parameter.grad for source, _ in read for layer in source.reader.layers])
            scalars["gradient/norm_clipped"] = clipped
            scalars["gradient/clip_coefficient"] = min(clipped / squares**0.5, 1.0) if squares > 0 else 1.0
        cosine = _cosine([r for _, r in read])
        if cosine is not None:
            scalars["gradient/cosine"] = cosine
        run.recorder.scalars(scalars, headline=True)
        for quantity, values in (
            ("gradient/l2", [np.where(r.present, r.l2, np.nan) for _, r in read]),
            ("gradient/dual", [np.where(r.present, r.dual, np.nan) for _, r in read]),
            ("noise/dual", [source.noise_values() for source, _ in read]),
        ):
            by_name = {
                layer.name: value
                for (source, _), row in zip(read, values, strict=True)
                for layer, value in zip(source.reader.layers, row, strict=True)
            }
            # All layers each time, also those of an optimizer that did not step: rows of a table must line up.
            names = [layer.name for layer in run.layers]
            row = np.array([by_name.get(name, np.nan) for name in names])
            if np.isfinite(row).any():
                run.recorder.layers(quantity, row, names)
        if nonfinite and not self._warned:
            self._warned = True
            bad = [la.name for s, r in read for la, n in zip(s.reader.layers, r.nonfinite, strict=True) if n]
            rank_zero_warn(
                f"step {run.step}: the gradient holds {nonfinite:.0f} values that are NaN or infinite, first in "
                f"{bad[0]} ({len(bad)} layers). Usual causes: too large a learning rate, or overflow in half precision."
            )

    def state_dict(self) -> dict[str, Any]:
        """Noise averages and the kept gradients, where no steering callback saves them."""
        state: dict[str, Any] = {"noise": {}, "gradients": {"previous": {}}, "armed": self._armed}
        for source in self._sources.values():
            own = source.state_dict()
            state["noise"].update(own["noise"])
            state["gradients"]["previous"].update(own["gradients"]["previous"])
        return state if self._sources else {**state, **self._saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until the optimizers are met."""
        self._saved = state
        self._armed = bool(state.get("armed", False))


class _Source:
    """Where an optimizer's readings come from: a reader of our own, or the steering's."""

    def __init__(self, run: Run, optimizer: Optimizer) -> None:
        rates = steering_of(run.trainer, optimizer)
        self._rates: LayerwiseRates | None = rates if rates is not None and rates.rule.needs_gradients else None
        self.steered = self._rates is not None
        self._own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = [la for la in describe_layers(run.module) if id(la.parameter) in self._own]
        self._reader = GradientReader(layers, optimizer_family(optimizer))
        self.noise = NoiseEstimator([layer.name for layer in layers])
        self._key: Hashable = None

    @property
    def reader(self) -> GradientReader:
        return self._reader if self._rates is None else self._rates.reader

    def is_complete(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer still holds the parameters it held."""
        return len(self._own) == sum(len(group["params"]) for group in optimizer.param_groups)

    def begin(self, key: tuple[int, int]) -> None:
        self._key = key
        if not self.steered:
            self.reader.begin(key)

    def read(self, scale: float) -> GradientReadings:
        if self._rates is not None:
            self._rates.observe(scale, self._key)
            return self.reader.read(scale).wait()
        readings = self.reader.read(scale).wait()
        self.noise.update(readings)
        return readings

    def noise_values(self) -> Array:
        if self._rates is not None and self._rates.rule.noise is not None:
            return self._rates.rule.noise.values
        return self.noise.values

    def state_dict(self) -> dict[str, Any]:
        if self.steered:  # saved by the steering callback
            return {"noise": {}, "gradients": {"previous": {}}}
        return {"noise": self.noise.state_dict(), "gradients": self.reader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and not self.steered:
            self.noise.load_state_dict(state["noise"])
            self.reader.load_state_dict(state["gradients"])


def _l2(gradients: Sequence[torch.Tensor | None]) -> float:
    dense = [g.detach().coalesce().values() if g.is_sparse else g.detach() for g in gradients if g is not None]
    if not dense:
        return 0.0
    wide = torch.float64 if any(g.dtype == torch.float64 for g in dense) else torch.float32
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense, 2, dtype=wide))))


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


class GradientMonitor(Monitor):
    """Gradient norms by layer and as a whole, gradient noise, and what clipping does.

    Gradients are read accumulated, reduced, unscaled and before clipping; the clipped norm is read after the
    step. Dual norms are those of the optimizer's geometry and the layer's role
    (:func:`dynamon.norms.update_norm`): the sum of magnitudes under Adam, the Frobenius norm under SGD.

    Tags (headlines are also in ``trainer.callback_metrics``):

    ================================  ====================================================
    tag                               what it is
    ================================  ====================================================
    ``gradient/norm``                 l2 norm of all gradients before clipping
    ``gradient/norm_clipped``         the same after clipping (automatic optimisation)
    ``gradient/clip_coefficient``     after over before; 1 where nothing was clipped
    ``gradient/norm_dual``            sum of the layers' dual norms
    ``gradient/cosine``               cosine between this gradient and the one a step before
    ``gradient/nonfinite``            entries that are NaN or infinite
    ``gradient/l2``                   per layer: l2 norm
    ``gradient/dual``                 per layer: dual norm
    ``noise/dual``                    per layer: noise sqrt(H) in the dual norm
    ``dynamon/overhead``              time of monitoring over training time without it
    ``dynamon/failures``              measurements that failed so far
    ================================  ====================================================

    A per-layer quantity ``a/b`` is written as the quantiles ``a/b_p10``, ``a/b_median``, ``a/b_p90``, as
    ``a.b/<layer>`` for each layer while that makes at most 400 tags in all, and as one tensor summary
    ``a/b/layers``.

    Args:
        every_n_steps: Measure at every step that is a multiple of this. None: as often as ``budget`` allows,
            every fourth step at most.
        budget: Share of training time that monitoring may take; used when ``every_n_steps`` is None.
        layers: Globs for the layers shown one by one, ``!`` excludes: ``["blocks.*", "!*.bias"]``.
        loggers: Loggers to write to by part of the class name (``["tensorboard"]``); None for all.
        strict: Raise where a measurement fails, instead of warning and going on.

    Raises:
        ValueError: On an argument out of range, at construction; on globs or loggers that match nothing, when
            fit starts.

    Cost: a few passes over the gradients and one copy of them; one copy of a small table to the host.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        budget: float | None = 0.02,
        layers: Sequence[str] | None = None,
        loggers: Sequence[str] | None = None,
        strict: bool = False,
    ) -> None:
        """Check the arguments."""
        check_arguments(every_n_steps, budget, layers=layers, loggers=loggers)
        super().__init__(partial(_meters, every_n_steps), budget, layers, loggers, strict)


def _meters(every_n_steps: int | None) -> list[Meter]:
    return [GradientMeter(Cadence(every_n_steps, interval=4, share=1.0))]
