"""What monitors and steering have in common, and what they ask of a Trainer."""

from contextlib import suppress
from typing import Any
from weakref import WeakSet, ref

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.board.custom_scalars import Layout, merge_layouts
from dynamon.monitoring.recorder import Row
from dynamon.norms.geometry import geometry_assumption
from dynamon.optim import LayerwiseRates, several_devices_reason
from dynamon.quantities.scales import Scale, inverse_scale

# What FSDP2 (ModelParallelStrategy) does with parameters can be followed, what these do cannot.
_REFUSED = {
    "FSDP": "(FSDP1) flattens parameters, so that layers cannot be told apart: nothing is measured or steered. "
    "ModelParallelStrategy with fully_shard (FSDP2) shards a model of the same size, and dynamon works there.",
    "DeepSpeed": "owns gradients and optimizer states and shows neither: nothing is measured or steered. "
    "ModelParallelStrategy with fully_shard (FSDP2) shards a model of the same size, and dynamon works there.",
}

_told: "WeakSet[Optimizer]" = WeakSet()  # whose geometry was spoken of
_LENT = ("log", "log_dict")  # functions of the module, which a Trainer puts into each callback


class SteeringError(RuntimeError):
    """Steering failed on one of several processes: going on would let their weights part, so this is not caught."""


class DynamonCallback(pl.Callback):
    """What steering and monitors have in common: one of a kind in a Trainer, and a clear word when not.

    Attributes:
        panels: Charts for TensorBoard's Custom Scalars tab.
    """

    panels: Layout = {}

    def __init__(self) -> None:
        """Not checked yet."""
        self._checked = False
        self._stage: str | None = None  # what the Trainer does just now
        self._seen_with: tuple[ref[pl.Trainer], ref[pl.LightningModule]] | None = None  # in the last fit
        self._is_given = False  # whether a state was loaded between two fits, for the next one

    @property
    def failures(self) -> int:
        """What failed so far."""
        return 0

    @property
    def state_key(self) -> str:
        """The class name. Until ``setup`` has seen that there is only one, it is made unique, because
        Lightning's own message about two callbacks with one key does not say what to do.
        """  # noqa: D205
        name = type(self).__qualname__
        return name if self._checked else f"{name}#{id(self)}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this is the right Trainer and the only callback of its kind."""
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(
                f"{type(self).__name__} works with lightning.pytorch, but this Trainer comes from "
                f"{type(trainer).__module__.split('.')[0]}; change its import to 'import lightning.pytorch as pl'."
            )
        twice = [type(c).__name__ for c in callbacks_of(trainer) if isinstance(c, self.one_of_a_kind())]
        if len(twice) > 1:
            raise ValueError(f"the Trainer has {' and '.join(twice)} in callbacks; keep one of them.")
        self._checked, self._stage = True, stage
        if stage == "fit":
            seen, self._seen_with = self._seen_with, (ref(trainer), ref(pl_module))
            goes_on = seen is not None and seen[0]() is trainer and seen[1]() is pl_module and step_of(trainer) > 0
            self.begin_turn(goes_on)
            self._is_given = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The Trainer is done with what it did."""
        self._stage = None

    def begin_turn(self, goes_on: bool) -> None:
        """A fit begins: forget the one before, unless this one goes on from where it ended."""

    def takes_state(self) -> bool:
        """Whether a state that is loaded now concerns training: not where a validation loads a checkpoint's weights."""
        self._is_given = self._is_given or self._stage is None
        return self._stage in ("fit", None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows of no Trainer."""
        mine = {name: value for name, value in self.__dict__.items() if name not in _LENT}
        return {**mine, "_checked": False, "_stage": None, "_seen_with": None}

    def one_of_a_kind(self) -> type | tuple[type, ...]:
        """The classes of which a Trainer may hold one."""
        return type(self)

    def send_row(self, trainer: pl.Trainer) -> None:
        """Write what all dynamon callbacks have measured in this step, once: when the last of them is through."""
        row = Row.of(trainer)
        if not row.is_empty and [c for c in callbacks_of(trainer) if isinstance(c, DynamonCallback)][-1] is self:
            row.send(trainer)

    def send_rest(self, trainer: pl.Trainer) -> None:
        """Write what was measured before an exception, which none of a logger's own may hide."""
        with suppress(Exception):
            self.send_row(trainer)

    def write_layout(self, trainer: pl.Trainer) -> None:
        """Write the charts of all dynamon callbacks, once: the last layout in a run is the one that counts.

        The last callback does, when all of them have found out what they measure.
        """
        ours = [c for c in callbacks_of(trainer) if isinstance(c, DynamonCallback)]
        if ours[-1] is not self or trainer.barebones or not trainer.is_global_zero or is_tryout(trainer):
            return
        layout = merge_layouts(callback.panels for callback in ours)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                try:
                    logger.experiment.add_custom_scalars(layout)
                except Exception as error:
                    rank_zero_warn(f"dynamon's panels could not be written: {error} Training goes on without them.")


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> Scale:
    """What brings gradients to their true size: fused optimizers unscale fp16 ones only in their step.

    Waits for no device: what a scaler knows there stays there, as a tensor.
    """
    given = getattr(optimizer, "grad_scale", None)  # while a scaler steps it, one used by hand too
    if given is not None:
        return given.reciprocal() if isinstance(given, Tensor) else 1.0 / float(given)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return inverse_scale(scaler) if scaler is not None and unscales_in_step(optimizer) else 1.0


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer unscales its gradients in its step, so that they are scaled until then."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def say_geometry(optimizer: Optimizer) -> None:
    """Say once of an optimizer what is assumed of it, where its geometry is a guess."""
    guessed = None if optimizer in _told else geometry_assumption(optimizer)
    _told.add(optimizer)
    if guessed is not None:
        rank_zero_info(guessed)


def step_of(trainer: pl.Trainer) -> int:
    """The x axis of Lightning's own monitors: steps taken; constant from the start of a batch to its end."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The Trainer's callbacks."""
    return list(getattr(trainer, "callbacks", []))


def is_tryout(trainer: pl.Trainer) -> bool:
    """Whether the Trainer only tries its code on a few batches (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def off_reason(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """Why dynamon cannot measure this run at all, in one sentence; None where it can."""
    trained = (p for p in module.parameters() if p.requires_grad and not is_lazy(p))
    return nothing_there(module) or strategy_reason(trainer) or several_devices_reason(trained)


def nothing_there(module: pl.LightningModule) -> str | None:
    """Why there is nothing to measure or to steer in a module; None where there is."""
    if any(p.requires_grad and (is_lazy(p) or p.numel()) for p in module.parameters()):
        return None
    return f"{type(module).__name__} has no trainable parameter, so there is nothing to measure."


def strategy_reason(trainer: pl.Trainer) -> str | None:
    """Why the parameters of a run cannot be told apart, by the class of its strategy or one it derives from."""
    strategy = type(trainer.strategy)
    for cls in strategy.__mro__:
        for word, reason in _REFUSED.items():
            if word in cls.__name__:
                return f"{strategy.__name__} {reason}"
    return None


def is_read_by_callback(trainer: pl.Trainer, rates: LayerwiseRates) -> bool:
    """Whether a steering callback reads an optimizer's gradients, as a monitor does: one of them can read for both.

    An optimizer that steers itself reads when its step begins and knows no windows: a monitor that read for it would
    change what it learns, and so the run.
    """
    return any(
        (find := getattr(c, "rates_for", None)) and find(rates.optimizer) is rates for c in callbacks_of(trainer)
    )
