"""Find where the gradient readings of an optimizer come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import holders, to_local
from dynamon.layers import Layer, is_steerable
from dynamon.layers.complex_pairs import as_real
from dynamon.monitoring.accumulation import compares_independent
from dynamon.monitoring.failures import SteeringError
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.weight_copies import matching, whole_copies
from dynamon.optim import LayerwiseRates, steering_of
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.noise import SOURCES, NoiseEstimator, SignalToNoise
from dynamon.quantities.primal_norms import StepNorms
from dynamon.quantities.readings import GradientReadings, PendingReadings
from dynamon.quantities.scales import Scale
from dynamon.quantities.updates import differences
from dynamon.quantities.windows import Window


@dataclass(frozen=True)
class SourceReading:
    """Hold what was read before an optimizer's step.

    Attributes:
        layers: The L layers.
        readings: Their gradients, on the host.
        noise: Their noise; NaN where this step's gradient could not be compared with one over an alike window.
        independent: Their noise by halves of accumulation windows or by processes, NaN where this step had none.
        snr: Signal to noise of each, by the same where the run has them, else by successive gradients; NaN likewise.
        signal: Signal and noise of the whole gradient, by the same; None where this step had nothing to compare.
        steps: The steps since the gradient before, as far as they are known here; still on the device.
    """

    layers: list[Layer]
    readings: GradientReadings
    noise: NDArray[Any]
    independent: NDArray[Any]
    snr: NDArray[Any]
    signal: SignalToNoise | None
    steps: StepNorms

    def row(self, values: NDArray[Any]) -> dict[str, float]:
        """Numbers ``[L]`` by layer name."""
        return dict(zip([layer.name for layer in self.layers], values.tolist(), strict=True))


class AwaitedReading:
    """A reading on its way to the host, which a step need not wait for.

    Args:
        source: Where it comes from.
        pending: The gradients.
        steps: The steps since the gradient before.

    Attributes:
        layers: The L layers.
    """

    def __init__(self, source: "GradientSource", pending: PendingReadings, steps: StepNorms) -> None:
        """Start before anything has arrived."""
        self._source, self._pending, self._steps = source, pending, steps
        self._found: SourceReading | None = None
        self.layers = source.shown_layers

    def wait(self) -> SourceReading:
        """The reading, once it has arrived; noise and signal know of it from then on."""
        if self._found is None:
            self._found = self._source.arrived(self._pending.wait(), self.layers, self._steps)
        return self._found


class GradientSource:
    """An optimizer's gradients: from a reader of our own, or from the steering's, so that nothing is read twice."""

    def __init__(self, run: RunContext, optimizer: Optimizer) -> None:
        """Find the optimizer's layers and who reads them."""
        self._own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._version = run.layers_version
        layers = [la for la in run.all_layers if id(la.parameter) in self._own]
        rates = steering_of(optimizer)
        reads_all = rates is not None and rates.rule.needs_gradients and all(is_steerable(la) for la in layers)
        self._reader = GradientReader(layers, run.stated.family(optimizer))
        shared = rates is not None and reads_all and run.loop.reads_for_steering(rates)
        self._rates: LayerwiseRates | None = rates if shared and _reads_alike(rates, self._reader) else None
        self._steered = self._rates is not None
        names = [layer.name for layer in layers]
        self._noise, self._independent = NoiseEstimator(names), NoiseEstimator(names, source="independent")
        self._signals = {source: SignalToNoise(names, source=source) for source in SOURCES}
        self._key: tuple[int, int, int] = (-1, -1, -1)
        self.has_independent = compares_independent(run.loop)
        self._shown = "independent" if self.has_independent else "successive"
        self._step = 0
        self._weights: dict[str, Tensor] = {}
        self._kept_at = -1  # the step before which these were the weights
        self._awaited: AwaitedReading | None = None

    @property
    def reader(self) -> GradientReader:
        """Who reads."""
        return self._reader if self._rates is None else self._rates.reader

    @property
    def has_layers(self) -> bool:
        """Return whether the optimizer holds anything that can be measured."""
        return bool(self._reader.layers)

    def is_complete(self, run: RunContext, optimizer: Optimizer, looks: bool) -> bool:
        """Return whether the optimizer holds the parameters it held, by their number, or if asked by a look at them."""
        if len(self._own) != sum(len(group["params"]) for group in optimizer.param_groups):
            return False
        if not looks:
            return True
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return own == self._own and self._version == run.layers_version

    def release(self) -> None:
        """Leave no hook of our own behind."""
        if not self._steered:
            self._reader.forget_ranks()

    def again(self) -> None:
        """The gradients of this step were not those that it uses: forget what was read or kept of them."""
        if not self._steered:  # the steering notices by itself
            self.reader.again()
        self._weights = {}

    def forget(self) -> None:
        """Compare what was read or kept last with nothing."""
        if not self._steered:
            self.reader.forget()
        self._weights = {}

    def begin(self, key: tuple[int, int, int]) -> None:
        """Say that an optimizer step is being taken; the same key twice in a row is the same step.

        Args:
            key: Counts of optimizer steps and of batches that stepped, and the steps in this batch before.
        """
        if key != self._key:
            self._key, self._step = key, self._step + 1
        if not self._steered:
            self.reader.begin(key)

    def keep_half(self, run: RunContext, share: float) -> None:
        """Keep the gradients of a part of the window, for a comparison with the rest of it."""
        self.reader.store_part(share, run.loop.scale_before_step())

    def watch_ranks(self) -> None:
        """Have the gradients of the processes compared at the step to come."""
        self.reader.watch_ranks()

    def give_up(self) -> None:
        """Leave no other process waiting: what is to be read cannot be."""
        if not self._steered:  # the steering reads by itself
            self._reader.give_up_ranks()

    def keep(self, run: RunContext, optimizer: Optimizer, moved: bool = False) -> None:
        """Keep gradients and weights of this step for a comparison at the next, see :meth:`keep_weights`."""
        if not self._steered:  # the steering keeps them itself
            window = run.loop.windows.before_step(run.loop, optimizer)
            self.reader.store(run.loop.gradient_scale(optimizer), window)
        self.keep_weights(run, moved)

    def keep_weights(self, run: RunContext, moved: bool = False) -> None:
        """Keep the weights at which this step's gradients were taken for a comparison at the next.

        Args:
            run: The run.
            moved: Whether the step has moved them since it began, as it does before it evaluates its closure again.
        """
        if moved:
            copies = {la.name: la.parameter.detach().clone() for la in self.reader.layers}
        else:
            copies = run.copies(self.reader.layers)
        self._weights, self._kept_at = {name: to_local(weight) for name, weight in copies.items()}, self._step

    @property
    def shown_layers(self) -> list[Layer]:
        """Return those that are read. The steering knows layers by the names that they had when it met them."""
        named = {id(layer.parameter): layer for layer in self._reader.layers}
        return [named.get(id(layer.parameter), layer) for layer in self.reader.layers]

    def read(self, run: RunContext, optimizer: Optimizer) -> AwaitedReading:
        """Read the gradients, and how far the weights have moved since those before; waits for no device."""
        self.settle()
        windows = run.loop.windows
        window = windows.before_step(run.loop, optimizer)
        self.reader.settle_part(windows.share(run.loop, optimizer, window))
        scale, local_scale = run.loop.gradient_scale(optimizer), run.loop.scale_before_step()
        if self._rates is not None:
            self._observe(run, self._rates, scale, local_scale, window)
        pending = self.reader.read(scale, local_scale=local_scale, window=window)
        self._awaited = AwaitedReading(self, pending, self._measure_steps(run))
        return self._awaited

    def settle(self) -> None:
        """Wait for what was read, so that noise and signal are complete."""
        if self._awaited is not None:
            self._awaited.wait()
            self._awaited = None

    def arrived(self, readings: GradientReadings, layers: list[Layer], steps: StepNorms) -> SourceReading:
        """Count a reading that is on the host; see :class:`SourceReading`."""
        noise = self._noise if self._rates is None else self._rates.rule.noise or self._noise
        if self._rates is None:
            self._noise.update(readings)
        self._independent.update(readings)
        taken = {source: signal.update(readings) for source, signal in self._signals.items()}
        signal, known = self._signals[self._shown], taken[self._shown]
        return SourceReading(
            layers,
            readings,
            noise=noise.shown(readings, noise.values),
            independent=self._independent.shown(readings, self._independent.values),
            snr=signal.shown(readings, signal.ratios),
            signal=signal if known else None,
            steps=steps,
        )

    def _observe(
        self, run: RunContext, rates: LayerwiseRates, scale: Scale, local_scale: Scale, window: Window
    ) -> None:
        try:
            if not rates.is_observed:
                # By the steering callback's key, but for steps it does not hear of.
                rates.observe(scale, self._key if self._key[2] else self._key[:2], local_scale, window)
        except Exception as error:  # whatever it was, it is told as a failure of steering, on all processes
            if run.ranks.is_distributed:
                raise SteeringError(f"reading the gradients for layerwise rates failed: {error}") from error
            raise

    def _measure_steps(self, run: RunContext) -> StepNorms:
        """Measure the steps since the gradients before, of the layers whose weights at those are known."""
        before, self._weights = self._weights, {}
        layers = self.reader.layers
        known = [i for i, la in enumerate(layers) if la.name in before and self._kept_at == self._step - 1]
        now = [to_local(layers[i].parameter) for i in known]
        steps = map(as_real, differences(now, [before[layers[i].name] for i in known]))
        holding = holders([layer.parameter for layer in run.all_layers], run.ranks)
        return StepNorms(layers, self.reader.norms, dict(zip(known, steps, strict=True)), holding)

    def state_dict(self, everywhere: bool = True) -> dict[str, Any]:
        """Noise and the kept gradients, where no steering callback saves them, and the kept weights.

        Args:
            everywhere: False for a checkpoint: of what is sharded, only the first process needs the whole.
        """
        self.settle()
        state: dict[str, Any] = {"noise": {}, "gradients": {"previous": {}}}
        if not self._steered:
            state = {"noise": self._noise.state_dict(), "gradients": self.reader.state_dict(everywhere)}
        signals = {source: signal.state_dict() for source, signal in self._signals.items()}
        state |= {"independent": self._independent.state_dict(), "signals": signals}
        weights = whole_copies(self._weights, self.reader.layers, everywhere) if self._kept_at == self._step else {}
        return {**state, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up; names and shapes that no longer exist are left out."""
        if state and not self._steered:
            self._noise.load_state_dict(state.get("noise", {}))
            self.reader.load_state_dict(state.get("gradients", {"previous": {}}))
        self._independent.load_state_dict(state.get("independent", {}))
        for source, signal in self._signals.items():
            signal.load_state_dict(state.get("signals", {}).get(source, {}))
        self._weights, self._kept_at = matching(self.reader.layers, state.get("weights", {})), self._step


def _reads_alike(rates: LayerwiseRates | None, reader: GradientReader) -> bool:
    """Return whether the steering reads in the norms that are wanted: the user may have stated others here."""
    if rates is None:
        return False
    norms = {id(la.parameter): norm.name for la, norm in zip(rates.reader.layers, rates.reader.norms, strict=True)}
    wanted = zip(reader.layers, reader.norms, strict=True)
    return all(norms.get(id(la.parameter), norm.name) == norm.name for la, norm in wanted)
