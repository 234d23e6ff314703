"""Tensors of theirs that hold several leaves of ours, joined along one axis: GPT-2's c_attn is q, k and v."""

import itertools
from collections.abc import Sequence

from jaxlab.checkpoints.tensor_table import Layout


def fused_parts(
    layout: Layout, axis: int, shapes: Sequence[tuple[int, ...]], lead: int = 0
) -> list[tuple[slice, ...]]:
    """Where in a fused tensor each leaf lies: indexing with it splits the tensor, or fills a part of it.

    Args:
      layout: of each leaf alone.
      axis: of theirs, along which the leaves are joined.
      shapes: of each leaf, in our layout, without axes that count tensors.
      lead: axes of the tensor before those of the layout.
    """
    if len(shapes) == 1:
        return [()]
    sizes = [layout.shape(shape)[axis] for shape in shapes]
    ends = list(itertools.accumulate(sizes))
    return [
        (slice(None),) * (lead + axis) + (slice(end - size, end),)
        for size, end in zip(sizes, ends, strict=True)
    ]


def fused_shape(layout: Layout, axis: int, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Their shape of the tensor that holds leaves of these shapes (of ours) along `axis` (of theirs)."""
    parts = [layout.shape(shape) for shape in shapes]
    if len(parts) == 1:
        return parts[0]
    return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])
