"""Tensors of theirs that hold several leaves of ours, joined along one axis: GPT-2's c_attn is q, k and v.

They stand one after the other, or in runs: GPT-NeoX's query_key_value has a query, a key and a value for each
head, InternLM2's wqkv the queries of a group and their key and value.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlab.checkpoints.tensor_table import Layout

if TYPE_CHECKING:
    from jaxlab.checkpoints.tensor_map import Stack

Shapes = Sequence[tuple[int, ...]]
"""Of each leaf, in our layout, without axes that count tensors."""


def fused_shape(layout: Layout, axis: int, shapes: Shapes) -> tuple[int, ...]:
    """Their shape of the tensor that holds leaves of these shapes (of ours) along `axis` (of theirs)."""
    parts = [layout.shape(shape) for shape in shapes]
    if len(parts) == 1:
        return parts[0]
    return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])


def split_fused(
    tensor: "Stack", layout: Layout, axis: int, shapes: Shapes, *, runs: str = "", lead: int = 0
) -> "list[Stack]":
    """The part of a fused tensor that is each leaf's, in their layout.

    Args:
      layout: of each leaf alone.
      axis: of theirs, along which the leaves are joined.
      runs: the axis of ours of whose least size there are so many runs, each with a piece of every leaf;
        empty: there is one.
      lead: axes of the tensor before those of the layout.
    """
    if len(shapes) == 1:
        return [tensor]
    count, at = _count(layout, shapes, runs), lead + axis
    split: Any = tensor.reshape(*tensor.shape[:at], count, -1, *tensor.shape[at + 1 :])
    parts, start = [], 0
    for shape in shapes:
        stop = start + layout.shape(shape)[axis] // count
        piece = split[(slice(None),) * (at + 1) + (slice(start, stop),)]
        parts.append(piece.reshape(*tensor.shape[:at], -1, *tensor.shape[at + 1 :]))
        start = stop
    return parts


def join_fused(
    parts: "Sequence[Stack]",
    layout: Layout,
    axis: int,
    shapes: Shapes,
    *,
    runs: str = "",
    lead: int = 0,
    module: Any,
) -> "Stack":
    """The inverse of `split_fused`; `module` is numpy or jax.numpy."""
    if len(parts) == 1:
        return parts[0]
    count, at = _count(layout, shapes, runs), lead + axis
    first: Any = parts[0]
    before, after = first.shape[:at], first.shape[at + 1 :]
    pieces = [part.reshape(*before, count, -1, *after) for part in parts]
    return module.concatenate(pieces, axis=at + 1).reshape(*before, -1, *after)


def _count(layout: Layout, shapes: Shapes, runs: str) -> int:
    return min(shape[layout.ours.index(runs)] for shape in shapes) if runs else 1
