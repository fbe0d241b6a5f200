"""The protocol through which monitors see a training loop, whoever runs it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.distributed.ranks import Ranks
from dynamon.optim import LayerwiseRates
from dynamon.quantities.scales import Scale, inverse_scale

if TYPE_CHECKING:
    from dynamon.monitoring.accumulation import Windows
    from dynamon.monitoring.meter import Meter
    from dynamon.monitoring.planner import Planner
    from dynamon.monitoring.row import Row
    from dynamon.monitoring.writers import Writer


class Loop(ABC):
    """A training loop as monitors see it: where training is, what it trains, and where readings go.

    Nothing else of the loop is known to meters, budget and recorder. An adapter implements it: one for Lightning's
    Trainer (``dynamon.callbacks.lightning``), one for loops that you write yourself (:class:`dynamon.Watch`).
    Properties are asked for at every hook, so they must be cheap and must not wait for a device.

    Attributes:
        name: How messages call the loop.
        loss_name: How they call the function behind :meth:`loss`.
        module: The module that is trained. Layers have the names of its parameters.
        windows: Follows what gradients are accumulated over, for all monitors of the loop.
        row: Collects what all monitors of the loop have measured at one step.
        planner: Decides when all monitors of the loop measure.
        without_writers: What to say where there is nothing to write to.
        not_taken: Why a step may not have been taken, where no gradient scaler skipped it.
        never_taken: The same where none ever is, and what to look at.
    """

    name = "the training loop"
    loss_name = "training_step"
    module: nn.Module
    windows: "Windows"
    row: "Row"
    planner: "Planner"
    without_writers = "there is nothing to write to"
    not_taken = "by a gradient scaler that looks for its scale or by the module"
    never_taken = (
        "the module takes none. Look whether its optimizer_step hands the closure on, optimizer.step(closure=closure), "
        "and whether gradients are still there when it does; in manual optimisation, whether step() is called."
    )

    # Where training is

    @property
    @abstractmethod
    def step(self) -> int:
        """Batches before this one in which optimizers stepped, the x axis; constant from a batch's start to its end."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Steps that all optimizers have taken; tells two steps in one batch apart."""

    @property
    @abstractmethod
    def batch_index(self) -> int:
        """Index of the batch in its epoch."""

    @property
    @abstractmethod
    def position(self) -> Hashable:
        """Return what tells this batch from every other one."""

    @property
    def total_steps(self) -> int | None:
        """Value of :attr:`step` at which training will end; None where that is not known."""
        return None

    @property
    def is_trial(self) -> bool:
        """Return whether a few batches are tried out only, so that everything is measured at once."""
        return False

    @property
    def is_barebones(self) -> bool:
        """Return whether nothing may be measured or written, because the loop is being timed."""
        return False

    # What is trained

    @property
    @abstractmethod
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers, always in the same order."""

    @property
    def schedulers(self) -> Sequence[Any]:
        """The schedulers of their rates, as far as the loop knows them."""
        return ()

    @property
    def device(self) -> torch.device:
        """Return where the module is."""
        found = next(self.module.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    @property
    def model(self) -> Any:
        """The module, or what stands for it; loss functions are called with it."""
        return self.module

    # Which batches belong to a step

    @property
    @abstractmethod
    def drives_steps(self) -> bool:
        """Return whether the loop runs backward passes and steps itself, and announces each step before it clips."""

    @property
    def knows_windows(self) -> bool:
        """Return whether it is known before a batch which batches' gradients are accumulated with its own."""
        return True

    @property
    @abstractmethod
    def reads_before_clipping(self) -> bool:
        """Return whether the step under way was announced before its gradients were clipped."""

    def clipped(self, gradient: Tensor) -> Tensor:
        """Return a flat gradient as the loop clips it before a step; as it is where that is not known."""
        return gradient

    @property
    def accumulates(self) -> int:
        """Batches in an accumulation window, at present."""
        return 1

    @property
    def longest_window(self) -> int:
        """Most batches in an accumulation window of this run."""
        return self.accumulates

    @property
    def batches_per_epoch(self) -> float:
        """Batches in an epoch; infinite where that is not known."""
        return math.inf

    def window_position(self) -> tuple[int, int]:
        """Return how many batches of its window are done with this one, and how many it has."""
        begin = self.batch_index // self.accumulates * self.accumulates
        return self.batch_index - begin + 1, int(min(self.accumulates, self.batches_per_epoch - begin))

    @property
    def loaders(self) -> Iterable[Any]:
        """The training loaders, whose batch size says what a sample is; empty where none is known."""
        return ()

    @property
    def loader_key(self) -> tuple[Any, ...]:
        """Return what changes when the loaders do."""
        return ()

    @property
    def is_cleared_late(self) -> bool:
        """Return whether gradients of the last step may be cleared only after a backward pass was said to begin."""
        return False

    @property
    def repeats_batches(self) -> bool:
        """Return whether training is limited to a few batches of a loader on purpose, the same in every epoch."""
        return False

    # Processes

    @abstractmethod
    def ranks(self) -> Ranks:
        """Make the group of processes that measure together, or of this process alone."""

    @property
    def world_size(self) -> int:
        """Processes that train."""
        return 1

    @property
    def processes_on_host(self) -> int:
        """Processes that share the memory of this host."""
        return 1

    @property
    def averages_gradients(self) -> bool:
        """Return whether each of several processes has gradients of its own before they are averaged (DDP)."""
        return False

    @property
    def sums_gradients(self) -> bool:
        """Return whether gradients are summed over the processes in each backward pass, and kept in parts (FSDP2)."""
        return False

    @property
    def strategy(self) -> str:
        """Return how messages call the way in which processes share the work."""
        return type(self).__name__

    def off_reason(self) -> str | None:
        """Return why nothing can be measured in this run, in one sentence; None where it can."""
        return None

    # Precision

    @property
    def precision(self) -> str:
        """Precision of training, as Lightning writes it (``"32-true"``, ``"bf16-mixed"``)."""
        return "32-true"

    @property
    def scaler(self) -> Any:
        """The gradient scaler, or None."""
        return None

    def gradient_scale(self, optimizer: Optimizer) -> Scale:
        """Return the factor that brings an optimizer's gradients to their true size as a step begins.

        Waits for no device: what a scaler knows there stays there, as a tensor.
        """
        given = getattr(optimizer, "grad_scale", None)  # while a scaler steps it, one used by hand too
        if given is not None:
            return given.reciprocal() if isinstance(given, Tensor) else 1.0 / float(given)
        return inverse_scale(self.scaler) if self.scaler is not None and self.is_scaled(optimizer) else 1.0

    def is_scaled(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer's gradients are still multiplied by the scaler's factor as a step begins."""
        return unscales_in_step(optimizer)

    def scale_before_step(self) -> Scale:
        """Return the same factor for gradients that nothing has unscaled yet."""
        return 1.0 if self.scaler is None else inverse_scale(self.scaler)

    def writes_since_backward(self, optimizer: Optimizer) -> int:
        """Return how often unscaling has written to an optimizer's gradients since the last backward pass."""
        given = getattr(optimizer, "grad_scale", None)
        is_unscaled = self.scaler is not None and given is None and not self.is_scaled(optimizer)
        return writes_of_unscaling() if is_unscaled else 0

    def writes_in_backward(self, optimizer: Optimizer) -> int:
        """Return how often unscaling has written to them in what counts as the last backward pass."""
        return 0

    def before_step(self) -> None:
        """Do what the loop owes the monitors before a step begins."""

    # What monitors cost by being there

    def call_seconds(self, member: Any) -> float:
        """Return the seconds per batch that the loop takes to call a monitor, beside what the monitor does then."""
        return 0.0

    @property
    def batches_seen(self) -> int:
        """Batches of this run so far; asked for only where :meth:`call_seconds` is not zero."""
        return 0

    # The loss

    def no_loss_reason(self) -> str | None:
        """Return why :meth:`loss` cannot be evaluated once more, in one sentence; None where it can."""
        return None

    @abstractmethod
    def loss(self, batch: Any, index: int) -> Tensor:
        """Evaluate the training loss of a batch. Inside of :meth:`evaluation` only."""

    @property
    def loss_source(self) -> Any:
        """The function behind :meth:`loss`, whose surroundings are searched for side effects; None where trusted."""
        return None

    def evaluation(self) -> AbstractContextManager[Any]:
        """Return the context in which the loss is evaluated: precision as in training, loggers silent."""
        return nullcontext()

    def loss_of(self, outputs: Any) -> float | None:
        """Return the loss of the batch that is over; None where there was none. Waits for the device.

        Args:
            outputs: What the loop gave to :meth:`dynamon.monitoring.monitor.Monitor.batch_end`.
        """
        return None

    def loss_tensor(self, outputs: Any) -> Tensor | None:
        """Return a constant multiple of that loss as it is, on its device, without waiting; None where there was none.

        Args:
            outputs: As for :meth:`loss_of`.
        """
        return None

    # Where to write

    @property
    def writers(self) -> Sequence["Writer"]:
        """Return what rows are written to."""
        return ()

    @property
    def is_writing(self) -> bool:
        """Return whether this process writes."""
        return True

    def publish(self, headlines: Mapping[str, float]) -> None:
        """Hand the numbers of the whole model to others in the loop, who may watch them."""

    def request_stop(self) -> None:
        """Ask for the end of training after the present batch; every process calls it at the same batch."""

    # Who else is there

    @property
    @abstractmethod
    def members(self) -> Sequence[Any]:
        """Return what measures or steers in this loop, with a ``history``, ``failures`` and ``panels`` each."""

    def reads_for_steering(self, rates: LayerwiseRates) -> bool:
        """Return whether the loop reads gradients for an optimizer's layerwise rates, so that monitors need not."""
        return False

    def warnings_of(self, monitor: str, meters: Iterable["Meter"]) -> list[str]:
        """Return what to say of others in the loop that watch a tag which may be missing."""
        return []


def nothing_to_train(module: nn.Module) -> str | None:
    """Return why there is nothing to measure or to steer in a module; None where there is."""
    if any(p.requires_grad and (is_lazy(p) or p.numel()) for p in module.parameters()):
        return None
    return f"{type(module).__name__} has no trainable parameter, so there is nothing to measure."


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Return whether an optimizer unscales its gradients in its step, so that they are scaled until then."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@cache
def writes_of_unscaling() -> int:
    """Return by how much unscaling raises a gradient's version, which is up to torch."""
    gradient = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([gradient], torch.zeros(1), torch.ones(1))
    return gradient._version
