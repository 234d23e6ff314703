"""HTML by construction: whatever is not Markup is text, and text is escaped."""

import html
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"br", "hr", "img", "meta", "wbr"})


class Markup(str):
    """A piece of finished HTML. Only this module and the SVG writer make one from a plain string."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value as text of a page."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(children: Iterable[Any]) -> Markup:
    """Children one after the other: Markup as it is, None left out, lists walked, everything else as text."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(text(child))
    return Markup("".join(parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. `class_` is written class, `data_x` data-x; attributes that are None are left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"')
    if name in _VOID:
        return Markup(f"<{' '.join(words)}>")
    return Markup(f"<{' '.join(words)}>{join(children)}</{name}>")
