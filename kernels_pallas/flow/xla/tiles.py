"""Full and sliding attention with its flows, by square tiles of queries and keys, all heads at once.

Tiles that the causal order or the window hides are skipped; temporaries are [B, H, rows, rows]. The tiles of
short texts are written out, those of others are loops. The backward pass recomputes a tile's attention A,
forms P = A * dA in float32, which the softmax's own backward needs anyway, adds it over the heads and reduces
it to sums over pairs of token classes at once.

Axis letters besides those of api.py: N tiles along the tokens, G = H / Hkv query heads of a key/value head.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from kernels_pallas.flow.base import (
    FLOW_RESIDUALS,
    MASKED,
    RELEASED_LOGIT,
    Marks,
    Spec,
    softcapped,
    through_softcap,
)
from kernels_pallas.flow.probe import Probe

ELEMENTS = 3 << 17
"""Of a tile of all heads: a few of them stay in the cache of a core."""
MOST_ROWS = 256
"""Of a tile."""
UNROLLED = 3
"""So few tiles along the tokens are written out one by one, which XLA simplifies; more are loops."""


class _Layout(NamedTuple):
    """How tokens and heads become tiles; static."""

    batch: int
    tokens: int
    kv_heads: int
    rows: int
    tiles: int

    def cut(self, x: Array, heads: int | None = None) -> Float[Array, "N B Hkv G rows D"]:
        """[B, T, H, D] -> tiles in the dtype of `x`; rows added at the end are 0."""
        x = jnp.pad(x, [(0, 0), (0, self.tiles * self.rows - self.tokens), (0, 0), (0, 0)])
        x = x.reshape(self.batch, self.tiles, self.rows, self.kv_heads, -1, x.shape[-1])
        return x.transpose(1, 0, 3, 4, 2, 5)

    def join(self, x: Float[Array, "N B Hkv G rows D"]) -> Float[Array, "B T H D"]:
        """The way back."""
        x = x.transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.batch, self.tiles * self.rows, -1, x.shape[-1])[:, : self.tokens]

    def cut_marks(self, x: Array | None, fill: int = 0) -> Array | None:
        """[B, T, ...] -> [N, B, rows, ...]."""
        if x is None:
            return None
        extra = self.tiles * self.rows - self.tokens
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return x.reshape(self.batch, self.tiles, self.rows, *x.shape[2:]).swapaxes(0, 1)


def _layout(spec: Spec, q: Array, k: Array) -> _Layout:
    batch, tokens, heads, _ = q.shape
    fit = math.isqrt(ELEMENTS // (batch * heads)) // 16 * 16
    most = spec.rows or max(32, min(MOST_ROWS, fit))
    least = max(1, math.ceil(tokens / most))
    if spec.rows or least == 1:
        return _Layout(batch, tokens, k.shape[2], tokens if least == 1 else most, least)
    rows_of = lambda tiles: math.ceil(tokens / tiles / 16) * 16
    # A few tiles more, where they leave less of the last one empty.
    tiles = min(range(least, least + 3), key=lambda tiles: tiles * rows_of(tiles))
    rows = rows_of(tiles)
    return _Layout(batch, tokens, k.shape[2], rows, math.ceil(tokens / rows))


class _Cut(NamedTuple):
    """What goes with the tokens, in tiles [N, B, rows, ...]."""

    segment_ids: Array | None
    together: Array | None
    blocked: Array | None
    one_hot: Array | None
    """float32, of the token classes."""


def _cut_marks(layout: _Layout, marks: Marks, probe: Probe) -> _Cut:
    tap = next((x for x in (probe.class_tap, probe.count_tap, probe.factors) if x is not None), None)
    one_hot = None if tap is None else jax.nn.one_hot(probe.classes, tap.shape[-1], dtype=jnp.float32)
    each = (marks.segment_ids, marks.together, probe.blocked, one_hot)
    return _Cut(*(layout.cut_marks(x) for x in each))


class _Pair(NamedTuple):
    """Who sees whom in one tile, and what acts on it."""

    seen: Bool[Array, "B_ rows rows"]
    before: Bool[Array, "rows rows"]
    """The key stands before the query."""
    allowed: Bool[Array, "B rows rows"] | None
    """False on the edges that blocking cuts."""
    factor: Float[Array, "B Hkv G rows rows"] | None


def _pair(spec: Spec, layout: _Layout, cut: _Cut, probe: Probe, i: Any, j: Any) -> _Pair:
    """Of the queries of tile i and the keys of tile j."""
    own, other = (jax.tree.map(lambda x, n=n: _at(x, n), cut) for n in (i, j))
    step = jnp.arange(layout.rows, dtype=jnp.int32)
    behind = (i * layout.rows + step)[:, None] - (j * layout.rows + step)[None]
    before, seen = behind > 0, (behind >= 0)[None]
    near = None if spec.window is None else (behind < spec.window)[None]
    if near is not None and not spec.together_in_window:
        seen = seen & near
    if own.together is not None:
        same = own.together[:, :, None] == other.together[:, None]
        seen = seen | (same & (own.together > 0)[:, :, None])
    if near is not None and spec.together_in_window:
        seen = seen & near
    if own.segment_ids is not None:
        same = own.segment_ids[:, :, None] == other.segment_ids[:, None]
        seen = seen & same & (own.segment_ids != 0)[:, :, None]
    allowed = None if own.blocked is None else ~(own.blocked[:, :, None] & before[None])
    factor = None
    if probe.factors is not None:  # 1 where a token has no class
        of_rows = jnp.einsum("brx,bhxy->bhry", own.one_hot, probe.factors.astype(jnp.float32) - 1.0)
        factor = jnp.einsum("bhry,bsy->bhrs", of_rows, other.one_hot)
        factor = 1.0 + jnp.where(before[None, None], factor, 0.0)
        factor = factor.reshape(layout.batch, layout.kv_heads, -1, *factor.shape[2:])
    return _Pair(seen, before, allowed, factor)


def _of_heads(mask: Bool[Array, "B_ rows rows"]) -> Bool[Array, "B_ 1 1 rows rows"]:
    return mask[:, None, None]


def _scores(spec: Spec, pair: _Pair, probe: Probe, q: Array, k: Array) -> Array:
    """Masked logits [B, Hkv, G, rows, rows], float32; what is hidden is MASKED."""
    scores = softcapped(_product("bkgrd,bksd->bkgrs", q, k) * spec.scale, spec.softcap)
    if pair.allowed is not None and probe.blocking == "released_code":
        scores = jnp.where(_of_heads(pair.allowed), scores, RELEASED_LOGIT)
    return jnp.where(_of_heads(pair.seen), scores, MASKED)


def _acting(pair: _Pair, probe: Probe, weights: Array) -> Array:
    """The attention that acts: the softmax, less what is blocked, times the factors."""
    if pair.allowed is not None and probe.blocking == "paper":
        weights = jnp.where(_of_heads(pair.allowed), weights, 0.0)
    return weights if pair.factor is None else weights * pair.factor


def _product(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *(x.astype(jnp.float32) for x in operands))


def _at(x: Array, index: Any) -> Array:
    return lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _through(
    spec: Spec, layout: _Layout, marks: Marks, i: Any, step: Callable[[Any, Any], Any], carry: Any
) -> Any:
    """carry = step(j, carry) for each tile of keys that the queries of tile i may see."""
    low: Any = 0
    high = layout.tiles if marks.together is not None else i + 1
    if spec.window is not None and (marks.together is None or spec.together_in_window):
        first = (i * layout.rows - spec.window + 1) // layout.rows
        low = max(0, first) if isinstance(i, int) else jnp.maximum(0, first)
    if not isinstance(i, int):
        return lax.fori_loop(low, high, step, carry)
    for j in range(low, high):
        carry = step(j, carry)
    return carry


def _over_blocks(
    layout: _Layout, block: Callable[[Any, Any], tuple[Any, Any]], carry: Any, of_blocks: tuple[Array, ...]
) -> tuple[Any, Any]:
    """As `lax.scan` over the blocks of queries; `block` also gets the number of each, last."""
    if layout.tiles > UNROLLED:
        every = jnp.arange(layout.tiles, dtype=jnp.int32)
        return lax.scan(block, carry, (*of_blocks, every))
    results = []
    for i in range(layout.tiles):
        carry, result = block(carry, (*(x[i] for x in of_blocks), i))
        results.append(result)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_attention(
    spec: Spec,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    marks: Marks,
    probe: Probe,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """Attention in the dtype of q whose cotangents include those of the probe's taps."""
    return _forward(spec, q, k, v, marks, probe, sinks)[0]


