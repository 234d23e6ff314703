"""The Hopper kernels as differentiable functions: attention to intervals of keys, and to chosen blocks."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa import support
from kernels_pallas.nsa.banded import Band
from kernels_pallas.nsa.choice import Grid
from kernels_pallas.nsa.mosaic_backward import Saved, key_gradients, query_gradient
from kernels_pallas.nsa.mosaic_blocks import ByBlock, Order, attend_by_block, best_order
from kernels_pallas.nsa.mosaic_choice import choose_by_kernel
from kernels_pallas.nsa.mosaic_forward import LOG2_E, ROWS, Lists, Ranges, Tuning, Visible, forward
from kernels_pallas.nsa.mosaic_plan import (
    FEATURES,
    Inverse,
    Rows,
    intervals,
    inverse,
    lists,
    pack_keys,
    plan_rows,
    ranges,
    readers,
    unpack_keys,
)
from kernels_pallas.nsa.selection import Block
from kernels_pallas.nsa.tiling import Places, Residuals, ceil_div, finite, softmax_shift
from kernels_pallas.nsa.tuned import COMPILED_FOR, Branch, Kernel, tuned


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Static facts of one attention; key i stands as `mosaic_plan.intervals` says."""

    scale: float
    stride: int = 1
    offset: int = 0
    window: int | None = None
    forward: Tuning = Tuning()
    query: Tuning = Tuning()
    key: Tuning = Tuning()


def _tuning(kernel: Kernel, branch: Branch, k: Array, v: Array) -> Tuning:
    if support.place() == "interpreter":
        return Tuning(registers=False)
    kind = COMPILED_FOR if support.place() == "compiler" else jax.devices()[0].device_kind
    return tuned(kind, kernel, branch, k.shape[-1], v.shape[-1])


def _tuned(kernels: Kernels, branch: Branch, k: Array, v: Array) -> Kernels:
    """With the tile sizes of its three kernels."""
    forward, query, key = (
        _tuning(kernel, branch, k, v) for kernel in ("forward", "query_gradient", "key_gradients")
    )
    return dataclasses.replace(kernels, forward=forward, query=query, key=key)


def banded(
    band: Band,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    places: Places,
) -> tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]]:
    """As `banded.banded_attention`; segments in `places` are those of the tokens, not of the keys."""
    branch: Branch = "compression" if band.window is None else "window"
    kernels = _tuned(Kernels(band.scale, band.stride, band.offset, band.window), branch, k, v)
    return attend(kernels, q, k, v, None, places)


def selected(
    block: Block,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B T Hkv n"],
    places: Places,
    *,
    order: Order | None = None,
) -> Float[Array, "B T Hkv G Dv"]:
    """As `selection.attend_to_blocks`, for blocks of a multiple of 64 tokens.

    `order`: "queries", whose neighbours read the union of their blocks, or "blocks", which read the queries
    that chose them (mosaic_blocks.py); None: what suits the size of the groups. Raises ValueError for others.
    """
    order = best_order(q.shape[3]) if order is None else order
    if order not in ("queries", "blocks"):
        raise ValueError(f"nsa: order of the selection must be 'queries', 'blocks' or None, not {order!r}")
    parts = block.size // support.BLOCK
    if parts > 1:  # the kernels know blocks of 64
        part = jnp.arange(parts, dtype=jnp.int32)[None, None, None, None]
        split = jnp.where(indices[..., None] < 0, -1, indices[..., None] * parts + part)
        indices = split.reshape(*indices.shape[:3], -1)
    kernels = _tuned(Kernels(block.scale), "selection", k, v)
    if order == "blocks":
        by_block = ByBlock(block.scale, dataclasses.replace(kernels.forward, keys=support.BLOCK))
        return attend_by_block(by_block, q, k, v, indices, places)[0]
    return attend(kernels, q, k, v, indices, places)[0]


