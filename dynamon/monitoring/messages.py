"""Tell the user something, on the first process only: log lines of the logger ``dynamon``, and warnings."""

import logging
import os
import warnings

from torch import distributed as dist

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # set by launchers before there is a group
_LOGGER = logging.getLogger("dynamon")


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Write to standard error where nobody has set up logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().hasHandlers():
            super().emit(record)


if not _LOGGER.handlers:
    _LOGGER.addHandler(_Fallback())
    _LOGGER.setLevel(logging.INFO)


def is_first_process() -> bool:
    """Return whether this is the process that speaks for all of them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), 0)) == 0


def rank_zero_info(sentence: str) -> None:
    """Log a sentence at level INFO."""
    if is_first_process():
        _LOGGER.info(sentence, stacklevel=2)


def rank_zero_warn(sentence: str) -> None:
    """Give a ``UserWarning``."""
    if is_first_process():
        warnings.warn(sentence, UserWarning, stacklevel=2)
