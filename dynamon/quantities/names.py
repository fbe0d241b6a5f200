"""Handle names: wrappers' segments, globs that select names, and the words of a name."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def plain_name(name: str) -> str:
    """Remove the segments that compiling, checkpointing and sharding insert into a parameter's or module's name.

    Example:
        >>> plain_name("_orig_mod.blocks.0._checkpoint_wrapped_module.weight")
        'blocks.0.weight'
    """
    return _WRAPPERS.sub("", name + ".").removesuffix(".")


def is_chosen(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Return whether globs select something with the given names.

    Args:
        names: All its names; one match is enough.
        patterns: Globs; one that begins with ``!`` excludes. If all exclude, everything else is selected.
    """
    names = list(names)
    include = [p for p in patterns if not p.startswith("!")] or ["*"]
    exclude = [p[1:] for p in patterns if p.startswith("!")]
    return _any_match(names, include) and not _any_match(names, exclude)


def words(name: str) -> list[str]:
    """Split a name into lower-case words: ``FusedAdamW`` is fused, adam, w; ``train/loss_box`` is train, loss, box."""
    return [word.lower() for word in _WORD.findall(name)]


def word_runs(name: str) -> set[str]:
    """Return all runs of adjacent words, joined. They contain whole words only: LambdaSGD has no lamb."""
    found = words(name)
    return {"".join(found[i:j]) for i in range(len(found)) for j in range(i + 1, len(found) + 1)}


def _any_match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)
