"""A training loop that a user writes, as the engine sees it."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.distributed.dtensor import any_sharded
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.preserve import LossFn, training_loss
from dynamon.monitoring.accumulation import Windows
from dynamon.monitoring.loop import Loop, nothing_to_train, writes_of_unscaling
from dynamon.monitoring.messages import is_first_process
from dynamon.monitoring.planner import Planner
from dynamon.monitoring.row import Row
from dynamon.monitoring.wrappers import averages_gradients, evaluated_model, fabric_scaler, unwrapped_model
from dynamon.monitoring.writers import Writer
from dynamon.optim import several_devices_reason
from dynamon.optim.stepping import has_gradients

_PRECISIONS = {torch.float64: "64-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}
_CALLERS = 16  # between a scaler's step and the hook of an optimizer, wrappers included
_FLATTENING = ("FullyShardedDataParallel", "DeepSpeedEngine")  # classes that hide parameters or gradients


class PlainLoop(Loop):
    """Counts batches and steps of a loop that says when a batch begins and ends.

    One batch is taken for one backward pass. A step is noticed when an optimizer takes it.

    Args:
        model: The model, with whatever wraps it.
        optimizers: The optimizers, unwrapped.
        loss_fn: ``loss_fn(model, batch)``, or None.
        total_steps: Steps of the whole run, or None.
        accumulate: Batches in an accumulation window.
        scaler: The gradient scaler, or None.
        loader: The training loader, or None.
        schedulers: Schedulers of the rates.
        writer: Where to write, or None.
        members: The monitors.

    Attributes:
        metrics: The latest numbers of the whole model, by tag.
        was_announced: Whether the step under way was announced before clipping.
        has_unknown_scaler: Whether a gradient scaler took the first step that the user did not name.
        should_stop: Whether the user's loop is asked to end.
    """

    name = "Watch"
    loss_name = "loss_fn"
    without_writers = "no logdir was given"
    not_taken = "by none of the optimizers that Watch was given"
    never_taken = (
        "no optimizer that Watch was given steps inside of watch.batch. Put optimizer.step() into the block; where you "
        "have replaced the optimizer, make a new Watch."
    )

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        loss_fn: LossFn | None,
        total_steps: int | None,
        accumulate: int,
        scaler: Any,
        loader: Any,
        schedulers: Sequence[Any],
        writer: Writer | None,
        members: Sequence[Any],
    ) -> None:
        """Start before the first batch."""
        self.module, self._outer = unwrapped_model(model), model
        self._model = evaluated_model(model)
        self._optimizers, self._schedulers = list(optimizers), list(schedulers)
        self._loss_fn, self._total_steps, self._accumulate = loss_fn, total_steps, accumulate
        self._scaler = fabric_scaler(model) if scaler is None else scaler
        self._loader, self._members = loader, list(members)
        self._writers = [writer] if writer is not None and is_first_process() else []
        self.windows, self.row, self.planner = Windows(), Row(), Planner()
        self.metrics: dict[str, float] = {}
        self._step = self._steps_taken = self._batches = self._in_window = 0
        self.was_announced = self._is_told = False
        self._has_stepped = self.has_unknown_scaler = self.should_stop = False
        self._handles = [o.register_step_post_hook(self._count_step) for o in self._optimizers]

    def _count_step(self, *_: Any) -> None:
        if not self._steps_taken and self.scaler is None:
            self.has_unknown_scaler = _is_stepped_by_scaler()
        self._steps_taken += 1
        self._has_stepped = True

    def begin_batch(self) -> None:
        """A batch begins."""
        self.was_announced = self._is_told = self._has_stepped = False

    def before_step(self) -> None:
        """Tell all monitors of the backward pass, when a step is about to use its gradients or the batch is over."""
        if not self._is_told:
            self._is_told = True
            if any(has_gradients(optimizer) for optimizer in self._optimizers):
                for member in self._members:
                    member.after_backward()

    def end_batch(self) -> bool:
        """Count a batch that is over; return whether a step was taken in it."""
        self._batches += 1
        self._in_window += 1
        # A scaler that skips a step calls no optimizer, and still ends a window.
        skipped = self.was_announced or self.scaler is not None and self._in_window >= self._accumulate
        if self._has_stepped or skipped:
            self._step, self._in_window = self._step + 1, 0
        return self._has_stepped

    def remove(self) -> None:
        """Detach from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, int]:
        """Return where training is."""
        counts = {"step": self._step, "steps_taken": self._steps_taken, "batches": self._batches}
        return {**counts, "in_window": self._in_window}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there."""
        self._step, self._steps_taken = int(state["step"]), int(state["steps_taken"])
        self._batches, self._in_window = int(state["batches"]), int(state.get("in_window", 0))

    @property
    def step(self) -> int:
        """Batches before this one in which optimizers stepped."""
        return self._step

    @property
    def optimizer_steps(self) -> int:
        """Steps that all optimizers have taken."""
        return self._steps_taken

    @property
    def batch_index(self) -> int:
        """Index of the batch in its epoch where the loader's length is known, else in the run."""
        length = self.batches_per_epoch
        return self._batches if math.isinf(length) else self._batches % int(length)

    @property
    def position(self) -> int:
        """The number of the batch."""
        return self._batches

    @property
    def total_steps(self) -> int | None:
        """Return what the user said."""
        return self._total_steps

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers."""
        return self._optimizers

    @property
    def schedulers(self) -> Sequence[Any]:
        """The schedulers that the user named."""
        return self._schedulers

    @property
    def model(self) -> Any:
        """The model without what DDP and Fabric do in training, in Fabric's precision."""
        return self._model

    @property
    def drives_steps(self) -> bool:
        """False: the user's code does."""
        return False

    @property
    def is_cleared_late(self) -> bool:
        """True: gradients may be cleared after the batch has begun."""
        return True

    @property
    def reads_before_clipping(self) -> bool:
        """Return whether the user said when the clipping begins."""
        return self.was_announced

    @property
    def accumulates(self) -> int:
        """Batches in an accumulation window."""
        return self._accumulate

    def window_position(self) -> tuple[int, int]:
        """Return how many batches of its window are done with this one, and how many it has."""
        return self._in_window + 1, max(self._accumulate, self._in_window + 1)

    @property
    def batches_per_epoch(self) -> float:
        """Length of the loader."""
        try:
            return len(self._loader) or math.inf
        except TypeError:
            return math.inf

    @property
    def loaders(self) -> Iterable[Any]:
        """The loader."""
        return () if self._loader is None else (self._loader,)

    def ranks(self) -> Ranks:
        """Make the group of the processes of a DDP or FSDP2 run, or of this one alone."""
        return Ranks(self.device, alone=not (self.averages_gradients or self.sums_gradients))

    @property
    def world_size(self) -> int:
        """Processes that train."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def processes_on_host(self) -> int:
        """Processes that share the memory of this host, by what the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @property
    def averages_gradients(self) -> bool:
        """Return whether the model is wrapped in ``DistributedDataParallel``."""
        return self.world_size > 1 and averages_gradients(self._outer)

    @property
    def sums_gradients(self) -> bool:
        """Return whether parameters are sharded (FSDP2)."""
        return self.world_size > 1 and any_sharded(list(self.module.parameters()))

    @property
    def strategy(self) -> str:
        """Class of the outermost wrapper."""
        return type(self._outer).__name__

    def off_reason(self) -> str | None:
        """Return why nothing can be measured in this run, in one sentence; None where it can."""
        hiding = [cls.__name__ for m in self._outer.modules() for cls in type(m).__mro__ if cls.__name__ in _FLATTENING]
        if hiding:
            return f"{hiding[0]} hides parameters or gradients, so that layers cannot be told apart. Take fully_shard."
        trained = (p for p in self.module.parameters() if p.requires_grad and not is_lazy(p))
        return nothing_to_train(self.module) or several_devices_reason(trained)

    @property
    def precision(self) -> str:
        """Precision by the dtype of the parameters."""
        dtypes = [p.dtype for p in self.module.parameters()]
        return _PRECISIONS.get(dtypes[0], "32-true") if dtypes else "32-true"

    @property
    def scaler(self) -> Any:
        """The gradient scaler, or None where it is disabled."""
        is_enabled: Callable[[], bool] = getattr(self._scaler, "is_enabled", lambda: True)
        return self._scaler if self._scaler is not None and is_enabled() else None

    def is_scaled(self, optimizer: Optimizer) -> bool:
        """Return whether the scaler has not yet unscaled an optimizer's gradients."""
        return self._stage(optimizer) == "READY"

    def writes_since_backward(self, optimizer: Optimizer) -> int:
        """Return 0: the backward pass counts as over when the step is announced, and unscaling comes before."""
        return 0

    def writes_in_backward(self, optimizer: Optimizer) -> int:
        """Return how often unscaling has written to an optimizer's gradients in this batch."""
        return writes_of_unscaling() if self.scaler is not None and not self.is_scaled(optimizer) else 0

    def _stage(self, optimizer: Optimizer) -> str:
        states = getattr(self.scaler, "_per_optimizer_states", {})
        stage = states[id(optimizer)]["stage"] if id(optimizer) in states else None
        return getattr(stage, "name", "READY")

    def no_loss_reason(self) -> str | None:
        """Return what to do where there is no loss function."""
        if self._loss_fn is not None:
            return None
        return "Watch has no loss function; pass loss_fn=lambda model, batch: ... to have it measured."

    def loss(self, batch: Any, index: int) -> Tensor:
        """Evaluate the user's loss function."""
        return training_loss(self.model, batch, self._loss_fn)

    @property
    def loss_source(self) -> Any:
        """The user's loss function."""
        return self._loss_fn

    def loss_of(self, outputs: Any) -> float | None:
        """Return the loss that the user gave for a batch; None where there was none."""
        if isinstance(outputs, Tensor):
            loss = self.loss_tensor(outputs)
            return None if loss is None else float(loss)
        return None if outputs is None else float(outputs)

    def loss_tensor(self, outputs: Any) -> Tensor | None:
        """Return the same on its device."""
        if not isinstance(outputs, Tensor):
            return None if outputs is None else torch.tensor(float(outputs))
        return outputs.detach() if outputs.numel() == 1 and not outputs.is_complex() else None

    @property
    def writers(self) -> Sequence[Writer]:
        """The folder of event files, on the first process."""
        return self._writers

    @property
    def is_writing(self) -> bool:
        """Return whether this is the first process."""
        return is_first_process()

    def publish(self, headlines: Mapping[str, float]) -> None:
        """Keep them in :attr:`metrics`."""
        self.metrics.update(headlines)

    def request_stop(self) -> None:
        """Set :attr:`should_stop`."""
        self.should_stop = True

    @property
    def members(self) -> Sequence[Any]:
        """The monitors."""
        return self._members


def _is_stepped_by_scaler() -> bool:
    """Return whether an enabled gradient scaler is among the callers."""
    frame = sys._getframe(1)
    for _ in range(_CALLERS):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == "step" and isinstance(scaler := frame.f_locals.get("self"), torch.amp.GradScaler):
            return scaler.is_enabled()
    return False
