"""Tell a meter what it may know of the run that it measures."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import any_sharded
from dynamon.layers import Layer
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.failures import forget_frames
from dynamon.monitoring.layer_set import LayerSet
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.recorder import Recorder
from dynamon.monitoring.stated import Stated
from dynamon.monitoring.stepping import Steps
from dynamon.monitoring.weight_copies import copied


class RunContext:
    """Tells a meter what it may know of the run it measures.

    Attributes:
        loop: The training loop.
        module: The module that it trains.
        budget: Times measurements.
        recorder: Takes readings.
        patterns: Globs for what has readings of its own; None for all.
        ranks: The processes that measure together, this one alone where there is no other.
        planner: When all monitors of the loop measure.
        steps: Which optimizers really step.
        stated: What the user states of layers and optimizers.
        begun_at: The step at which this fit began.
        unsettled: What went wrong in a meter on this process and has yet to be said to the others, by its name.
    """

    def __init__(
        self,
        loop: Loop,
        budget: Budget,
        recorder: Recorder,
        patterns: Sequence[str] | None = None,
        stated: Stated | None = None,
    ) -> None:
        """Remember them, and read the layers."""
        self.loop, self.module, self.budget, self.recorder = loop, loop.module, budget, recorder
        self.stated = Stated() if stated is None else stated
        self.patterns = patterns
        self._set = LayerSet(loop.module, patterns, self.stated.roles)
        self.ranks, self.planner = loop.ranks(), loop.planner
        self.steps = Steps(loop, self.ranks, budget.waiting)
        self.begun_at = self.step
        self.unsettled: dict[str, Exception] = {}
        self._copies: dict[str, Tensor] = {}
        self._copied_at = (-1, -1)

    @property
    def all_layers(self) -> list[Layer]:
        """Every layer of the module that can be measured, as they are now."""
        return self._set.every

    @property
    def layers(self) -> list[Layer]:
        """Return those that per-layer readings are wanted for."""
        return self._set.chosen

    @property
    def names(self) -> dict[int, str]:
        """Names of all layers by the ``id`` of their parameter, as they were when they were looked at last."""
        return self._set.names

    @property
    def layers_version(self) -> int:
        """A number that changes whenever the layers do."""
        return self._set.version

    def read_names(self) -> dict[int, str]:
        """Read the layers again, also where no hook is under way, and return their names."""
        self._set.hook()
        return {} if not self._set.every else self._set.names

    def hook(self, optimizer: Optimizer | None = None) -> None:
        """A hook begins: what is measured in it and after it looks at the layers once more."""
        self._set.hook(optimizer)

    @property
    def step(self) -> int:
        """The x axis; constant from the start of a batch to its end."""
        return self.loop.step

    @property
    def device(self) -> torch.device:
        """Return where the module is."""
        return self.loop.device

    @property
    def is_sharded(self) -> bool:
        """Return whether processes hold parameters in parts (FSDP2), so that every measurement takes all of them."""
        return any_sharded([layer.parameter for layer in self.all_layers])

    @property
    def trying_out(self) -> bool:
        """Return whether a few batches are tried out only, so that everything is measured at once."""
        return self.loop.is_trial

    def go_back(self) -> None:
        """Training goes on from an earlier step."""
        self.begun_at = min(self.begun_at, self.step)
        self.unsettled.clear()
        self.forget_copies()

    @property
    def seconds_per_step(self) -> float:
        """Mean training time of a step, measurements not counted."""
        return self.budget.training / max(self.steps_seen, 1)

    steps_seen = 0  # optimizer steps since training began
    failures = 0  # of single quantities in measurements that went on without them
    strict = False  # whether a failure is to be raised

    def copies(self, layers: Iterable[Layer]) -> dict[str, Tensor]:
        """Weights by layer name as they are before this optimizer step, copied once whoever asks; not to be written."""
        step = self.loop.optimizer_steps, self.step
        if step != self._copied_at:
            self._copies, self._copied_at = {}, step
        own = {layer.name: layer.parameter for layer in layers}
        self._copies |= copied({name: p.detach() for name, p in own.items() if name not in self._copies})
        return {name: self._copies[name] for name in own}

    def forget_copies(self) -> None:
        """Leave the copies to those who hold them."""
        self._copies, self._copied_at = {}, (-1, -1)

    @contextmanager
    def charge(self, name: str, waits: bool = False) -> Iterator[None]:
        """Book the time inside to a measurement; ``waits`` where the host reads something of the device in it."""
        with self.budget.charge(name, self.device, waits):
            yield

    @contextmanager
    def untold(self, name: str) -> Iterator[None]:
        """Go on after what only this process has met, to where all measure: it is raised there, see :meth:`together`.

        A process alone raises it at once.
        """
        try:
            yield
        except Exception as error:  # whatever it was, the others have not heard of it
            if not self.ranks.is_distributed:
                raise
            self.keep_untold(name, error)

    def keep_untold(self, name: str, error: Exception) -> None:
        """Keep what the others have not heard of for the next measurement of all."""
        forget_frames(error)  # until then they would hold the graph of a measurement
        self.unsettled.setdefault(name, error)

    @contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Book the time of a measurement that succeeds on all processes, or on none."""
        with self.charge(name, waits=True), self.ranks.collective_section():
            if name in self.unsettled:
                raise self.unsettled.pop(name)
            yield