def choose(
    grid: Grid,
    q: Float[Array, "B T Hkv G Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T Hkv G"],
    places: Places,
) -> Int[Array, "B Hkv T n"]:
    """As `choice.choose`."""
    return choose_by_kernel(grid, q, k_cmp, lse, places, _tuning("scores", "choice", k_cmp, k_cmp))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernels: Kernels,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B T Hkv n"] | None,
    places: Places,
) -> tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]]:
    """Attention to the keys of each query's interval, within its chosen blocks where `indices` are given
    (blocks of `kernels.forward.keys` tokens), and the log-sum-exp in float32.

    bfloat16 or float16, groups of up to 64 heads. A query that sees nothing gets exactly 0 and -inf.
    """
    return _forward(kernels, q, k, v, indices, places)


class _Prepared(NamedTuple):
    """Operands in the order of the kernels."""

    layout: Rows
    q: Array
    k: Array
    v: Array
    visible: Visible


def _prepare(kernels: Kernels, q: Array, k: Array, v: Array, places: Places) -> _Prepared:
    most = max(kernels.forward.rows, kernels.query.rows)
    layout = plan_rows(q.shape[1], q.shape[3], most)
    tile = max(kernels.forward.keys, kernels.query.keys, ROWS)
    first, end = intervals(places, kernels.stride, kernels.offset, kernels.window)
    end = jnp.minimum(end, k.shape[1])
    visible = Visible(layout.spread(first, 0), layout.spread(end, 0))
    return _Prepared(layout, layout.pack(q, FEATURES), pack_keys(k, tile), pack_keys(v, tile), visible)


def _plan(ready: _Prepared, indices: Array | None, tuning: Tuning) -> Ranges | Lists:
    if indices is None:
        return ranges(ready.visible, tuning.rows, tuning.keys)
    return lists(ready.layout, indices, ready.k.shape[1] // tuning.keys, tuning.rows, tuning.warpgroups)


def _forward(
    kernels: Kernels, q: Array, k: Array, v: Array, indices: Array | None, places: Places
) -> tuple[Array, Array]:
    ready = _prepare(kernels, q, k, v, places)
    plan = _plan(ready, indices, kernels.forward)
    out, lse = forward(
        ready.q, ready.k, ready.v, ready.visible, plan, scale=kernels.scale, tuning=kernels.forward
    )
    out = ready.layout.unpack(out, k.shape[2], v.shape[3])
    return out, ready.layout.unpack(lse[..., None], k.shape[2], 1)[..., 0] / LOG2_E


def _forward_saving(
    kernels: Kernels, q: Array, k: Array, v: Array, indices: Array | None, places: Places
) -> tuple[tuple[Array, Array], Residuals]:
    out, lse = _forward(kernels, q, k, v, indices, places)
    return (out, lse), Residuals(q, k, v, indices, places, out, lse)


def _backward(
    kernels: Kernels, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, indices, places, _, lse = saved
    d_out, d_lse = cotangents
    shift = softmax_shift(saved, d_out, d_lse)
    ready = _prepare(kernels, q, k, v, places)
    pack = ready.layout.pack
    rows = Saved(
        ready.q,
        pack(d_out.astype(q.dtype), FEATURES),
        pack((finite(lse) * LOG2_E)[..., None])[..., 0],
        pack(shift[..., None])[..., 0],
        ready.visible,
    )
    plan = _plan(ready, indices, kernels.query)
    dq = query_gradient(rows, ready.k, ready.v, plan, scale=kernels.scale, tuning=kernels.query)
    dq = ready.layout.unpack(dq, k.shape[2], q.shape[4])

    row_plan = _plan(ready, indices, dataclasses.replace(kernels.key, warpgroups=1, keys=ROWS))
    tiles = ceil_div(ready.k.shape[1], ROWS)
    turned: Array | Inverse
    if isinstance(row_plan, Lists):
        turned, bits = inverse(row_plan, tiles), row_plan.row_bits
    else:
        turned, bits = readers(row_plan, tiles), None
    dk, dv = key_gradients(
        rows, ready.k, ready.v, turned, row_bits=bits, scale=kernels.scale, tuning=kernels.key
    )
    return dq, unpack_keys(dk, k), unpack_keys(dv, v), None, None


attend.defvjp(_forward_saving, _backward)
