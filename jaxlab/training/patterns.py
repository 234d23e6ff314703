"""Parameters by patterns of their names."""

import difflib
import fnmatch
from collections.abc import Iterable

PARTS = ("language", "vision", "projector")
"""Parts of a vision-language model, which patterns name too; a language model is all language."""


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter, by its dotted name: a part of the model, how the name begins
    (layers.mlp), or * and ? in it (*.bias)."""
    if pattern in PARTS:
        first = name.partition(".")[0]
        return pattern == (first if first in PARTS else "language")
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def pattern_hint(pattern: str, names: Iterable[str]) -> str:
    """What may have been meant by a pattern that none of the names matches."""
    split = [name.split(".") for name in names]
    firsts = sorted({name[0] for name in split})
    parts = [part for part in PARTS if any(matches(part, ".".join(name)) for name in split)]
    known = [*parts, *sorted({".".join(name[:n]) for name in split for n in range(1, len(name) + 1)})]
    close = difflib.get_close_matches(pattern, known, 1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(dict.fromkeys([*parts, *firsts]))}"
