"""Native sparse attention with its flows, by blocks of rows, one key/value head at a time.

The three branches are softmaxes over keys of their own, of the same queries, and their flows are added edge
by edge before the heads are. Forward and backward hold temporaries of [B, H / Hkv, rows, S] only. The
backward pass recomputes the attention of a block of rows, forms P = A * dA, adds it over the heads, and
reduces it to sums over pairs of token classes at once. Blocks of rows are gathered into a few groups, and a
group reads only the keys that its rows can see.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.flow.base import MASKED, RELEASED_LOGIT
from kernels_pallas.flow.probe import Probe

ELEMENTS = 1 << 21  # wanted size of one temporary
ROWS = 256  # most rows in a block
GROUPS = 4  # most groups; each is compiled once


Range = tuple[int, int]
Rows = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Branch:
    """Which keys one softmax sees. Key number m stands for the tokens [m * stride, m * stride + length)."""

    length: int = 1
    stride: int = 1
    window: int | None = None
    """Only keys that begin less than so many tokens ago."""
    chosen_block: int | None = None
    """Only tokens of the blocks (of this size) that `chosen` lists for the row and key/value head."""
    whole: bool = False
    """The flow of a key that stands for many tokens goes whole to each of them, instead of in equal parts."""

    @property
    def by_token(self) -> bool:
        return self.length == self.stride == 1

    def keys(self, low: int, high: int, count: int) -> Range:
        """The range of key numbers, of `count`, that stand for tokens in [low, high)."""
        if self.by_token:
            return low, high
        return 0, min(count, max(0, (high - self.length) // self.stride + 1))

    def to_tokens(self, x: Array, at: Range, low: int, high: int, *, divide: bool) -> Array:
        """[..., keys in the range `at`] -> [..., tokens low..high]."""
        if self.by_token:
            return x
        start = jnp.arange(at[0], at[1], dtype=jnp.int32)[:, None] * self.stride
        token = jnp.arange(low, high, dtype=jnp.int32)[None, :]
        spread = ((start <= token) & (token < start + self.length)).astype(jnp.float32)
        return x @ (spread / self.length if divide else spread)


@dataclasses.dataclass(frozen=True)
class BranchSpec:
    """What is static: a softmax per branch, all of the same queries."""

    branches: tuple[Branch, ...]
    scale: float
    rows: int | None


class _Stream:
    """Cuts [B, T, ...] arrays into blocks of rows and says which keys a group of blocks can see."""

    def __init__(self, spec: BranchSpec, q: Array, keys: tuple[Array, ...]):
        self.batch, self.tokens, self.heads, _ = q.shape
        self.kv_heads = keys[0].shape[2]
        self.share = self.heads // self.kv_heads
        fit = ELEMENTS // (self.batch * self.share * self.tokens)
        self.rows = min(self.tokens, spec.rows or max(16, min(ROWS, fit // 16 * 16)))
        self.blocks = math.ceil(self.tokens / self.rows)
        self.branches = spec.branches
        self.counts = [k.shape[1] for k in keys]

    def cut(self, x: Array, fill: int = 0) -> Array:
        """[B, T, ...] -> [blocks, B, rows, ...]; rows added at the end see and count for nothing."""
        extra = self.blocks * self.rows - self.tokens
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return x.reshape(self.batch, self.blocks, self.rows, *x.shape[2:]).swapaxes(0, 1)

    def cut_heads(self, x: Array) -> Array:
        """[B, T, H, D] -> float32 [blocks, Hkv, B, H / Hkv, rows, D]."""
        x = self.cut(x.astype(jnp.float32))
        x = x.reshape(*x.shape[:3], self.kv_heads, self.share, x.shape[-1])
        return x.transpose(0, 3, 1, 4, 2, 5)

    def join_heads(self, x: Array) -> Array:
        """The way back from `cut_heads`."""
        x = x.transpose(2, 0, 4, 1, 3, 5)
        return x.reshape(self.batch, self.blocks * self.rows, self.heads, x.shape[-1])[:, : self.tokens]

    def rows_of(
        self, q: Array, chosen: Array | None, segment_ids: Array | None, probe: Probe
    ) -> dict[str, Any]:
        """Everything that goes with the rows, cut into blocks."""
        some = lambda x, *fill: None if x is None else self.cut(x, *fill)
        if chosen is not None:
            chosen = self.cut(chosen.swapaxes(1, 2), -1).transpose(0, 3, 1, 2, 4)
        row = jnp.arange(self.blocks * self.rows, dtype=jnp.int32).reshape(self.blocks, self.rows)
        return {
            "q": self.cut_heads(q),
            "row": row,
            "segment": some(segment_ids),
            "blocked": some(probe.blocked),
            "chosen": chosen,
        }

    def groups(
        self, keys: list[Array], values: list[Array]
    ) -> Iterator[tuple[slice, int, int, Any, Any, Any]]:
        """Yields (slice of blocks, first token, end token, ranges of keys, keys, values) of each group."""
        per_group = math.ceil(self.blocks / GROUPS)
        windows = [b.window for b in self.branches if b.window is not None]
        for first in range(0, self.blocks, per_group):
            last = min(first + per_group, self.blocks)
            low = max(0, first * self.rows - max(windows) + 1) if len(windows) == len(self.branches) else 0
            high = min(last * self.rows, self.tokens)
            at = [b.keys(low, high, count) for b, count in zip(self.branches, self.counts, strict=True)]
            ks = [k[:, :, slice(*r)] for k, r in zip(keys, at, strict=True)]
            vs = [v[:, :, slice(*r)] for v, r in zip(values, at, strict=True)]
            yield slice(first, last), low, high, at, ks, vs


def _by_head(xs: tuple[Array, ...]) -> list[Array]:
    """[B, S, Hkv, D] -> float32 [Hkv, B, S, D]."""
    return [x.astype(jnp.float32).transpose(2, 0, 1, 3) for x in xs]


def _visible(branch: Branch, at: Range, rows: Rows, chosen: Array | None, segment_ids: Array | None) -> Array:
    """bool[B or 1, rows, S]: which keys of a range each row sees."""
    start = jnp.arange(at[0], at[1], dtype=jnp.int32) * branch.stride
    end = start + (branch.length - 1)
    row = rows["row"][:, None]
    seen = end[None, :] <= row
    if branch.window is not None:
        seen &= row - start[None, :] < branch.window
    seen = seen[None]
    if segment_ids is not None:
        mine = rows["segment"][:, :, None]
        seen = seen & (mine != 0)
        seen &= (segment_ids[:, start][:, None] == mine) & (segment_ids[:, end][:, None] == mine)
    if branch.chosen_block is not None:
        assert chosen is not None
        blocks = jnp.arange(-(-at[1] // branch.chosen_block), dtype=jnp.int32)
        listed = jnp.any(chosen[..., None] == blocks[None, None, None], axis=-2)
        seen = seen & jnp.take(listed, start // branch.chosen_block, axis=-1)
    return seen


def _logits(
    spec: BranchSpec,
    blocking: str,
    branch: Branch,
    at: Range,
    rows: Rows,
    q: Array,
    k: Array,
    chosen: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array, Array | None]:
    """(logits [B, H / Hkv, rows, S], seen, allowed: False on the edges that blocking cuts, or None)."""
    seen = _visible(branch, at, rows, chosen, segment_ids)
    scores = jnp.einsum("bgrd,bsd->bgrs", q, k) * spec.scale
    allowed = None
    if rows["blocked"] is not None:
        start = jnp.arange(at[0], at[1], dtype=jnp.int32) * branch.stride
        allowed = ~(rows["blocked"][:, :, None] & (start[None, :] < rows["row"][:, None])[None])
        if blocking == "released_code":
            scores = jnp.where(allowed[:, None], scores, RELEASED_LOGIT)
    return jnp.where(seen[:, None], scores, MASKED), seen, allowed


def _acting(blocking: str, weights: Array, allowed: Array | None) -> Array:
    """The attention that acts: the softmax, without the edges that blocking in the paper's sense cuts."""
    if allowed is None or blocking == "released_code":
        return weights
    return jnp.where(allowed[:, None], weights, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def branched_attention(
    spec: BranchSpec,
    q: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    chosen: Array | None,
    segment_ids: Array | None,
    probe: Probe,
) -> tuple[Array, ...]:
    """One output [B, T, H, Dv] per branch, from q [B, T, H, Dk] and a tuple of keys and of values [B, S, Hkv,
    D]."""
    return _forward(spec, q, keys, values, chosen, segment_ids, probe)[0]


def _forward(
    spec: BranchSpec,
    q: Array,
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    chosen: Array | None,
    segment_ids: Array | None,
    probe: Probe,
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    stream = _Stream(spec, q, keys)
    inputs = stream.rows_of(q, chosen, segment_ids, probe)
    parts = []
    for blocks, _, _, at, ks, vs in stream.groups(_by_head(keys), _by_head(values)):

        def block(_: None, rows: Rows, at: Any = at, ks: Any = ks, vs: Any = vs) -> Any:
            def head(_: None, one: Rows) -> Any:
                outs, norms = [], []
                for branch, where, k, v in zip(spec.branches, at, one["k"], one["v"], strict=True):
                    scores, seen, allowed = _logits(
                        spec, probe.blocking, branch, where, rows, one["q"], k, one["chosen"], segment_ids
                    )
                    top = jnp.max(scores, axis=-1, initial=MASKED)
                    weights = jnp.where(seen[:, None], jnp.exp(scores - top[..., None]), 0.0)
                    total = jnp.sum(weights, axis=-1)
                    total = jnp.where(total > 0.0, total, 1.0)
                    weights = _acting(probe.blocking, weights, allowed)
                    outs.append(jnp.einsum("bgrs,bsd->bgrd", weights, v) / total[..., None])
                    norms.append(top + jnp.log(total))
                return None, (outs, norms)

            by_head = {"q": rows["q"], "chosen": rows["chosen"], "k": ks, "v": vs}
            return None, jax.lax.scan(head, None, by_head)[1]

        parts.append(jax.lax.scan(block, None, jax.tree.map(lambda x, cut=blocks: x[cut], inputs))[1])
    outs, norms = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    outs = tuple(stream.join_heads(out).astype(q.dtype) for out in outs)
    return outs, (q, keys, values, chosen, segment_ids, probe, norms)


def _head_gradients(
    spec: BranchSpec,
    blocking: str,
    at: list[Range],
    low: int,
    high: int,
    rows: Rows,
    one: Rows,
    segment_ids: Array | None,
    edges: Array | None,
) -> tuple[Array, Array | None, Array, list[Array], list[Array]]:
    """One key/value head of one block of rows -> (flow per query head, edges seen so far, d_q, d_keys,
    d_values)."""
    flow = jnp.zeros((*one["q"].shape[:3], high - low), jnp.float32)
    d_q, d_ks, d_vs = jnp.zeros_like(one["q"]), [], []
    each = zip(spec.branches, at, one["k"], one["v"], one["norm"], one["d_out"], strict=True)
    for branch, where, k, v, norm, d_out in each:
        scores, seen, allowed = _logits(
            spec, blocking, branch, where, rows, one["q"], k, one["chosen"], segment_ids
        )
        softmax = jnp.where(seen[:, None], jnp.exp(scores - norm[..., None]), 0.0)
        acting = _acting(blocking, softmax, allowed)
        part = acting * jnp.einsum("bgrd,bsd->bgrs", d_out, v)
        d_scores = (part - softmax * jnp.sum(part, axis=-1, keepdims=True)) * spec.scale
        d_q += jnp.einsum("bgrs,bsd->bgrd", d_scores, k)
        d_ks.append(jnp.einsum("bgrs,bgrd->bsd", d_scores, one["q"]))
        d_vs.append(jnp.einsum("bgrs,bgrd->bsd", acting, d_out))
        flow += branch.to_tokens(part, where, low, high, divide=not branch.whole)
        if edges is not None:
            real = (seen if allowed is None else seen & allowed).astype(jnp.float32)
            edges |= branch.to_tokens(real, where, low, high, divide=False) > 0.0
    return flow, edges, d_q, d_ks, d_vs


def _backward(spec: BranchSpec, saved: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Any, ...]:
    q, keys, values, chosen, segment_ids, probe, norms = saved
    stream = _Stream(spec, q, keys)
    inputs = stream.rows_of(q, chosen, segment_ids, probe)
    inputs |= {"norm": norms, "d_out": [stream.cut_heads(c) for c in cotangents]}
    taps = {"flow": probe.class_tap, "count": probe.count_tap}
    taps = {name: tap for name, tap in taps.items() if tap is not None}
    one_hot: Any = None
    for tap in taps.values():
        one_hot = jax.nn.one_hot(probe.classes, tap.shape[-1], dtype=jnp.float32)
        inputs["one_hot"] = stream.cut(one_hot)
    keys_by_head, values_by_head = _by_head(keys), _by_head(values)
    like_zeros = {"k": keys_by_head, "v": values_by_head, **taps}
    totals = jax.tree.map(jnp.zeros_like, like_zeros)
    parts = []
    for blocks, low, high, at, ks, vs in stream.groups(keys_by_head, values_by_head):

        def block(
            totals: Any,
            rows: Rows,
            low: int = low,
            high: int = high,
            at: Any = at,
            ks: Any = ks,
            vs: Any = vs,
        ) -> Any:
            before = jnp.arange(low, high, dtype=jnp.int32)[None, :] < rows["row"][:, None]
            here = lambda what: jnp.where(before, what.astype(jnp.float32), 0.0)

            def head(carry: Any, one: Rows) -> Any:
                signed, absolute, edges = carry
                flow, edges, *gradients = _head_gradients(
                    spec, probe.blocking, at, low, high, rows, one, segment_ids, edges
                )
                signed += jnp.sum(flow, axis=1)
                if absolute is not None:
                    absolute += jnp.sum(jnp.abs(flow), axis=1)
                by_class = None
                if probe.per_head:
                    what = here(flow if probe.signed else jnp.abs(flow))
                    by_class = jnp.einsum("bgrs,bsk->bgrk", what, one_hot[:, low:high])
                    by_class = jnp.einsum("brc,bgrk->bgck", rows["one_hot"], by_class)
                return (signed, absolute, edges), (by_class, gradients)

            nothing = jnp.zeros((stream.batch, stream.rows, high - low), jnp.float32)
            absolute = nothing if probe.needs_absolute and not probe.per_head else None
            edges = nothing.astype(bool) if "count" in taps else None
            by_head = {name: rows[name] for name in ("q", "chosen", "norm", "d_out")}
            by_head |= {"k": ks, "v": vs}
            (signed, absolute, edges), (by_class, (d_q, d_ks, d_vs)) = jax.lax.scan(
                head, (nothing, absolute, edges), by_head
            )
            for name, news in (("k", d_ks), ("v", d_vs)):
                both = zip(totals[name], news, at, strict=True)
                totals = totals | {name: [old.at[:, :, slice(*r)].add(new) for old, new, r in both]}
            whats: Any = {"count": edges}
            if by_class is not None:  # [Hkv, B, G, K, K]
                totals = totals | {
                    "flow": totals["flow"] + by_class.swapaxes(0, 1).reshape(taps["flow"].shape)
                }
            elif "flow" in taps:
                whats["flow"] = probe.of_head_sum(signed, absolute, stream.heads)
            for name, what in whats.items():
                if what is not None:
                    of_keys = jnp.einsum("brs,bsk->brk", here(what), one_hot[:, low:high])
                    new = jnp.einsum("brc,brk->bck", rows["one_hot"], of_keys)
                    totals = totals | {name: totals[name] + new}
            if probe.map_tap is None:
                return totals, (d_q, None)
            return totals, (d_q, jnp.pad(signed, [(0, 0), (0, 0), (low, stream.tokens - high)]))

        totals, part = jax.lax.scan(block, totals, jax.tree.map(lambda x, cut=blocks: x[cut], inputs))
        parts.append(part)
    d_q, signed_map = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    if signed_map is not None:
        signed_map = signed_map.swapaxes(0, 1).reshape(stream.batch, -1, stream.tokens)[:, : stream.tokens]
    like = lambda ds, xs: tuple(d.transpose(1, 2, 0, 3).astype(x.dtype) for d, x in zip(ds, xs, strict=True))
    d_probe = probe.cotangent(class_tap=totals.get("flow"), count_tap=totals.get("count"), map_tap=signed_map)
    d_q = stream.join_heads(d_q).astype(q.dtype)
    return d_q, like(totals["k"], keys), like(totals["v"], values), None, None, d_probe


branched_attention.defvjp(_forward, _backward)
