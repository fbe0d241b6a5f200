"""What monitors and steering have in common, and what they ask of a Trainer."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from dynamon.callbacks.recorder import Row
from dynamon.panels import Layout, combined

# What FSDP2 (ModelParallelStrategy) does with parameters can be followed, what these do cannot.
_REFUSED = {
    "FSDP": "(FSDP1) flattens parameters, so that layers cannot be told apart: nothing is measured or steered. "
    "ModelParallelStrategy with fully_shard (FSDP2) shards a model of the same size, and dynamon works there.",
    "DeepSpeed": "owns gradients and optimizer states and shows neither: nothing is measured or steered. "
    "ModelParallelStrategy with fully_shard (FSDP2) shards a model of the same size, and dynamon works there.",
}


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
        self._checked = True

    def one_of_a_kind(self) -> type | tuple[type, ...]:
        """The classes of which a Trainer may hold one."""
        return type(self)

    def send_row(self, trainer: pl.Trainer) -> None:
        """Write what all dynamon callbacks have measured in this step, once: when the last of them is through."""
        row = Row.of(trainer)
        if not row.is_empty and [c for c in callbacks_of(trainer) if isinstance(c, DynamonCallback)][-1] is self:
            row.send(trainer)

    def write_layout(self, trainer: pl.Trainer) -> None:
        """Write the charts of all dynamon callbacks, once: the last layout in a run is the one that counts."""
        ours = [c for c in callbacks_of(trainer) if isinstance(c, DynamonCallback)]
        if ours[0] is not self or not trainer.is_global_zero or is_tryout(trainer):
            return
        layout = combined(callback.panels for callback in ours)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                try:
                    logger.experiment.add_custom_scalars(layout)
                except Exception as error:
                    rank_zero_warn(f"dynamon's panels could not be written: {error} Training goes on without them.")


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """What brings gradients to their true size: fused optimizers unscale fp16 ones only in their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return 1.0 / float(scaler.get_scale())


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The Trainer's callbacks."""
    return list(getattr(trainer, "callbacks", []))


def is_tryout(trainer: pl.Trainer) -> bool:
    """Whether the Trainer only tries its code on a few batches (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def off_reason(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """Why dynamon cannot measure this run at all, in one sentence; None where it can."""
    if not any(p.numel() and p.requires_grad for p in module.parameters()):
        return f"{type(module).__name__} has no trainable parameter, so there is nothing to measure."
    return _strategy_reason(type(trainer.strategy))


def _strategy_reason(strategy: type) -> str | None:
    """Why the parameters of a run cannot be told apart, by the class of its strategy or one it derives from."""
    for cls in strategy.__mro__:
        for word, reason in _REFUSED.items():
            if word in cls.__name__:
                return f"{strategy.__name__} {reason}"
    return None
