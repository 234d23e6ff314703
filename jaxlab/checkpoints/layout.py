"""How the axes of a tensor in a Hugging Face folder correspond to those of a leaf of ours.

A layout reads from theirs to ours: "(h k) d -> d h k" says that their matrix has rows of heads times head
dimensions and columns of the width, and that our leaf has the axes width, head, head dimension. Nothing but
transposing and reshaping: both ways lose no bit. Leading axes of ours that count tensors (layers, experts)
are not part of a layout.
"""

import dataclasses
import functools
import math
import re
from typing import Any

from jaxtyping import Array, Float
from numpy import ndarray

Tensor = Float[Array, "..."] | Float[ndarray, "..."]


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

    def to_theirs(self, x: Tensor, lead: int = 0) -> Tensor:
        """Ours in their layout; the first `lead` axes stay."""
        size = dict(zip(self.ours, x.shape[lead:], strict=True))
        order = [self.ours.index(axis) + lead for group in self.theirs for axis in group]
        y = x.transpose(*range(lead), *order)
        return y.reshape(*x.shape[:lead], *self.shape(tuple(size.values())))

    def to_ours(self, x: Tensor, own: tuple[int, ...], lead: int = 0) -> Tensor:
        """Theirs in our layout, of shape `own`; the first `lead` axes stay."""
        size = dict(zip(self.ours, own, strict=True))
        flat = [axis for group in self.theirs for axis in group]
        y: Any = x.reshape(*x.shape[:lead], *(size[axis] for axis in flat))
        return y.transpose(*range(lead), *(flat.index(axis) + lead for axis in self.ours))


@functools.cache
def parse(text: str) -> Layout:
    """The layout that `text` describes. Raises ValueError if the two sides have different axes."""
    theirs, _, ours = text.partition("->")
    groups = tuple(
        tuple(match[1].split()) if match[1] is not None else (match[2],)
        for match in re.finditer(r"\(([^)]*)\)|(\w+)", theirs)
    )
    layout = Layout(groups, tuple(ours.split()))
    if sorted(axis for group in groups for axis in group) != sorted(layout.ours):
        raise ValueError(f"the sides of the layout {text!r} have different axes")
    return layout
