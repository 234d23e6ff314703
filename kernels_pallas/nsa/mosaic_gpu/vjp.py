"""The Hopper kernels as one differentiable function: attention to intervals of keys, or to blocks."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import FEATURES, LOG2_E, ROWS
from kernels_pallas.nsa.base import Positions, Residuals, ceil_div, finite, intervals, named, softmax_shift
from kernels_pallas.nsa.mosaic_gpu.backward_dkv import key_gradients
from kernels_pallas.nsa.mosaic_gpu.backward_dq import query_gradient
from kernels_pallas.nsa.mosaic_gpu.common import Inverse, Lists, Ranges, Saved, Tuning, Visible
from kernels_pallas.nsa.mosaic_gpu.forward import forward_pass
from kernels_pallas.nsa.mosaic_gpu.plan import (
    Rows,
    inverse,
    lists,
    pack_keys,
    plan_rows,
    ranges,
    readers,
    tiles_of_blocks,
    unpack_keys,
)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Static facts of one attention; what a query sees is `base.intervals`."""

    scale: float
    stride: int = 1
    offset: int = 0
    window: int | None = None
    forward: Tuning = Tuning()
    query: Tuning = Tuning()
    key: Tuning = Tuning()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernels: Kernels,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B T Hkv n"] | None,
    positions: Positions,
) -> tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]]:
    """Attention to the keys of each query's interval, within its selected blocks where `indices` are given
    (blocks of ROWS tokens, as many as `kernels.forward.keys`), and the log-sum-exp in float32.

    bfloat16 or float16, groups of up to 64 heads. A query that sees nothing gets exactly 0 and -inf.
    """
    return _forward(kernels, q, k, v, indices, positions)


class _Prepared(NamedTuple):
    """Operands in the order of the kernels."""

    layout: Rows
    q: Array
    k: Array
    v: Array
    visible: Visible
    positions: Positions


def _prepare(kernels: Kernels, q: Array, k: Array, v: Array, positions: Positions) -> _Prepared:
    most = max(kernels.forward.rows, kernels.query.rows)
    layout = plan_rows(q.shape[1], q.shape[3], most)
    tile = max(kernels.forward.keys, kernels.query.keys, ROWS)
    first, end = intervals(positions, kernels.stride, kernels.offset, kernels.window)
    end = jnp.minimum(end, k.shape[1])
    visible = Visible(layout.spread(first, 0), layout.spread(end, 0))
    keys, values = pack_keys(k, tile), pack_keys(v, tile)
    return _Prepared(layout, layout.pack(q, FEATURES), keys, values, visible, positions)


def _plan(ready: _Prepared, indices: Array | None, tuning: Tuning) -> Ranges | Lists:
    if indices is None:
        return ranges(ready.visible, tuning.rows, tuning.keys)
    selected = tiles_of_blocks(indices, ready.positions)
    return lists(ready.layout, selected, ready.k.shape[1] // tuning.keys, tuning.rows, tuning.warpgroups)


def _forward(
    kernels: Kernels, q: Array, k: Array, v: Array, indices: Array | None, positions: Positions
) -> tuple[Array, Array]:
    ready = _prepare(kernels, q, k, v, positions)
    plan = _plan(ready, indices, kernels.forward)
    out, lse = forward_pass(
        ready.q, ready.k, ready.v, ready.visible, plan, scale=kernels.scale, tuning=kernels.forward
    )
    out = ready.layout.unpack(out, k.shape[2], v.shape[3])
    return out, ready.layout.unpack(lse[..., None], k.shape[2], 1)[..., 0] / LOG2_E


def _forward_saving(
    kernels: Kernels, q: Array, k: Array, v: Array, indices: Array | None, positions: Positions
) -> tuple[tuple[Array, Array], Residuals]:
    out, lse = named(*_forward(kernels, q, k, v, indices, positions))
    return (out, lse), Residuals(q, k, v, indices, positions, out, lse)


def _backward(
    kernels: Kernels, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, indices, positions, _, lse = saved
    d_out, d_lse = cotangents
    shift = softmax_shift(saved, d_out, d_lse)
    ready = _prepare(kernels, q, k, v, positions)
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
