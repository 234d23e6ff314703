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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.flow.base import MASKED, RELEASED_LOGIT
from kernels_pallas.flow.probe import Probe
from kernels_pallas.nsa import block_starts

ELEMENTS = 1 << 21  # wanted size of one temporary
ROWS = 256  # most rows in a block
GROUPS = 4  # most groups; each is compiled once


Range = tuple[int, int]
Rows = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Branch:
    """Which keys one softmax sees. Key number m stands for `length` tokens from m * stride on, or fewer than
    `stride` rows before where texts are packed: from where `Places.starts` says (-1: for none)."""

    length: int = 1
    stride: int = 1
    window: int | None = None
    """Only keys that begin less than so many tokens ago."""
    chosen_block: int | None = None
    """Only tokens of the blocks (of this size, counted from the start of a text) that `chosen` lists for the
    row and key/value head."""
    whole: bool = False
    """The flow of a key that stands for many tokens goes whole to each of them, instead of in equal parts."""

    @property
    def by_token(self) -> bool:
        return self.length == self.stride == 1

    def keys(self, low: int, high: int, count: int) -> Range:
        """The range of key numbers, of `count`, that stand for tokens in [low, high)."""
        if self.by_token:
            return low, high
        return 0, min(count, max(0, -((self.length - high) // self.stride) + 1))

    def to_tokens(self, x: Array, starts: Array, low: int, high: int, *, divide: bool) -> Array:
        """[B, ..., keys that begin at starts [B_, keys]] -> [B, ..., tokens low..high]."""
        if self.by_token:
            return x
        start = starts[:, :, None]
        token = jnp.arange(low, high, dtype=jnp.int32)[None, None, :]
        spread = ((start >= 0) & (start <= token) & (token < start + self.length)).astype(jnp.float32)
        spread = jnp.broadcast_to(spread, (x.shape[0], *spread.shape[1:]))
        return jnp.einsum("b...m,bms->b...s", x, spread / self.length if divide else spread)


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


class Places(NamedTuple):
    """Where keys and texts begin."""

    starts: tuple[Array, ...]
    """int32[B or 1, M] of each branch: the first token of each key, -1 for none."""
    texts: Array
    """int32[B or 1, T]: the first token of each token's text."""

    def within(self, at: list[Range]) -> "Places":
        """Of the keys in a range of each branch."""
        return self._replace(starts=tuple(x[:, slice(*r)] for x, r in zip(self.starts, at, strict=True)))


def _places(spec: BranchSpec, counts: list[int], tokens: int, segment_ids: Array | None) -> Places:
    def of_branch(branch: Branch, count: int) -> Array:
        if segment_ids is None or branch.by_token:
            return jnp.arange(count, dtype=jnp.int32)[None] * branch.stride
        return block_starts(segment_ids, block_len=branch.length, stride=branch.stride)

    starts = tuple(of_branch(b, count) for b, count in zip(spec.branches, counts, strict=True))
    if segment_ids is None:
        return Places(starts, jnp.zeros((1, tokens), jnp.int32))
    new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    row = jnp.arange(tokens, dtype=jnp.int32)[None]
    return Places(starts, jax.lax.cummax(jnp.where(new, row, 0), axis=1))


def _by_head(xs: tuple[Array, ...]) -> list[Array]:
    """[B, S, Hkv, D] -> float32 [Hkv, B, S, D]."""
    return [x.astype(jnp.float32).transpose(2, 0, 1, 3) for x in xs]


def _visible(
    branch: Branch, start: Array, texts: Array, rows: Rows, chosen: Array | None, segment_ids: Array | None
) -> Array:
    """bool[B or 1, rows, S]: which of the keys that begin at start [B or 1, S] each row sees."""
    row = rows["row"][None, :, None]
    seen = (start[:, None] >= 0) & (start[:, None] + (branch.length - 1) <= row)
    if branch.window is not None:
        seen &= row - start[:, None] < branch.window
    if segment_ids is not None:
        # A key that stands for tokens of one text only needs no look at its last one.
        mine = rows["segment"][:, :, None]
        at = jnp.broadcast_to(jnp.maximum(start, 0), (segment_ids.shape[0], start.shape[1]))
        seen = seen & (mine != 0) & (jnp.take_along_axis(segment_ids, at, axis=1)[:, None] == mine)
    if branch.chosen_block is not None:
        assert chosen is not None
        blocks = jnp.arange(-(-texts.shape[1] // branch.chosen_block), dtype=jnp.int32)
        listed = jnp.any(chosen[..., None] == blocks[None, None, None], axis=-2)
        own = start - jnp.take_along_axis(
            texts, jnp.broadcast_to(start, (texts.shape[0], start.shape[1])), axis=1
        )
        own = jnp.broadcast_to(own // branch.chosen_block, (listed.shape[0], own.shape[1]))
        seen = seen & jnp.take_along_axis(listed, own[:, None], axis=2)
    return seen


def _logits(
    spec: BranchSpec,
    blocking: str,
    branch: Branch,
    start: Array,
    texts: Array,
    rows: Rows,
    q: Array,
    k: Array,
    chosen: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array, Array | None]:
    """(logits [B, H / Hkv, rows, S], seen, allowed: False on the edges that blocking cuts, or None)."""
    seen = _visible(branch, start, texts, rows, chosen, segment_ids)
    scores = jnp.einsum("bgrd,bsd->bgrs", q, k) * spec.scale
    allowed = None
    if rows["blocked"] is not None:
        allowed = ~(rows["blocked"][:, :, None] & (start[:, None] < rows["row"][None, :, None]))
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
    places = _places(spec, stream.counts, stream.tokens, segment_ids)
    inputs = stream.rows_of(q, chosen, segment_ids, probe)
    parts = []
    for blocks, _, _, at, ks, vs in stream.groups(_by_head(keys), _by_head(values)):
        here = places.within(at)

        def block(_: None, rows: Rows, here: Places = here, ks: Any = ks, vs: Any = vs) -> Any:
            def head(_: None, one: Rows) -> Any:
                outs, norms = [], []
                for branch, start, k, v in zip(spec.branches, here.starts, one["k"], one["v"], strict=True):
                    of_row = (rows, one["q"], k, one["chosen"], segment_ids)
                    scores, seen, allowed = _logits(spec, probe.blocking, branch, start, here.texts, *of_row)
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
    here: Places,
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
    each = zip(spec.branches, here.starts, one["k"], one["v"], one["norm"], one["d_out"], strict=True)
    for branch, start, k, v, norm, d_out in each:
        scores, seen, allowed = _logits(
            spec, blocking, branch, start, here.texts, rows, one["q"], k, one["chosen"], segment_ids
        )
        softmax = jnp.where(seen[:, None], jnp.exp(scores - norm[..., None]), 0.0)
        acting = _acting(blocking, softmax, allowed)
        part = acting * jnp.einsum("bgrd,bsd->bgrs", d_out, v)
        d_scores = (part - softmax * jnp.sum(part, axis=-1, keepdims=True)) * spec.scale
        d_q += jnp.einsum("bgrs,bsd->bgrd", d_scores, k)
        d_ks.append(jnp.einsum("bgrs,bgrd->bsd", d_scores, one["q"]))
        d_vs.append(jnp.einsum("bgrs,bgrd->bsd", acting, d_out))
        flow += branch.to_tokens(part, start, low, high, divide=not branch.whole)
        if edges is not None:
            real = (seen if allowed is None else seen & allowed).astype(jnp.float32)
            edges |= branch.to_tokens(real, start, low, high, divide=False) > 0.0
    return flow, edges, d_q, d_ks, d_vs


def _backward(spec: BranchSpec, saved: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Any, ...]:
    q, keys, values, chosen, segment_ids, probe, norms = saved
    stream = _Stream(spec, q, keys)
    places = _places(spec, stream.counts, stream.tokens, segment_ids)
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
            places_here = places.within(at)
            here = lambda what: jnp.where(before, what.astype(jnp.float32), 0.0)

            def head(carry: Any, one: Rows) -> Any:
                signed, absolute, edges = carry
                flow, edges, *gradients = _head_gradients(
                    spec, probe.blocking, places_here, low, high, rows, one, segment_ids, edges
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
