"""Names: what wrappers add to those of parameters, globs that choose among them, and the words of any name."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def plain_name(name: str) -> str:
    """A parameter's or module's name without the segments that compiling, checkpointing and sharding insert."""
    return _WRAPPERS.sub("", name + ".").removesuffix(".")


def is_chosen(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether globs choose something that goes by some names.

    Args:
        names: All its names; one that matches is enough.
        patterns: Globs; one that begins with ``!`` excludes, and with only those everything else stays.
    """
    names = list(names)
    include = [p for p in patterns if not p.startswith("!")] or ["*"]
    exclude = [p[1:] for p in patterns if p.startswith("!")]
    return _any_match(names, include) and not _any_match(names, exclude)


def words(name: str) -> list[str]:
    """The words of a name in lower case: ``FusedAdamW`` is fused, adam, w; ``train/loss_box`` is train, loss, box."""
    return [word.lower() for word in _WORD.findall(name)]


def word_runs(name: str) -> set[str]:
    """Words of a name and neighbours put together, which holds whole words only: LambdaSGD has no lamb."""
    found = words(name)
    return {"".join(found[i:j]) for i in range(len(found)) for j in range(i + 1, len(found) + 1)}


def _any_match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)
