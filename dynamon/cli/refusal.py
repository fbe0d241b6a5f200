"""Refusals: what a command cannot do with what it was given, as one sentence and exit status 2."""

from collections.abc import Iterator
from contextlib import contextmanager

from dynamon.runs.folders import printable


class RefusalError(Exception):
    """A command refuses its input; the message says why, and what would help."""


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors that the user's input causes into a :class:`RefusalError`.

    Args:
        kinds: Exceptions that count as such, beside ``ValueError`` and ``OSError``.

    Raises:
        RefusalError: In the place of these exceptions, with one sentence.
    """
    caught: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except OSError as error:
        raise RefusalError(_sentence(error)) from error
    except caught as error:
        raise RefusalError(str(error)) from error


def _sentence(error: OSError) -> str:
    """Say which file is at fault and what to do; errors raised with a sentence keep it."""
    if error.filename is None:
        return str(error)
    name = printable(error.filename)
    if isinstance(error, FileNotFoundError):
        return f"{name} cannot be opened: {error.strerror}. Create its folder first, or name another."
    if isinstance(error, IsADirectoryError):
        return f"{name} is a folder: name a file in it."
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{name} cannot be opened: there is a file where a folder is needed. Name another."
    return f"{name} cannot be opened: {error.strerror}."
