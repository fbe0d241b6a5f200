"""Sizes of weights and updates, how updates turn, the spectrum's extremes, and what decay leaves."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from dynamon.board.custom_scalars import chart_layout
from dynamon.distributed.dtensor import to_local
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.decay_follower import DecayFollower, ratios_of
from dynamon.monitoring.failures import PAUSE_AFTER, forget_frames
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.meter import FULL_EVERY
from dynamon.monitoring.pair_meter import PairMeter
from dynamon.monitoring.planner import Plan
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.stored_steps import ROWS, StoredSteps
from dynamon.monitoring.weight_copies import matching, whole_copies
from dynamon.optim import steering_of
from dynamon.quantities import Scope, meanings, quantities_of
from dynamon.quantities.entrywise import entrywise_readings
from dynamon.quantities.histograms import histogram_table, read_histograms, reduce_tables
from dynamon.quantities.updates import joint_cosine
from dynamon.quantities.weight_decay import decay_assumption, decoupled_decay
from dynamon.quantities.weights import (
    ENTRYWISE,
    FIELDS,
    FULL_SPECTRUM,
    guess_seconds,
    layer_spectra,
    warm_up_spectra,
    weight_readings,
)
from dynamon.spectra.convolution import layer_convolution_bounds

_TAGS = (*FIELDS, *(one.tag for one in ENTRYWISE))  # in the order of the rows of a reading
_COMPARED = ("cosine", "last", "previous")  # of the last two steps
_FULL = "full spectra"  # under which their time is booked
_FOR_GUESS = 0.1  # of what is left to spend, for finding out what a first reading takes


class WeightMeter(PairMeter):
    """Copies the weights before a step and the one before it, and measures them, and the steps, afterwards.

    Args:
        cadence: When.
        with_histograms: Whether to take histograms, every tenth reading.
        with_convolutions: Whether to bound the norms of convolutions, every tenth reading.
    """

    name = "weight"
    panels = chart_layout(quantities_of("weight"))
    tags = meanings(quantities_of("weight", scope=Scope.SCALAR))
    histograms = meanings(quantities_of("weight", scope=Scope.HISTOGRAMS))
    quantities = meanings(quantities_of("weight", scope=Scope.PER_LAYER))

    def __init__(self, cadence: Cadence, with_histograms: bool = False, with_convolutions: bool = False) -> None:
        """Start with nothing copied."""
        super().__init__(cadence)
        self._with_histograms, self._with_convolutions = with_histograms, with_convolutions
        self._full = Cadence(None, FULL_EVERY * cadence.unit)  # what is taken along with a reading now and then
        self._full_seconds: float | None = None  # what it took last
        self._full_failures = 0  # in a row
        self._guessed: dict[str, float] = {}  # seconds of a plain reading and of a full one
        self._before: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor] = {}  # before the step that preceded
        self._rates: dict[str, tuple[float, float]] = {}
        self._reading = False  # this step is measured
        self._decay = DecayFollower()
        self._stored = StoredSteps()
        self._layers: list[Layer] = []

    def start(self, run: RunContext) -> None:
        """Take up saved weights of the layers that are there still."""
        for assumed in map(decay_assumption, run.loop.optimizers):
            if assumed is not None:
                rank_zero_info(assumed)
        self._layers = run.layers
        self._earlier = matching(run.layers, self._earlier)
        warm_up_spectra(run.layers)
        run.steps.followers.append(self._decay)
        self._decay.find_names(lambda: run.names, run.read_names)

    def batch_start(self, run: RunContext, batch: Any) -> None:
        """Copy the weights here where they change in backward."""
        if not run.steps.in_backward:
            return
        self._reading = self.is_due(run)
        if not self._before and (self._reading or self.keeps(run)):
            trained = [la for la in run.layers if la.parameter.requires_grad]
            with run.charge(self.name):
                self._before = {name: to_local(weight) for name, weight in run.copies(trained).items()}

    def before_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Copy the weights that this optimizer is about to change."""
        reads, keeps = self.is_due(run), self.keeps(run)
        self._reading = reads
        self._decay.step_begins(optimizer)  # once more, where this meter started after the step had begun
        if run.steps.of(optimizer).is_blind:  # it is taken to step
            self._decay.step_ends(optimizer, None)
        if not reads and not keeps:
            return
        with run.charge(self.name):
            self._layers = run.layers
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            # Where an optimizer steps twice in a batch, its update is that of the batch.
            # What is frozen takes no step, which is another thing than a step of zero.
            trained = [la for la in run.layers if id(la.parameter) in own and la.parameter.requires_grad]
            wanted = [la for la in trained if la.name not in self._before]
            if run.steps.in_backward:  # too late, where it was not known before
                wanted = []
            self._before |= {name: to_local(weight) for name, weight in run.copies(wanted).items()}
            if reads:
                self._rates |= _rates(optimizer, run.names)
                self._stored.before_step(optimizer, run.names)

    def batch_end(self, run: RunContext) -> None:
        """Measure, if weights were copied for that."""
        before, earlier, self._before, self._earlier = self._before, self._earlier, {}, {}
        rates, self._rates = self._rates, {}
        reads, self._reading = self._reading, False
        try:
            self._end(run, before, earlier, rates, reads)
        finally:
            self._stored.forget()

    def _end(
        self,
        run: RunContext,
        before: dict[str, Tensor],
        earlier: dict[str, Tensor],
        rates: Mapping[str, tuple[float, float]],
        reads: bool,
    ) -> None:
        if (reads or self.keeps(run)) and not run.steps.any_taken():  # asked by all processes, or by none
            self._earlier = earlier  # as if there had been no step
            return
        before = self._of_those_taken(run, before)
        if reads and (before or run.ranks.is_distributed):
            with run.together(self.name):
                self._decay.check()
                ratios, decay_ratios = self._ratios(run) if rates else ({}, {})
                steered = {
                    name: (rate * ratios.get(name, 1.0), rate * decay * decay_ratios.get(name, 1.0))
                    for name, (rate, decay) in rates.items()
                }
                self._measure(run, before, earlier, steered)
            if self._full_is_due(run):
                self._try_full(run)
            self.done(run)
        else:
            self._decay.check()
        self._earlier = before if self.keeps(run) else {}

    @staticmethod
    def _of_those_taken(run: RunContext, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights before the step of the layers whose optimizer took one."""
        if not before or run.steps.in_backward:
            return before
        own = {id(p) for o in run.steps.taken() for group in o.param_groups for p in group["params"]}
        return {la.name: before[la.name] for la in run.layers if la.name in before and id(la.parameter) in own}

    def lapse(self, run: RunContext) -> None:
        """Forget what was kept: steps pass that are not seen."""
        self._earlier, self._before = {}, {}

    def plans(self, run: RunContext) -> list[Plan]:
        """Return what the planner has to know, of full spectra too."""
        price, is_off = partial(self._expected_full, run), lambda: self._full_failures >= PAUSE_AFTER
        cadence = self._full if self.cadence.is_planned else self.cadence
        return [*super().plans(run), Plan(_FULL, cadence, price, is_off, rides=True)]

    def expected(self, run: RunContext) -> float | None:
        """Return the mean so far without full spectra; before the first what a part of one matrix takes tells it."""
        return super().expected(run) if self._took else self._guess(run, self.name)

    def _expected_full(self, run: RunContext) -> float | None:
        return self._guess(run, _FULL) if self._full_seconds is None else self._full_seconds

    def _guess(self, run: RunContext, name: str) -> float | None:
        """Time the spectra of a part of one matrix: once, on this process only, and only where something is left."""
        if name not in self._guessed:
            if run.budget.left <= 0:
                return None
            most = run.budget.left * _FOR_GUESS
            with run.charge(name, waits=True), torch.no_grad():
                self._guessed[name] = guess_seconds(run.layers, most, is_full=name == _FULL)
        return self._guessed[name]

    def _full_is_due(self, run: RunContext) -> bool:
        """Return whether this reading brings what is expensive."""
        if self._full_failures >= PAUSE_AFTER:
            return False
        return self._full.is_due(run.step) if self.cadence.is_planned else self.points % FULL_EVERY == 0

    def _try_full(self, run: RunContext) -> None:
        """Take what is dear; where that fails, the plain reading goes on without, and after three times for good."""
        spent = run.budget.spent_on.get(_FULL, 0.0)
        try:
            with run.together(_FULL):
                self._measure_full(run)
            self._full_failures = 0
            self._full_seconds = run.budget.spent_on[_FULL] - spent
            self._full.read(run.step)
        except Exception as error:  # the plain reading is there already, and training goes on
            if run.strict or not run.ranks.is_collective_failure(error):
                raise
            forget_frames(error)
            run.failures += 1
            self._full_failures += 1
            if self._full_failures in (1, PAUSE_AFTER):
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                paused = self._full_failures == PAUSE_AFTER
                after = "They are left out from now on." if paused else "The other weight readings go on."
                rank_zero_warn(f"step {run.step}: full spectra could not be measured: {line} {after}")
        finally:
            self._full.passed(run.step)

    def _ratios(self, run: RunContext) -> tuple[dict[str, float], dict[str, float]]:
        """The factors that steering has on each layer's rate and on its decay, an optimizer's own steering included."""
        on_rate: dict[str, float] = {}
        on_decay: dict[str, float] = {}
        for optimizer in run.loop.optimizers:
            rates = steering_of(optimizer)
            if rates is not None:
                found = ratios_of(rates, run.names)
                on_rate |= found
                on_decay |= found if rates.scale_weight_decay else {}
        return on_rate, on_decay

    def _measure(
        self,
        run: RunContext,
        before: Mapping[str, Tensor],
        earlier: Mapping[str, Tensor],
        rates: Mapping[str, tuple[float, float]],
    ) -> None:
        names = [layer.name for layer in run.layers]
        readings = weight_readings(run.layers, before, earlier, run.ranks)
        memory = self._decay.retention.row(names)
        columns = [getattr(readings, field) for field in FIELDS.values()]
        columns += entrywise_readings(run.layers, ENTRYWISE, run.ranks)
        columns += self._stored.rows(run, before, rates)
        columns += [getattr(readings, field) for field in _COMPARED]
        if memory.device == columns[0].device:
            host = torch.stack([*columns, memory]).cpu().numpy()  # the one copy
        else:  # on the host already
            host = np.concatenate([torch.stack(columns).cpu().numpy(), memory[None].numpy()])
        table = dict(zip(_TAGS, host, strict=False))
        stored, updates, left = np.split(host[len(_TAGS) :], [ROWS, -1])
        precision = self._stored.readings(run, stored, rates)
        self._decay.retention.lost = self._stored.lost_decay
        cosine = joint_cosine(updates)
        if np.isfinite(cosine):
            run.recorder.scalars({"update/cosine": cosine}, headline=True)
        table |= precision | _rate_readings(names, rates, table | precision)
        optional = {"update/layer_cosine": updates[0], "weight/initial_fraction": left[0]}
        for quantity, row in (table | {q: row for q, row in optional.items() if np.isfinite(row).any()}).items():
            run.recorder.layers(quantity, row, names)

    def _measure_full(self, run: RunContext) -> None:
        """Measure what needs all singular values, ranges, histograms, and what convolutions do to whole inputs."""
        for quantity, row in self._stored.ranges(run).items():
            run.recorder.layers(quantity, row, [layer.name for layer in run.layers])
        names, spectra = layer_spectra(run.layers, ranks=run.ranks)
        if spectra is not None:
            table = torch.stack([getattr(spectra, field).float() for field in FULL_SPECTRUM]).cpu().numpy()
            for field, row in zip(FULL_SPECTRUM, table, strict=True):
                run.recorder.layers(f"spectrum/{field}", row, names)
        if self._with_histograms:
            binned = read_histograms(self._binned(run))
            run.recorder.histograms("weight/histogram", binned, [layer.name for layer in run.layers])
        if self._with_convolutions:
            names, bounds = layer_convolution_bounds(run.layers, run.ranks)
            for side, row in zip(("lower", "upper"), bounds.cpu().numpy(), strict=True):
                if names:
                    run.recorder.layers(f"spectrum/convolution_{side}", row, names)

    def _binned(self, run: RunContext) -> Tensor:
        weights = [as_real(to_local(layer.parameter.detach())) for layer in run.layers]
        return reduce_tables(histogram_table(weights), [la.parameter for la in run.layers], run.ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return what decay has left, and where the next step is read, the weights before the last one."""
        earlier = whole_copies(self._earlier, self._layers) if self.saves_copies else {}
        decay = {"memory": self._decay.retention.state_dict(), "lost_decay": dict(self._decay.retention.lost)}
        return {**super().state_dict(), **decay, "earlier": earlier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self._before, self._rates, self._reading = {}, {}, False
        self._decay.retention.load_state_dict(state.get("memory", {}))
        self._decay.retention.lost = dict(state.get("lost_decay", {}))
        self._earlier = dict(state.get("earlier", {}))
        if self._layers:  # in the middle of a run
            self._earlier = matching(self._layers, self._earlier)


def _rates(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, tuple[float, float]]:
    """Learning rate and decoupled decay by layer, before a scheduler moves on."""
    return {
        names[id(p)]: (float(group.get("lr", np.nan)), float(decoupled_decay(optimizer, group)))
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names and p.requires_grad
    }


def _rate_readings(
    names: Sequence[str], rates: Mapping[str, tuple[float, float]], table: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Learning rate, and rate x decay as far as the weights hold it, of each layer against its norms."""
    rate, shrink = np.array([rates.get(name, (np.nan, np.nan)) for name in names]).T
    lost = table.get("precision/decay_lost", np.zeros(len(names)))
    shrink = shrink * (1 - np.nan_to_num(lost))  # what rounding takes of the decay balances no step
    size, step = table["weight/frobenius"].astype(np.float64), table["update/operator"].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        usage = shrink * table["weight/operator"] / step
        return {
            "weight/effective_rate": np.where(size > 0, rate / np.square(size), np.nan),
            "weight/constraint_usage": np.where((shrink > 0) & (step > 0), usage, np.nan),
        }
