"""Selected attention in the order of the blocks, by the Hopper kernels: for groups of few heads.

Each block of a query is an attention of its own to 64 keys, with its own log-sum-exp; the n parts are joined
afterwards. A tile of rows holds the entries of one block (block_major_plan.py), so no product is masked
away but the future and the padding, at the price of writing the rows in that order and the parts back.
Slabs of heads and chunks of queries go one after the other, so the rows that exist at once do not grow with
the number of queries (`block_major_plan.ROWS_AT_ONCE`); the gradients of keys and values are added up over
the chunks in float32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.hopper import FEATURES, LOG2_E
from kernels_pallas.nsa.base import (
    Positions,
    Residuals,
    finite,
    named,
    selected_rows,
    softmax_floor,
    softmax_shift,
    without_nan,
)
from kernels_pallas.nsa.mosaic_gpu.backward_dkv import key_gradients
from kernels_pallas.nsa.mosaic_gpu.backward_dq import query_gradient
from kernels_pallas.nsa.mosaic_gpu.block_major_plan import (
    Layout,
    Sorted,
    gather,
    lay_out,
    sort_entries,
    sum_over_slots,
)
from kernels_pallas.nsa.mosaic_gpu.common import Saved, Tuning
from kernels_pallas.nsa.mosaic_gpu.forward import forward_pass
from kernels_pallas.nsa.mosaic_gpu.plan import pack_keys, tiles_of_blocks, unpack_keys
from kernels_pallas.nsa.mosaic_gpu.target import BLOCK

_Choice = tuple[Array, Array, Array]
"""Tiles of keys of each query's slots, first key and end of the keys that it sees there."""
_Four = tuple[Array, Array, Array, Array]


class ByBlock(NamedTuple):
    """Static facts of the op; of `tuning`, keys must be 64."""

    scale: float
    tuning: Tuning


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_by_block(
    op: ByBlock,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B T Hkv n"],
    positions: Positions,
) -> tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]]:
    """As `vjp.attend` with indices. Besides operands and results in the order of the kernels it keeps
    (Dk + Dv) two-byte numbers per row forward and 2 Dk + Dv backward, for the rows of one slab and chunk."""
    return _forward(op, q, k, v, indices, positions)


class _Prepared(NamedTuple):
    """Operands in slabs of heads, those of queries in chunks."""

    layout: Layout
    q: Array
    k: Array
    v: Array
    choice: _Choice


