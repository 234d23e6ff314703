"""The table of a family: which tensor of a Hugging Face folder is which leaf of ours, and how its axes lie.

A layout reads from theirs to ours: "(h k) d -> d h k" says that their matrix has rows of heads times head
dimensions and columns of the width, and that our leaf has the axes width, head, head dimension. Nothing but
transposing and reshaping: both ways lose no bit. Leading axes of ours that count tensors (layers, experts)
are not part of a layout. tensor_map.py does what the table says.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import TYPE_CHECKING, Any

from numpy import ndarray

from jaxlab.errors import UserError

if TYPE_CHECKING:  # names are matched without jax
    from jaxtyping import Array, Float

    Tensor = Float[Array, "..."] | Float[ndarray, "..."]

LeafPath = tuple[str, ...]
"""Of a leaf in our tree."""
EMBEDDING: LeafPath = ("embedding", "table")
HEAD: LeafPath = ("head", "table")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: its place in our tree, its name, and how its axes lie."""

    path: str | tuple[str, ...]
    """Of our leaf; of several leaves that one tensor of theirs holds, in their order."""
    name: str
    """Theirs, with {i} for the layer, {e} for the expert, {h} for the head, {branch} for NSA's branch."""
    layout: str
    """Of one tensor; see Layout."""
    join: int = 0
    """The axis of theirs along which several leaves are joined."""
    runs: str = ""
    """Several leaves: the axis of ours of whose least size there are so many runs, each with a piece of every
    leaf; empty: each leaf is one piece."""
    numbers: tuple[int, ...] = ()
    """Theirs of our layers 0, 1, ..., where they are not the same."""
    skips: tuple[int, ...] = ()
    """Numbers of theirs that are none of these layers: others stand in between."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    def layer_numbers(self, count: int, first: int) -> tuple[int, ...]:
        """Theirs of `count` layers of ours, of which `first` others come before.

        Raises:
          UserError: the family names another number of layers.
        """
        if self.numbers and len(self.numbers) != count:
            raise UserError(
                f"{self.paths[0]} holds {count} layers, the family names {len(self.numbers)}: {self.numbers}"
            )
        free = (number for number in itertools.count(first) if number not in self.skips)
        return self.numbers or tuple(itertools.islice(free, count))


Rows = tuple[Row, ...]


def in_layers(path: str, name: str, rows: Rows) -> Rows:
    """The rows of one layer as rows of a stack of layers at `path`, named `name`.{i}."""
    place = lambda row: tuple(f"{path}.{p}" for p in row.paths)
    return tuple(
        dataclasses.replace(
            row, path=place(row) if len(row.paths) > 1 else place(row)[0], name=f"{name}.{{i}}.{row.name}"
        )
        for row in rows
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Their axes, each a group of ours, and the order of ours."""

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Axes of one tensor of ours."""
        return len(self.ours)

    def shape(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of a tensor whose shape of ours is `own`."""
        size = dict(zip(self.ours, own, strict=True))
        return tuple(math.prod(size[axis] for axis in group) for group in self.theirs)

    def pair(self, theirs: ndarray, ours: ndarray) -> tuple[ndarray, ndarray]:
        """Views of one tensor in both layouts with the same axes, in their order: for a copy to theirs."""
        size = dict(zip(self.ours, ours.shape, strict=True))
        flat = [axis for group in self.theirs for axis in group]
        split = theirs.reshape([size[axis] for axis in flat])
        return split, ours.transpose([self.ours.index(axis) for axis in flat])

    def to_theirs(self, x: "Tensor", lead: int = 0) -> "Tensor":
        """Ours in their layout; the first `lead` axes stay."""
        size = dict(zip(self.ours, x.shape[lead:], strict=True))
        order = [self.ours.index(axis) + lead for group in self.theirs for axis in group]
        y = x.transpose(*range(lead), *order)
        return y.reshape(*x.shape[:lead], *self.shape(tuple(size.values())))

    def to_ours(self, x: "Tensor", own: tuple[int, ...], lead: int = 0) -> "Tensor":
        """Theirs in our layout, of shape `own`; the first `lead` axes stay."""
        size = dict(zip(self.ours, own, strict=True))
        flat = [axis for group in self.theirs for axis in group]
        y: Any = x.reshape(*x.shape[:lead], *(size[axis] for axis in flat))
        return y.transpose(*range(lead), *(flat.index(axis) + lead for axis in self.ours))


@functools.cache
def parse(text: str) -> Layout:
    """The layout that `text` describes.

    Raises:
      ValueError: the two sides have different axes.
    """
    theirs, _, ours = text.partition("->")
    groups = tuple(
        tuple(match[1].split()) if match[1] is not None else (match[2],)
        for match in re.finditer(r"\(([^)]*)\)|(\w+)", theirs)
    )
    layout = Layout(groups, tuple(ours.split()))
    if sorted(axis for group in groups for axis in group) != sorted(layout.ours):
        raise ValueError(f"the sides of the layout {text!r} have different axes")
    return layout
