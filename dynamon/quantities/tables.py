"""The table of tags in a docstring, made from the registry."""

import re
import textwrap
from collections.abc import Callable, Iterable
from typing import TypeVar

from dynamon.quantities.registry import Quantity

_WIDTH = 120
_PLACE = re.compile(r"^( *)\{tags\}$", re.M)
_Class = TypeVar("_Class", bound=type)


def tag_table(quantities: Iterable[Quantity], indent: str = "") -> str:
    """Format quantities as a reStructuredText table with one row per tag.

    Args:
        quantities: The quantities.
        indent: Prefix of each line.
    """
    rows = [(f"``{one.tag}``", one.sentence) for one in quantities]
    first = max(len(tag) for tag, _ in rows)
    second = _WIDTH - len(indent) - first - 2
    rule = f"{'=' * first}  {'=' * min(second, 52)}"
    lines = [rule, f"{'tag':{first}}  what it is", rule]
    for tag, sentence in rows:
        begin, *rest = textwrap.wrap(sentence, second, break_long_words=False, break_on_hyphens=False)
        lines += [f"{tag:{first}}  {begin}", *(f"{'':{first}}  {line}" for line in rest)]
    return "\n".join(indent + line for line in [*lines, rule])


def with_tag_table(quantities: Iterable[Quantity]) -> Callable[[_Class], _Class]:
    """Replace ``{tags}`` in a class's docstring by the table of some quantities.

    Args:
        quantities: The quantities.

    Raises:
        ValueError: If the docstring has no line ``{tags}``.
    """
    rows = list(quantities)

    def decorate(cls: _Class) -> _Class:
        if cls.__doc__ is None:  # python -OO
            return cls
        place = _PLACE.search(cls.__doc__)
        if place is None:
            raise ValueError(f"the docstring of {cls.__name__} has no line {{tags}}.")
        cls.__doc__ = cls.__doc__[: place.start()] + tag_table(rows, place[1]) + cls.__doc__[place.end() :]
        return cls

    return decorate
