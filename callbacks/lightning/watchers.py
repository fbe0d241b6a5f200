"""Callbacks and schedulers of others that watch what monitors log, and may ask for it before it is there."""

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from dynamon.monitoring.meter import Meter


def warnings_of(trainer: Any, monitor: str, meters: Iterable[Meter]) -> list[str]:
    """Return what to say where Lightning ends a run with an error because a watched tag is not there in time.

    Args:
        trainer: The Trainer, with its callbacks and schedulers.
        monitor: Who logs.
        meters: Its meters.

    Returns:
        One sentence for each that watches a tag of these meters which a budget may not have measured by then, or which
        never enters ``trainer.callback_metrics``.
    """
    found = ((who, tag, remedy, _trouble(monitor, meters, tag)) for who, tag, remedy in _watched(trainer))
    return [f"{who} watches {tag}, {trouble}{remedy}." for who, tag, remedy, trouble in found if trouble]


def _watched(trainer: Any) -> Iterator[tuple[str, str, str]]:
    """Who watches which tag, and what else they offer; those that go on without it are left out."""
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if isinstance(callback, EarlyStopping) and callback.strict:
            yield name, callback.monitor, f", or strict=False in {name}"
        elif isinstance(callback, ModelCheckpoint) and callback.monitor:
            yield name, callback.monitor, ""
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor and config.strict:
            yield type(config.scheduler).__name__, config.monitor, ', or "strict": False in its configuration'


def _trouble(monitor: str, meters: Iterable[Meter], tag: str) -> str | None:
    for meter in meters:
        if any(tag.startswith((f"{q}_", f"{q}/", f"{q.replace('/', '.')}/")) or tag == q for q in meter.quantities):
            return (
                "which has one value a layer and is not among trainer.callback_metrics, so that Lightning ends the run "
                "with an error. Watch a tag of the whole model"
            )
        if (tag in meter.tags or tag.startswith("dynamon/")) and meter.cadence.every_n_steps is None:
            return (
                "which is measured when the budget allows: where it has not been by the time it is asked for, "
                f"Lightning ends the run with an error. Set every_n_steps in {monitor}"
            )
    return None
