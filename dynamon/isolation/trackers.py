"""Mute experiment trackers while a loss is evaluated once more."""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

# Where all calls of a tracker end up, including its global functions: module, class (None: the module itself), and the
# names of the functions that write.
_WRITERS: dict[str, tuple[tuple[str, str | None, tuple[str, ...]], ...]] = {
    "wandb": (
        ("wandb", None, ("log",)),
        ("wandb.sdk.wandb_run", "Run", ("log", "_log", "_partial_history_callback", "log_artifact", "alert")),
    ),
    "mlflow": (("mlflow.tracking.client", "MlflowClient", ("log_*", "set_tag")),),
    "tensorboard": (("tensorboard.summary.writer.event_file_writer", "EventFileWriter", ("add_event",)),),
    "tensorboardX": (("tensorboardX.event_file_writer", "EventFileWriter", ("add_event",)),),
    "lightning": (("lightning.fabric.loggers.csv_logs", "_ExperimentWriter", ("log_metrics",)),),
    "comet_ml": (("comet_ml.experiment", "CometExperiment", ("log_*",)),),
    "neptune": tuple(
        (
            f"neptune.internal.operation_processors.{kind.lower()}_operation_processor",
            f"{kind}OperationProcessor",
            ("enqueue_operation",),
        )
        for kind in ("Async", "Offline", "Sync")
    ),
    "clearml": (("clearml.logger", "Logger", ("report_*",)),),
    "swanlab": (("swanlab", None, ("log", "log_*")), ("swanlab.sdk.internal.run", "Run", ("log", "log_*"))),
    "trackio": (("trackio", None, ("log",)), ("trackio.run", "Run", ("log", "log_*"))),
    "dvclive": (("dvclive.live", "Live", ("log_*", "next_step")),),
    "aim": (("aim.sdk.run", "BasicRun", ("track",)),),
}
_lock = threading.RLock()
_open = 0  # evaluations in progress, in all threads
_replaced: list[tuple[Any, str, Any]] = []
_here = threading.local()
_told: set[str] = set()


class _Nothing:
    """The result of a muted call: false, and every attribute and call of it is the same again."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> "_Nothing":
        return self

    def __bool__(self) -> bool:
        return False


@contextmanager
def mute_trackers() -> Iterator[None]:
    """Make experiment trackers ignore what this thread writes inside; other threads are not affected.

    This covers direct calls in a ``training_step``: ``wandb.log``, ``mlflow.log_metric``, a ``SummaryWriter``, Comet,
    Neptune, ClearML, SwanLab, Trackio, DVCLive, Aim. A muted call returns an object that is false, and of which every
    attribute and call is such an object again. Only trackers that are already imported are muted. If a tracker's
    writing functions are not found, one warning says so.

    Example:
        >>> with mute_trackers():
        ...     loss = 1.0  # evaluate it here
    """
    global _open
    with _lock:
        _open += 1
        if _open == 1:
            _replace()
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _open -= 1
            if not _open:
                _restore()


def is_muted() -> bool:
    """Return whether this thread is inside :func:`mute_trackers`."""
    return getattr(_here, "depth", 0) > 0


def _replace() -> None:
    for tracker, writers in _WRITERS.items():
        if tracker not in sys.modules:
            continue
        owners = [(_owner(module, name), patterns) for module, name, patterns in writers]
        found = [_quieten(owner, patterns) for owner, patterns in owners if owner is not None]
        known = any(module in sys.modules for module, name, _ in writers if name is not None)
        if known and not any(found) and tracker not in _told:
            _told.add(tracker)
            warnings.warn(
                f"{tracker} cannot be muted while sharpness evaluates the loss, so what training_step writes to it "
                "is logged several times; pass loss_fn=lambda module, batch: ... that computes the loss alone.",
                stacklevel=2,
            )


def _owner(module: str, name: str | None) -> Any:
    found = sys.modules.get(module)
    return found if name is None or found is None else getattr(found, name, None)


def _quieten(owner: Any, patterns: tuple[str, ...]) -> bool:
    """Replace functions of a class or module by ones that do nothing while muted."""
    names = [n for n, value in vars(owner).items() if _writes(value) and any(fnmatchcase(n, p) for p in patterns)]
    for name in names:
        original = vars(owner)[name]
        _replaced.append((owner, name, original))
        setattr(owner, name, _muted(original))
    return bool(names)


def _writes(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | staticmethod | classmethod)


def _muted(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def write(*arguments: Any, **keywords: Any) -> Any:
        return _Nothing() if is_muted() else original(*arguments, **keywords)

    return write


def _restore() -> None:
    for owner, name, original in reversed(_replaced):
        if getattr(vars(owner).get(name), "__wrapped__", None) is original:  # others may have replaced it since
            setattr(owner, name, original)
    _replaced.clear()
