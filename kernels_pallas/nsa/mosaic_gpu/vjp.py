"""The Hopper kernels as one differentiable function: attention to intervals of keys, or to blocks."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import LOG2_E, ROWS
from kernels_pallas.nsa.base import (
    Positions,
    Residuals,
    ceil_div,
    intervals,
    named,
    softmax_floor,
    softmax_shift,
    without_nan,
)
from kernels_pallas.nsa.mosaic_gpu.backward_dkv import key_gradients
from kernels_pallas.nsa.mosaic_gpu.backward_dq import query_gradient
from kernels_pallas.nsa.mosaic_gpu.common import Inverse, Lists, Ranges, Saved, Tuning, Visible
from kernels_pallas.nsa.mosaic_gpu.forward import Others, forward_pass
from kernels_pallas.nsa.mosaic_gpu.plan import (
    Rows,
    inverse,
    lists,
    plan_rows,
    ranges,
    readers,
    tiles_of_blocks,
)
from kernels_pallas.nsa.mosaic_gpu.query_rows import Place, give_keys, key_shape, place_of, take_keys


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
    return forward(kernels, q, k, v, indices, positions)


class _Prepared(NamedTuple):
    """Operands in the order of the kernels."""

    layout: Rows
    q: Array
    k: Array
    v: Array
    visible: Visible
    positions: Positions
    places: tuple[Place, Place]
    """Of queries and outputs."""


def _prepare(kernels: Kernels, q: Array, k: Array, v: Array, positions: Positions) -> _Prepared:
    most = max(kernels.forward.rows, kernels.query.rows)
    layout = plan_rows(q.shape[1], q.shape[3], most)
    tile = max(kernels.forward.keys, kernels.query.keys, ROWS)
    first, end = intervals(positions, kernels.stride, kernels.offset, kernels.window)
    end = jnp.minimum(end, k.shape[1])
    visible = Visible(layout.spread(first, 0), layout.spread(end, 0))
    q_place = place_of(layout, q)
    out_place = place_of(layout, jax.ShapeDtypeStruct((*q.shape[:4], v.shape[3]), q.dtype))
    k_rows, v_rows = give_keys(k, v, tile)
    return _Prepared(layout, q_place.give(q), k_rows, v_rows, visible, positions, (q_place, out_place))


def _plan(ready: _Prepared, indices: Array | None, tuning: Tuning) -> Ranges | Lists:
    if indices is None:
        return ranges(ready.visible, tuning.rows, tuning.keys)
    selected = tiles_of_blocks(indices, ready.positions)
    return lists(
        ready.layout, selected, key_shape(ready.k).length // tuning.keys, tuning.rows, tuning.warpgroups
    )


def forward(
    kernels: Kernels, q: Array, k: Array, v: Array, indices: Array | None, positions: Positions
) -> tuple[Array, Array]:
    """`attend` without its derivative."""
    out, lse = _forward(kernels, q, k, v, indices, positions, None)
    return out, lse


def forward_and_sum(
    kernels: Kernels,
    q: Array,
    k: Array,
    v: Array,
    positions: Positions,
    others: tuple[Array, Array],
    gates: Float[Array, "B T Hkv G 3"],
) -> tuple[Array, Array, Array]:
    """`forward` of an interval, and the sum of the two other outputs and this one, each times its gate."""
    out, lse, together = _forward(kernels, q, k, v, None, positions, (*others, gates))
    return out, lse, together


def _forward(
    kernels: Kernels,
    q: Array,
    k: Array,
    v: Array,
    indices: Array | None,
    positions: Positions,
    added: tuple[Array, Array, Array] | None,
) -> tuple[Array, ...]:
    ready = _prepare(kernels, q, k, v, positions)
    plan = _plan(ready, indices, kernels.forward)
    others = None
    if added is not None:
        give, gates = ready.places[1].give, ready.layout.pack(added[2].astype(jnp.float32))
        others = Others(give(added[0]), give(added[1]), jnp.moveaxis(gates, 2, 0))
    out, lse, *sums = forward_pass(
        ready.q,
        ready.k,
        ready.v,
        ready.visible,
        plan,
        scale=kernels.scale,
        tuning=kernels.forward,
        places=ready.places,
        others=others,
    )
    sums = [ready.places[1].take(x, v.shape[3]) for x in sums]
    out = ready.places[1].take(out, v.shape[3])
    return out, ready.layout.unpack(lse[..., None], k.shape[2], 1)[..., 0] / LOG2_E, *sums


def _forward_saving(
    kernels: Kernels, q: Array, k: Array, v: Array, indices: Array | None, positions: Positions
) -> tuple[tuple[Array, Array], Residuals]:
    out, lse = named(*forward(kernels, q, k, v, indices, positions))
    return (out, lse), Residuals(q, k, v, indices, positions, out, lse)


def _backward(
    kernels: Kernels, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, indices, positions, _, lse = saved
    d_out, d_lse = cotangents
    shift = softmax_shift(saved, d_out, d_lse)
    return *gradients(kernels, q, k, v, indices, positions, lse, d_out, shift), None, None


def gradients(
    kernels: Kernels,
    q: Array,
    k: Array,
    v: Array,
    indices: Array | None,
    positions: Positions,
    lse: Float[Array, "B T Hkv G"],
    d_out: Float[Array, "B T Hkv G Dv"],
    shift: Float[Array, "B T Hkv G"],
    *,
    gate: Float[Array, "B T Hkv G"] | None = None,
    before: Float[Array, "B T Hkv G Dk"] | None = None,
) -> tuple[Array, Array, Array]:
    """Of q, k and v. With `gate` the output was multiplied by it, and `shift` is of `d_out` without it;
    `before` is added to the gradient of q."""
    ready = _prepare(kernels, q, without_nan(k), v, positions)
    pack = lambda x: ready.layout.pack(x[..., None])[..., 0]
    rows = Saved(
        ready.q,
        ready.places[1].give(d_out.astype(q.dtype)),
        pack(softmax_floor(lse) * LOG2_E),
        pack(shift),
        ready.visible,
        ready.places,
        None if gate is None else pack(gate),
    )
    plan = _plan(ready, indices, kernels.query)
    before = None if before is None else ready.places[0].give(before)
    dq = query_gradient(
        rows, ready.k, ready.v, plan, scale=kernels.scale, tuning=kernels.query, before=before
    )
    dq = ready.places[0].take(dq, q.shape[4])

    row_plan = _plan(ready, indices, dataclasses.replace(kernels.key, warpgroups=1, keys=ROWS))
    tiles = ceil_div(key_shape(ready.k).length, ROWS)
    turned: Array | Inverse
    if isinstance(row_plan, Lists):
        turned, bits = inverse(row_plan, tiles), row_plan.row_bits
    else:
        turned, bits = readers(row_plan, tiles), None
    dk, dv = key_gradients(
        rows, ready.k, ready.v, turned, row_bits=bits, scale=kernels.scale, tuning=kernels.key
    )
    return dq, take_keys(dk, k), take_keys(dv, v)


attend.defvjp(_forward_saving, _backward)
