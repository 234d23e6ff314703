"""How much memory something takes on each device, before any of it is taken."""

import math
from collections.abc import Callable
from typing import Any

import jax


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device; all devices hold equally much."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compiled_memory(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """What the compiler plans for a jitted `function` of abstract arguments, in bytes on one device.

    "temporary" holds activations and gradients; "total" is all at once, donated arguments counted once.
    """
    stats = function.lower(*arguments).compile().memory_analysis()  # type: ignore[attr-defined]
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {"temporary": stats.temp_size_in_bytes, "total": kept + stats.temp_size_in_bytes}
