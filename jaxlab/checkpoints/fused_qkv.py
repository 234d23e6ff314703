"""Tensors of theirs that hold several leaves of ours, joined along one axis: GPT-2's c_attn is q, k and v.

The leaves stand one after the other, or in groups: what each has of the first head, then what each has of the
second (`Row.groups`).
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlab.checkpoints.tensor_table import Layout

if TYPE_CHECKING:  # names are matched without jax
    from jaxtyping import Array, Shaped
    from numpy import ndarray

    Tensor = Shaped[Array, "..."] | Shaped[ndarray, "..."]


def fused_parts[T](
    tensor: T,
    layout: Layout,
    axis: int,
    shapes: Sequence[tuple[int, ...]],
    groups: str = "",
    lead: int = 0,
) -> list[T]:
    """What a fused tensor holds of each leaf; of a contiguous array of numpy these are views.

    Args:
      layout: of each leaf alone.
      axis: of theirs, along which the leaves are joined.
      shapes: of each leaf, in our layout, without axes that count tensors.
      groups: the leaves are joined anew in each of so many groups as the last one's axis of this letter is
        long; the parts then have two axes in place of the one. Empty: one after the other.
      lead: axes of the tensor before those of the layout.
    """
    if len(shapes) == 1:
        return [tensor]
    sizes, axis = [layout.shape(shape)[axis] for shape in shapes], axis + lead
    split: Any = tensor
    if groups:
        count = _count(layout, shapes, groups)
        split = split.reshape(*split.shape[:axis], count, sum(sizes) // count, *split.shape[axis + 1 :])
        sizes, axis = [size // count for size in sizes], axis + 1
    ends = list(itertools.accumulate(sizes))
    before = (slice(None),) * axis
    return [split[(*before, slice(end - size, end))] for size, end in zip(sizes, ends, strict=True)]


def fused_shape(layout: Layout, axis: int, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Their shape of the tensor that holds leaves of these shapes (of ours) along `axis` (of theirs)."""
    parts = [layout.shape(shape) for shape in shapes]
    if len(parts) == 1:
        return parts[0]
    return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])


def grouped(
    part: "Tensor", layout: Layout, axis: int, shapes: Sequence[tuple[int, ...]], groups: str, lead: int = 0
) -> "Tensor":
    """A leaf in their layout with two axes for the one that groups divide, as `fused_parts` has it."""
    if not groups:
        return part
    axis += lead
    return part.reshape(*part.shape[:axis], _count(layout, shapes, groups), -1, *part.shape[axis + 1 :])


def _count(layout: Layout, shapes: Sequence[tuple[int, ...]], groups: str) -> int:
    return shapes[-1][layout.ours.index(groups)]