def _forward(
    spec: Spec, q: Array, k: Array, v: Array, marks: Marks, probe: Probe, sinks: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    layout = _layout(spec, q, k)
    cut = _cut_marks(layout, marks, probe)
    operands = (layout.cut(q), layout.cut(k)[:, :, :, 0], layout.cut(v)[:, :, :, 0])
    *named, name_output, name_lse = (functools.partial(checkpoint_name, name=name) for name in FLOW_RESIDUALS)
    queries, keys, values = (name(x) for name, x in zip(named, operands, strict=True))
    shape = (layout.batch, layout.kv_heads, q.shape[2] // layout.kv_heads, layout.rows)
    beside = None if sinks is None else sinks.astype(jnp.float32).reshape(1, *shape[1:3], 1)

    def block(_: None, of_block: tuple[Any, ...]) -> tuple[None, tuple[Array, Array]]:
        rows, i = of_block

        def step(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            pair = _pair(spec, layout, cut, probe, i, j)
            scores = _scores(spec, pair, probe, rows, _at(keys, j))
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(_of_heads(pair.seen), jnp.exp(scores - new_top[..., None]), 0.0)
            old = jnp.exp(top - new_top)
            total = total * old + jnp.sum(weights, axis=-1)
            weights = _acting(pair, probe, weights)
            out = out * old[..., None] + _product("bkgrs,bksd->bkgrd", weights, _at(values, j))
            return new_top, total, out

        top = jnp.full(shape, MASKED, jnp.float32) if beside is None else jnp.broadcast_to(beside, shape)
        total = jnp.full(shape, 0.0 if beside is None else 1.0, jnp.float32)
        carry = (top, total, jnp.zeros((*shape, v.shape[-1]), jnp.float32))
        top, total, out = _through(spec, layout, marks, i, step, carry)
        total = jnp.where(total > 0.0, total, 1.0)
        return None, (out / total[..., None], top + jnp.log(total))

    _, (outs, lse) = _over_blocks(layout, block, None, (queries,))
    outs, lse = name_output(outs), name_lse(lse)
    # The output is kept in float32: its product with the cotangent stands for the sums of P over the keys.
    saved = (queries, keys, values, marks, probe, sinks, outs, lse)
    return layout.join(outs).astype(q.dtype), saved


class _Sums(NamedTuple):
    """What the tiles of one block of queries add up to, where a tap asks for it."""

    flow: Float[Array, "B *H rows K"] | None
    edges: Float[Array, "B rows K"] | None
    factor: Float[Array, "B H rows K"] | None
    signed: Float[Array, "B rows T"] | None

    @staticmethod
    def empty(layout: _Layout, probe: Probe) -> "_Sums":
        size = lambda tap: (*tap.shape[:-2], layout.rows, tap.shape[-1])
        taps = (probe.class_tap, probe.count_tap, probe.factors)
        sums = [None if tap is None else jnp.zeros(size(tap), jnp.float32) for tap in taps]
        width = layout.tiles * layout.rows
        of_map = (layout.batch, layout.rows, width)
        picture = None if probe.map_tap is None else jnp.zeros(of_map, jnp.float32)
        return _Sums(sums[0], sums[1], sums[2], picture)

    def plus(
        self, pair: _Pair, probe: Probe, j: Any, one_hot: Array | None, part: Array, plain: Array
    ) -> "_Sums":
        """With one tile's P, of the weights that act (`part`) and of the softmax's (`plain`)."""
        by_head = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
        before = pair.before[None]
        signed = None
        if self.signed is not None or (self.flow is not None and not probe.per_head):
            signed = jnp.sum(part, axis=(1, 2))
        flow, edges, factor, picture = self
        if flow is not None:
            if probe.per_head:
                what = by_head(part) if probe.signed else jnp.abs(by_head(part))
                what = jnp.where(before[None], what, 0.0)
                flow = flow + jnp.einsum("bhrs,bsk->bhrk", what, one_hot)
            else:
                assert signed is not None
                absolute = jnp.sum(jnp.abs(part), axis=(1, 2)) if probe.needs_absolute else None
                what = probe.of_head_sum(signed, absolute, part.shape[1] * part.shape[2])
                flow = flow + jnp.einsum("brs,bsk->brk", jnp.where(before, what, 0.0), one_hot)
        if edges is not None:
            real = pair.seen if pair.allowed is None else pair.seen & pair.allowed
            real = jnp.broadcast_to(real & before, (edges.shape[0], *before.shape[1:]))
            edges = edges + jnp.einsum("brs,bsk->brk", real.astype(jnp.float32), one_hot)
        if factor is not None:
            what = jnp.where(before[None], by_head(plain), 0.0)
            factor = factor + jnp.einsum("bhrs,bsk->bhrk", what, one_hot)
        if picture is not None:
            assert signed is not None
            start = j * signed.shape[-1]
            picture = lax.dynamic_update_slice_in_dim(picture, signed, start, axis=2)
        return _Sums(flow, edges, factor, picture)

    def by_class(self, one_hot: Array | None) -> tuple[Array | None, ...]:
        """The first three, added over the queries of each class too."""
        add = lambda x: jnp.einsum("brc,brk->bck" if x.ndim == 3 else "brc,bhrk->bhck", one_hot, x)
        return tuple(None if x is None else add(x) for x in self[:3])


def _backward(spec: Spec, saved: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    queries, keys, values, marks, probe, sinks, outs, lse = saved
    tiles, batch, kv_heads, size, _ = keys.shape
    layout = _Layout(batch, d_out.shape[1], kv_heads, size, tiles)
    cut = _cut_marks(layout, marks, probe)
    beside = None if sinks is None else sinks.astype(jnp.float32).reshape(1, layout.kv_heads, -1, 1)
    zeros = lambda x: None if x is None else jnp.zeros(x.shape, jnp.float32)
    totals = (zeros(probe.class_tap), zeros(probe.count_tap), zeros(probe.factors))

    def block(carry: tuple[Any, ...], of_block: tuple[Any, ...]) -> tuple[Any, tuple[Any, Any]]:
        d_keys, d_values, d_sinks, totals = carry
        rows, d_rows, out, norm, i = of_block
        d_rows = d_rows.astype(jnp.float32)
        whole = jnp.sum(d_rows * out, axis=-1)  # the sum of P over the keys

        def step(j: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            d_q, d_keys, d_values, sums = carry
            pair = _pair(spec, layout, cut, probe, i, j)
            key, value = _at(keys, j), _at(values, j)
            scores = _scores(spec, pair, probe, rows, key)
            softmax = jnp.where(_of_heads(pair.seen), jnp.exp(scores - norm[..., None]), 0.0)
            d_acting = _product("bkgrd,bksd->bkgrs", d_rows, value)
            acting = _acting(pair, probe, softmax)
            part = acting * d_acting
            d_scores = through_softcap(part - softmax * whole[..., None], scores, spec.softcap) * spec.scale
            if spec.softcap is not None:  # what is hidden has no score
                d_scores = jnp.where(_of_heads(pair.seen), d_scores, 0.0)
            d_q = d_q + _product("bkgrs,bksd->bkgrd", d_scores, key)
            d_keys = _add(d_keys, j, _product("bkgrs,bkgrd->bksd", d_scores, rows))
            d_values = _add(d_values, j, _product("bkgrs,bkgrd->bksd", acting, d_rows))
            one_hot = None if cut.one_hot is None else _at(cut.one_hot, j)
            plain = part
            if probe.factors is not None:
                plain = _acting(pair._replace(factor=None), probe, softmax) * d_acting
            return d_q, d_keys, d_values, sums.plus(pair, probe, j, one_hot, part, plain)

        start = (jnp.zeros(rows.shape, jnp.float32), d_keys, d_values, _Sums.empty(layout, probe))
        d_q, d_keys, d_values, sums = _through(spec, layout, marks, i, step, start)
        if beside is not None:
            d_sinks = d_sinks - jnp.sum(jnp.exp(beside - norm) * whole, axis=(0, 3))
        news = sums.by_class(None if cut.one_hot is None else _at(cut.one_hot, i))
        totals = jax.tree.map(jnp.add, totals, news)
        return (d_keys, d_values, d_sinks, totals), (d_q.astype(queries.dtype), sums.signed)

    d_sinks = None if beside is None else jnp.zeros(beside.shape[1:3], jnp.float32)
    carry = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32), d_sinks, totals)
    of_blocks = (queries, layout.cut(d_out), outs, lse)
    (d_keys, d_values, d_sinks, totals), (d_q, signed) = _over_blocks(layout, block, carry, of_blocks)
    d_map = None
    if signed is not None:
        d_map = signed.swapaxes(0, 1).reshape(layout.batch, -1, signed.shape[-1])
        d_map = d_map[:, : layout.tokens, : layout.tokens]
    d_probe = probe.cotangent(class_tap=totals[0], count_tap=totals[1], factors=totals[2], map_tap=d_map)
    join = lambda x, like: layout.join(x[:, :, :, None]).astype(like.dtype)
    if sinks is not None and d_sinks is not None:
        d_sinks = d_sinks.reshape(-1).astype(sinks.dtype)
    return layout.join(d_q), join(d_keys, keys), join(d_values, values), None, d_probe, d_sinks


def _add(x: Array, index: Any, new: Array) -> Array:
    """`x` with `new` added to one of its tiles."""
    return lax.dynamic_update_index_in_dim(x, _at(x, index) + new, index, 0)


tiled_attention.defvjp(_forward, _backward)
