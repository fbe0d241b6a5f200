"""Tags that earlier versions wrote under another name: old event files and old scripts still find them."""

import re
from functools import lru_cache
from typing import TypeVar

RENAMED = {
    "sharpness/greedy_multiple": "sharpness/best_multiple",
    "sharpness/left_out": "sharpness/excluded_coordinates",
    "sharpness/products": "sharpness/matvecs",
    "spectrum/deviation": "spectrum/log2_spectral_condition",
    "weight/memory": "weight/initial_fraction",
}
# Scalars of single layers have a dot in the place of the slash; quantiles and tables append to the tag.
_NEW_NAMES = RENAMED | {old.replace("/", "."): new.replace("/", ".") for old, new in RENAMED.items()}
_OLD = re.compile(rf"({'|'.join(map(re.escape, _NEW_NAMES))})(?=$|_[a-z0-9]+$|/)")

ValueT = TypeVar("ValueT")


class TagDict(dict[str, ValueT]):
    """A dict by tag that takes the earlier name of a tag as well."""

    def __missing__(self, tag: str) -> ValueT:
        """Return what the tag's present name has."""
        current = current_tag(tag)
        if current == tag or current not in self:
            raise KeyError(tag)
        return self[current]


@lru_cache(maxsize=4096)
def current_tag(tag: str) -> str:
    """Return the name that a tag has now, with what is appended to it unchanged.

    Args:
        tag: A tag of any version: a scalar, a quantile of a table, a table, or a scalar of a single layer.

    Examples:
        >>> current_tag("weight/memory_median")
        'weight/initial_fraction_median'
        >>> current_tag("spectrum.deviation/blocks.0.weight")
        'spectrum.log2_spectral_condition/blocks.0.weight'
        >>> current_tag("gradient/norm")
        'gradient/norm'
    """
    return _OLD.sub(lambda found: _NEW_NAMES[found[0]], tag, count=1) if _OLD.match(tag) else tag
