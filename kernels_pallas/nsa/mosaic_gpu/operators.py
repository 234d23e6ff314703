"""The operators of this implementation, each with its tile sizes."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import Block, GatedBranches, Interval, Positions, SelectionGrid
from kernels_pallas.nsa.interface import Operators
from kernels_pallas.nsa.mosaic_gpu import block_selection
from kernels_pallas.nsa.mosaic_gpu.block_major import ByBlock, attend_by_block
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.nsa.mosaic_gpu.decode import decode_token
from kernels_pallas.nsa.mosaic_gpu.gated import Gated, Operands, attend_gated
from kernels_pallas.nsa.mosaic_gpu.target import BLOCK
from kernels_pallas.nsa.mosaic_gpu.tuning import COMPILED_FOR, Branch, Kernel, forced_sizes, tuned
from kernels_pallas.nsa.mosaic_gpu.vjp import Kernels, attend
from kernels_pallas.target import current_target

Order = Literal["queries", "blocks"]
MOST_HEADS_BY_BLOCK = 4
"""Query heads per key/value head up to which selected attention goes in the order of the blocks."""


def best_order(groups: int) -> Order:
    """Which order moves and multiplies less, by the count in docs/kernels.md."""
    return "blocks" if groups <= MOST_HEADS_BY_BLOCK else "queries"


def kernel_tuning(kernel: Kernel, branch: Branch, k: Array, v: Array) -> Tuning:
    """Tile sizes of one kernel on what it will run on."""
    if current_target() == "interpreter":
        best = Tuning(registers=False)
    else:
        kind = COMPILED_FOR if current_target() == "compiler" else jax.devices()[0].device_kind
        best = tuned(kind, kernel, branch, k.shape[-1], v.shape[-1])
    return dataclasses.replace(best, **forced_sizes())


def with_tuning(kernels: Kernels, branch: Branch, k: Array, v: Array) -> Kernels:
    """With the tile sizes of its three kernels."""
    forward, query, key = (
        kernel_tuning(kernel, branch, k, v) for kernel in ("forward", "query_gradient", "key_gradients")
    )
    return dataclasses.replace(kernels, forward=forward, query=query, key=key)


def interval_attention(
    interval: Interval,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    positions: Positions,
) -> tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]]:
    """Compressed and window attention."""
    branch: Branch = "compression" if interval.window is None else "window"
    kernels = Kernels(interval.scale, interval.stride, interval.offset, interval.window)
    return attend(with_tuning(kernels, branch, k, v), q, k, v, None, positions)


def selected_attention(
    block: Block,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B T Hkv n"],
    positions: Positions,
    *,
    order: Order | None = None,
) -> Float[Array, "B T Hkv G Dv"]:
    """For blocks of a multiple of 64 tokens.

    `order`: "queries", whose neighbours read the union of their blocks, or "blocks", which read the queries
    that selected them (block_major.py); None: what suits the size of the groups.

    Raises:
        ValueError: `order` is another.
    """
    order = best_order(q.shape[3]) if order is None else order
    if order not in ("queries", "blocks"):
        raise ValueError(f"nsa: order of the selection must be 'queries', 'blocks' or None, not {order!r}")
    parts = block.size // BLOCK
    if parts > 1:  # the kernels know blocks of 64
        part = jnp.arange(parts, dtype=jnp.int32)[None, None, None, None]
        split = jnp.where(indices[..., None] < 0, -1, indices[..., None] * parts + part)
        indices = split.reshape(*indices.shape[:3], -1)
    kernels = with_tuning(Kernels(block.scale), "selection", k, v)
    if order == "blocks":
        by_block = ByBlock(block.scale, dataclasses.replace(kernels.forward, keys=BLOCK))
        return attend_by_block(by_block, q, k, v, indices, positions)[0]
    return attend(kernels, q, k, v, indices, positions)[0]


def select_blocks(
    grid: SelectionGrid,
    q: Float[Array, "B T Hkv G Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T Hkv G"],
    positions: Positions,
) -> Int[Array, "B Hkv T n"]:
    """The selection of blocks."""
    tuning = kernel_tuning("scores", "block_selection", k_cmp, k_cmp)
    return block_selection.select_blocks(grid, q, k_cmp, lse, positions, tuning)


def gated_attention(
    grid: SelectionGrid,
    window: int,
    arrays: tuple[Array | None, ...],
    gates: Float[Array, "B T Hkv G 3"],
    indices: Int[Array, "B T Hkv n"] | None,
    positions: Positions,
) -> GatedBranches | None:
    """For selection in the order of the queries, and blocks as the kernels know them."""
    operands = Operands(*arrays)  # type: ignore[arg-type]
    if best_order(operands.q.shape[3]) != "queries" or grid.block_size != BLOCK:
        return None
    compression = Kernels(grid.scale, grid.stride, grid.block_len - 1, None)
    of = lambda kernels, branch: with_tuning(kernels, branch, *operands.of(branch)[1:])
    op = Gated(
        grid,
        of(compression, "compression"),
        of(Kernels(grid.scale), "selection"),
        of(Kernels(grid.scale, window=window), "window"),
        kernel_tuning("scores", "block_selection", operands.k_cmp, operands.k_cmp),
    )
    return attend_gated(op, operands, gates, indices, positions)


OPERATORS = Operators(
    compressed_attention=interval_attention,
    select_blocks=select_blocks,
    selected_attention=selected_attention,
    window_attention=interval_attention,
    decode_token=decode_token,
    gated_attention=gated_attention,
)