def _prepare(op: ByBlock, q: Array, k: Array, v: Array, indices: Array, positions: Positions) -> _Prepared:
    k_rows, v_rows = pack_keys(k, BLOCK), pack_keys(v, BLOCK)
    rows = selected_rows(indices, positions, BLOCK)
    end = jnp.minimum(rows + BLOCK, jnp.minimum(positions.q_positions + 1, k.shape[1])[:, :, None, None])
    slots = [x for x in tiles_of_blocks(indices, positions) if x is not None]
    tiles, rows, end = (jnp.concatenate(x, axis=3) for x in (slots, [rows] * len(slots), [end] * len(slots)))
    layout = lay_out(tiles.shape, q.shape[3], k_rows.shape[1] // BLOCK, op.tuning.rows)
    slabs = lambda x: x.reshape(-1, layout.heads, *x.shape[1:])
    choice = layout.cut(tiles, -1), layout.cut(rows), layout.cut(end)
    return _Prepared(layout, layout.cut_rows(q, FEATURES), slabs(k_rows), slabs(v_rows), choice)


def _forward(
    op: ByBlock, q: Array, k: Array, v: Array, indices: Array, positions: Positions
) -> tuple[Array, Array]:
    ready = _prepare(op, q, k, v, indices, positions)
    layout = ready.layout

    def one_slab(slab: tuple[Array, Array, Array, _Choice]) -> tuple[Array, Array]:
        q_slab, keys, values, choices = slab

        def one_chunk(chunk: tuple[Array, _Choice]) -> tuple[Array, Array]:
            q_chunk, choice = chunk
            entries = sort_entries(layout, *choice)
            rows = gather(q_chunk, entries, layout.padded_groups)
            parts, part_lse = forward_pass(
                rows, keys, values, entries.visible, entries.plan, scale=op.scale, tuning=op.tuning
            )
            out, lse = _join(layout, entries, parts, part_lse)
            return out.astype(q.dtype).reshape(*lse.shape[:2], -1), lse

        return lax.map(one_chunk, (q_slab, choices))

    out, lse = lax.map(one_slab, (ready.q, ready.k, ready.v, ready.choice))
    return layout.join_rows(out, v.shape[3]), layout.join_rows(lse, 1)[..., 0] / LOG2_E


def _join(layout: Layout, entries: Sorted, parts: Array, part_lse: Array) -> tuple[Array, Array]:
    """Output [X, C, heads, Dv] in float32, log-sum-exp [X, C, heads] in base 2, from those of the entries."""
    of_entries = part_lse.reshape(part_lse.shape[0], -1, layout.padded_groups)
    of_slots = jax.vmap(lambda x, place: x.at[place].get(mode="promise_in_bounds"))(of_entries, entries.place)
    of_slots = jnp.where(entries.there[..., None], of_slots, -jnp.inf)
    top = finite(jnp.max(of_slots, axis=2))
    lse = top + jnp.log2(jnp.sum(jnp.exp2(of_slots - top[:, :, None]), axis=2))
    weights = jnp.exp2(of_slots - finite(lse)[:, :, None])
    return sum_over_slots(parts, entries, weights), lse


def _forward_saving(
    op: ByBlock, q: Array, k: Array, v: Array, indices: Array, positions: Positions
) -> tuple[tuple[Array, Array], Residuals]:
    out, lse = named(*_forward(op, q, k, v, indices, positions))
    return (out, lse), Residuals(q, k, v, indices, positions, out, lse)


def _backward(
    op: ByBlock, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, indices, positions, _, lse = saved
    assert indices is not None
    d_out, d_lse = cotangents
    shift = softmax_shift(saved, d_out, d_lse)
    ready = _prepare(op, q, without_nan(k), v, indices, positions)
    layout = ready.layout
    of_rows = (
        ready.q,
        layout.cut_rows(d_out.astype(q.dtype), FEATURES),
        layout.cut_rows((softmax_floor(lse) * LOG2_E)[..., None]),
        layout.cut_rows(shift[..., None]),
    )

    def one_slab(slab: tuple[_Four, Array, Array, _Choice]) -> tuple[Array, Array, Array]:
        queries, keys, values, choices = slab

        def one_chunk(
            sums: tuple[Array, Array], chunk: tuple[_Four, _Choice]
        ) -> tuple[tuple[Array, Array], Array]:
            of_queries, choice = chunk
            entries = sort_entries(layout, *choice)
            q_rows, d_rows, lse_rows, shift_rows = (
                gather(x, entries, layout.padded_groups) for x in of_queries
            )
            rows = Saved(q_rows, d_rows, lse_rows[..., 0], shift_rows[..., 0], entries.visible)
            parts = query_gradient(rows, keys, values, entries.plan, scale=op.scale, tuning=op.tuning)
            there = jnp.broadcast_to(entries.there[..., None], (*entries.there.shape, layout.padded_groups))
            dq = sum_over_slots(parts, entries, there.astype(jnp.float32)).astype(q.dtype)
            new = key_gradients(rows, keys, values, entries.readers, scale=op.scale, tuning=op.tuning)
            dk, dv = (total + part.astype(jnp.float32) for total, part in zip(sums, new, strict=True))
            return (dk, dv), dq.reshape(*dq.shape[:2], -1)

        zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
        (dk, dv), dq = lax.scan(one_chunk, zeros, (queries, choices))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    dq, dk, dv = lax.map(one_slab, (of_rows, ready.k, ready.v, ready.choice))
    dk, dv = (x.reshape(-1, *x.shape[2:]) for x in (dk, dv))
    return layout.join_rows(dq, q.shape[4]), unpack_keys(dk, k), unpack_keys(dv, v), None, None


attend_by_block.defvjp(_forward_saving, _backward)
