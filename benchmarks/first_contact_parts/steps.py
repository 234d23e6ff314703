"""What a step is, to the parent that runs it and to the child that is it. Standard library only."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]
"""Of results. `name`, and one of: `right` (bool; then `error`, `detail`), `seconds`, `fact`, `reason` (why
there is nothing), `failed` (why); `stop` (why no further step is worth running)."""


class Item(NamedTuple):
    """A piece of a step: it is told by itself, and what kills it is not tried again."""

    name: str
    prepare: Callable[[], Any]
    """Compiles; several at the same time, in threads."""
    run: Callable[[Any], list[Row]]
    """Given what `prepare` returned; alone in its process."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A module with `items(options, part) -> list[Item]`, run in processes of its own."""

    name: str
    module: str
    limit_s: float
    """For all of it."""
    item_limit_s: float
    """Without a sign of life while an item runs."""
    parts: tuple[str, ...] = ("",)
    """A process for each, at the same time; see `in_turn`."""
    needs: tuple[str, ...] = ()
    """Steps that must have been all right."""
    least_s: float = 10.0
    """With less it is not begun."""
    in_turn: bool = False
    """Its processes compile at the same time and then run one after the other, as times want it."""
