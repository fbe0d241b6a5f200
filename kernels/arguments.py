"""Checks of arguments: TypeError for a wrong type, ValueError for a wrong value, both naming the argument."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def check_tensor(name: str, value: Any, form: str = "") -> None:
    """Raise TypeError unless ``value`` is a tensor.

    Args:
        name: Name of the argument.
        value: What was passed.
        form: Expected shape, for the message.
    """
    if not isinstance(value, Tensor):
        expected = f"a tensor {form}".rstrip()
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}; torch.as_tensor() converts arrays.")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError where it is below ``least``.

    Args:
        name: Name of the argument.
        value: What was passed.
        least: Smallest value allowed.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def renamed_arguments(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function so that it names the new argument where an earlier name of it is passed.

    Args:
        names: The new name by the earlier one.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for old in names.keys() & kwargs.keys():
                raise TypeError(f"{function.__name__}() has no argument {old!r} any more: it is {names[old]!r} now.")
            return function(*args, **kwargs)

        return checked

    return decorate
