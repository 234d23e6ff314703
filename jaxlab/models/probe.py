"""Attention with taps: the gradient with respect to a tap *is* the information flow.

Saliency of one layer (Wang et al. 2023, "Label Words are Anchors", section 2.1): P = sum over heads of A * dL/dA, and
I = |P|; I[i, j] is the flow from token j to token i. `probed_attention` gives the outputs of plain attention, but its
backward pass also hands these flows, streamed over blocks of rows, to the taps of a `Probe`; no T x T array per head
is ever kept. A tap's own value is never read.

How a decoder uses it. Leaves of a `Probe` are per layer (leading axis L) or shared; the layers are scanned:

    per_layer, shared = probe.split()
    def layer(x, inputs):
        weights, layer_probe = inputs
        ...
        out = probed_attention(q, k, v, layer_probe.join(shared), segment_ids=segment_ids, window=window)
        ...
    x, _ = jax.lax.scan(layer, x, (params["layers"], per_layer))

Native sparse attention has three softmaxes per layer. It calls `probed_branches` once for all of them, so that the flows of
one edge are added before the absolute value, and multiplies each output by its gate afterwards: the gate then is in the
cotangent, hence in the flow.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Reduction = Literal["abs_of_sum", "sum_of_abs"]
Blocking = Literal["paper", "released_code"]

MASKED = -1e30  # stands for minus infinity, without the NaN of inf - inf in rows that see nothing
RELEASED_LOGIT = -10000.0  # the logit of a blocked edge in the released code
ELEMENTS = 1 << 21  # aim for the size of one temporary [B, H / Hkv, rows, S]
ROWS = 128  # most rows in a block
GROUPS = 8  # row blocks are unrolled into at most so many groups, each with its own static range of keys


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("class_tap", "count_tap", "map_tap", "blocked", "classes"),
    meta_fields=("reduction", "blocking"),
)
@dataclasses.dataclass(frozen=True)
class Probe:
    """What to read from, and what to block in, the attention of every layer. A pytree; every leaf may be None.

    The fields are typed `Any` because a pytree holds tracers, slices of one layer and cotangents as well.
    """

    class_tap: Any = None
    """float32[L, B, K, K]: its cotangent is the flow summed over the edges j < i, class of i (row), class of j (column)."""
    count_tap: Any = None
    """float32[L, B, K, K]: its cotangent is the number of visible edges j < i of each pair of classes."""
    map_tap: Any = None
    """float32[L, B, T, T]: its cotangent is P, the signed flow map [to i, from j], diagonal included."""
    blocked: Any = None
    """bool[L, B, T]: tokens i to which nothing flows from tokens j < i."""
    classes: Any = None
    """int32[B, T], shared by all layers: the class of each token, 0..K-1, or -1 for none. Needed by the first two taps."""
    reduction: Reduction = "abs_of_sum"
    """Over heads: |sum of P| as the paper's text has it, or sum of |P| (its footnote 3). The map is signed either way."""
    blocking: Blocking = "paper"
    """`paper`: A[i, j] = 0 after the softmax. `released_code`: the logit is -10000 before it, so the row renormalises."""

    def split(self) -> tuple["Probe", "Probe"]:
        """(leaves with a leading layer axis: to be scanned over, leaves shared by all layers)."""
        per_layer = dataclasses.replace(self, classes=None)
        shared = dataclasses.replace(self, class_tap=None, count_tap=None, map_tap=None, blocked=None)
        return per_layer, shared

    def join(self, shared: "Probe") -> "Probe":
        """The probe of one layer: this one's leaves (a slice of `split()[0]`) with the shared ones."""
        return dataclasses.replace(self, classes=shared.classes)


@dataclasses.dataclass(frozen=True)
class Branch:
    """Which keys one softmax sees. Static. Key number m stands for the tokens [m * stride, m * stride + length)."""

    length: int = 1
    stride: int = 1
    window: int | None = None
    """Only keys that begin less than so many tokens ago."""
    chosen_block: int | None = None
    """Only tokens of the blocks (of this size) that `chosen` lists for the row and key/value head."""
    whole: bool = False
    """The flow of a key that stands for many tokens goes whole to each of them, instead of in equal parts."""


@dataclasses.dataclass(frozen=True)
class _Spec:
    branches: tuple[Branch, ...]
    scale: float
    rows: int | None


def probed_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    probe: Probe,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    rows: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """Causal attention, grouped heads allowed, that a `Probe` of one layer reads and blocks.

    `segment_ids`: tokens see their own segment only; 0 is padding, which sees nothing, is seen by none, and has output 0.
    `window`: the last so many tokens, the current one included. `scale`: default Dk ** -0.5. `rows`: rows of one block of
    the stream, chosen from the sizes by default. Arithmetic is float32; the output has the dtype of q.
    """
    (out,) = probed_branches(
        q, ((k, v),), (Branch(window=window),), probe, segment_ids=segment_ids, scale=scale, rows=rows
    )
    return out


def probed_branches(
    q: Float[Array, "B T H Dk"],
    pairs: tuple[tuple[Float[Array, "B _ Hkv Dk"], Float[Array, "B _ Hkv _"]], ...],
    branches: tuple[Branch, ...],
    probe: Probe,
    *,
    chosen: Int[Array, "B Hkv T n"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    rows: int | None = None,
) -> tuple[Float[Array, "B T H _"], ...]:
    """Several attentions of the same queries, each with its own softmax: one output per (keys, values) and `Branch`.

    Per head the flows of the branches are added edge by edge, then the heads are reduced. `chosen` lists, for branches with
    `chosen_block`, the chosen blocks (-1: none).
    """
    if q.shape[2] % pairs[0][0].shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {pairs[0][0].shape[2]} key/value heads")
    if (probe.class_tap is not None or probe.count_tap is not None) and probe.classes is None:
        raise ValueError("class_tap and count_tap need the token classes: Probe(classes=...)")
    spec = _Spec(branches, q.shape[-1] ** -0.5 if scale is None else scale, rows)
    keys, values = tuple(k for k, _ in pairs), tuple(v for _, v in pairs)
    return _attend(spec, q, keys, values, chosen, segment_ids, probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, keys, values, chosen, segment_ids, probe):
    return _attend_forward(spec, q, keys, values, chosen, segment_ids, probe)[0]


# --- the stream: rows in blocks, blocks in groups with a static range of keys


class _Stream:
    """Cuts [B, T, ...] arrays into blocks of rows, and knows which keys a group of blocks can see."""

    def __init__(self, spec: _Spec, q: Array, kv_heads: int):
        self.batch, self.tokens, self.heads, _ = q.shape
        self.kv_heads, self.share = kv_heads, q.shape[2] // kv_heads
        fit = ELEMENTS // (self.batch * self.share * self.tokens)
        self.rows = min(self.tokens, spec.rows or max(16, min(ROWS, fit // 16 * 16)))
        self.blocks = math.ceil(self.tokens / self.rows)
        self.branches = spec.branches

    def pad(self, x: Array, fill: int = 0) -> Array:
        """[B, T, ...] -> [B, blocks * rows, ...]; what is added is never seen by a real row, nor counted."""
        extra = self.blocks * self.rows - self.tokens
        return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)

    def cut(self, x: Array | None, fill: int = 0) -> Array | None:
        """[B, T, ...] -> [blocks, B, rows, ...]."""
        if x is None:
            return None
        x = self.pad(x, fill)
        return x.reshape(self.batch, self.blocks, self.rows, *x.shape[2:]).swapaxes(0, 1)

    def cut_heads(self, x: Array) -> Array:
        """[B, T, H, D] -> [blocks, Hkv, B, H / Hkv, rows, D]."""
        x = self.cut(x)
        x = x.reshape(*x.shape[:3], self.kv_heads, self.share, x.shape[-1])
        return x.transpose(0, 3, 1, 4, 2, 5)

    def join_heads(self, x: Array) -> Array:
        """The way back from `cut_heads`."""
        x = x.transpose(2, 0, 4, 1, 3, 5)
        return x.reshape(self.batch, self.blocks * self.rows, self.heads, x.shape[-1])[:, : self.tokens]

    def groups(self):
        """(slice of blocks, first token, end token): the tokens that these blocks can see."""
        per_group = math.ceil(self.blocks / GROUPS)
        windows = [b.window for b in self.branches]
        for first in range(0, self.blocks, per_group):
            last = min(first + per_group, self.blocks)
            low = 0 if None in windows else max(0, first * self.rows - max(windows) + 1)
            yield slice(first, last), low, min(last * self.rows, self.tokens)

    def keys(self, branch: Branch, low: int, high: int, count: int) -> tuple[int, int]:
        """The range of key numbers of a branch that stand for tokens in [low, high)."""
        if branch.length == branch.stride == 1:
            return low, high
        return 0, min(count, max(0, (high - branch.length) // branch.stride + 1))


def _by_head(x: Array) -> Array:
    """[B, S, Hkv, D] -> float32 [Hkv, B, S, D]."""
    return x.astype(jnp.float32).transpose(2, 0, 1, 3)


def _visible(branch: Branch, key_range, row, segments, segment_rows, chosen_rows):
    """bool[B or 1, rows, S]: which of the keys in a range each row sees."""
    start = jnp.arange(*key_range, dtype=jnp.int32) * branch.stride
    end = start + (branch.length - 1)
    seen = end[None, :] <= row[:, None]
    if branch.window is not None:
        seen &= row[:, None] - start[None, :] < branch.window
    seen = seen[None]
    if segments is not None:
        mine = segment_rows[:, :, None]
        seen = (
            seen & (mine != 0) & (segments[:, start][:, None] == mine) & (segments[:, end][:, None] == mine)
        )
    if branch.chosen_block is not None:
        blocks = jnp.arange(-(-key_range[1] // branch.chosen_block), dtype=jnp.int32)
        listed = jnp.any(chosen_rows[..., None] == blocks[None, None, None], axis=-2)
        seen = seen & jnp.take(listed, start // branch.chosen_block, axis=-1)
    return seen


def _allowed(branch: Branch, key_range, row, blocked_rows):
    """bool[B, rows, S]: False on the edges that blocking cuts, those from a token before the row."""
    start = jnp.arange(*key_range, dtype=jnp.int32) * branch.stride
    return ~(blocked_rows[:, :, None] & (start[None, :] < row[:, None])[None])


def _scores(spec: _Spec, blocking: Blocking, q, k, seen, allowed):
    """Logits [B, H / Hkv, rows, S], with MASKED where nothing is seen."""
    scores = jnp.einsum("bgrd,bsd->bgrs", q, k) * spec.scale
    if allowed is not None and blocking == "released_code":
        scores = jnp.where(allowed[:, None], scores, RELEASED_LOGIT)
    return jnp.where(seen[:, None], scores, MASKED)


def _kept(blocking: Blocking, weights, allowed):
    """The attention that acts: the softmax without the edges that blocking in the sense of the paper cuts."""
    if allowed is None or blocking == "released_code":
        return weights
    return jnp.where(allowed[:, None], weights, 0.0)


def _row_inputs(stream: _Stream, q, chosen, segment_ids, probe):
    """Everything that goes with the rows, cut into blocks."""
    return {
        "q": stream.cut_heads(q.astype(jnp.float32)),
        "row": jnp.arange(stream.blocks * stream.rows, dtype=jnp.int32).reshape(stream.blocks, stream.rows),
        "segment": stream.cut(segment_ids),
        "blocked": stream.cut(probe.blocked),
        "chosen": None if chosen is None else stream.cut(chosen.swapaxes(1, 2), -1).transpose(0, 3, 1, 2, 4),
    }


def _attend_forward(spec, q, keys, values, chosen, segment_ids, probe):
    stream = _Stream(spec, q, keys[0].shape[2])
    inputs = _row_inputs(stream, q, chosen, segment_ids, probe)
    keys_by_head, values_by_head = [_by_head(k) for k in keys], [_by_head(v) for v in values]
    parts = []
    for blocks, low, high in stream.groups():
        ranges = [stream.keys(b, low, high, k.shape[1]) for b, k in zip(spec.branches, keys, strict=True)]
        ks = [k[:, :, slice(*r)] for k, r in zip(keys_by_head, ranges, strict=True)]
        vs = [v[:, :, slice(*r)] for v, r in zip(values_by_head, ranges, strict=True)]

        def block(_, rows, ranges=ranges, ks=ks, vs=vs):
            def head(_, one):
                outs, norms = [], []
                for number, branch in enumerate(spec.branches):
                    at = ranges[number]
                    seen = _visible(branch, at, rows["row"], segment_ids, rows["segment"], one["chosen"])
                    blocked = rows["blocked"]
                    allowed = None if blocked is None else _allowed(branch, at, rows["row"], blocked)
                    scores = _scores(spec, probe.blocking, one["q"], one["k"][number], seen, allowed)
                    top = jnp.max(scores, axis=-1, initial=MASKED)
                    weights = jnp.where(seen[:, None], jnp.exp(scores - top[..., None]), 0.0)
                    total = jnp.sum(weights, axis=-1)
                    total = jnp.where(total > 0.0, total, 1.0)
                    weights = _kept(probe.blocking, weights, allowed)
                    outs.append(jnp.einsum("bgrs,bsd->bgrd", weights, one["v"][number]) / total[..., None])
                    norms.append(top + jnp.log(total))
                return None, (outs, norms)

            by_head = {"q": rows["q"], "chosen": rows["chosen"], "k": ks, "v": vs}
            return None, jax.lax.scan(head, None, by_head)[1]

        parts.append(jax.lax.scan(block, None, jax.tree.map(lambda x, at=blocks: x[at], inputs))[1])
    outs, norms = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    outs = tuple(stream.join_heads(out).astype(q.dtype) for out in outs)
    return outs, (q, keys, values, chosen, segment_ids, probe, norms)


def _attend_backward(spec, saved, cotangents):
    q, keys, values, chosen, segment_ids, probe, norms = saved
    stream = _Stream(spec, q, keys[0].shape[2])
    batch, tokens = stream.batch, stream.tokens
    inputs = _row_inputs(stream, q, chosen, segment_ids, probe)
    inputs["norm"] = norms
    inputs["out"] = [stream.cut_heads(c.astype(jnp.float32)) for c in cotangents]
    pairs = one_hot = None
    for tap in (probe.class_tap, probe.count_tap):
        pairs = pairs if tap is None else jnp.zeros(tap.shape, jnp.float32)
    if pairs is not None:
        one_hot = jax.nn.one_hot(probe.classes, pairs.shape[-1], dtype=jnp.float32)
        inputs["one_hot"] = stream.cut(one_hot)
    keys_by_head, values_by_head = [_by_head(k) for k in keys], [_by_head(v) for v in values]
    totals = {
        "k": [jnp.zeros_like(k) for k in keys_by_head],
        "v": [jnp.zeros_like(v) for v in values_by_head],
        "flow": None if probe.class_tap is None else pairs,
        "count": None if probe.count_tap is None else pairs,
    }
    parts = []
    for blocks, low, high in stream.groups():
        ranges = [stream.keys(b, low, high, k.shape[1]) for b, k in zip(spec.branches, keys, strict=True)]
        ks = [k[:, :, slice(*r)] for k, r in zip(keys_by_head, ranges, strict=True)]
        vs = [v[:, :, slice(*r)] for v, r in zip(values_by_head, ranges, strict=True)]

        def block(totals, rows, low=low, high=high, ranges=ranges, ks=ks, vs=vs):
            def head(carry, one):
                signed, absolute, edges = carry
                flow = jnp.zeros((batch, stream.share, stream.rows, high - low), jnp.float32)
                d_q, d_ks, d_vs = jnp.zeros_like(one["q"]), [], []
                for number, branch in enumerate(spec.branches):
                    at = ranges[number]
                    seen = _visible(branch, at, rows["row"], segment_ids, rows["segment"], one["chosen"])
                    blocked = rows["blocked"]
                    allowed = None if blocked is None else _allowed(branch, at, rows["row"], blocked)
                    scores = _scores(spec, probe.blocking, one["q"], one["k"][number], seen, allowed)
                    norm = one["norm"][number]
                    softmax = jnp.where(seen[:, None], jnp.exp(scores - norm[..., None]), 0.0)
                    acting = _kept(probe.blocking, softmax, allowed)
                    d_out = one["out"][number]
                    part = acting * jnp.einsum("bgrd,bsd->bgrs", d_out, one["v"][number])
                    d_scores = (part - softmax * jnp.sum(part, axis=-1, keepdims=True)) * spec.scale
                    d_q += jnp.einsum("bgrs,bsd->bgrd", d_scores, one["k"][number])
                    d_ks.append(jnp.einsum("bgrs,bgrd->bsd", d_scores, one["q"]))
                    d_vs.append(jnp.einsum("bgrs,bgrd->bsd", acting, d_out))
                    flow += _to_tokens(branch, part, at, low, high, equal=not branch.whole)
                    if edges is not None:
                        real = seen if allowed is None else seen & allowed
                        edges |= _to_tokens(branch, real.astype(jnp.float32), at, low, high) > 0.0
                signed += jnp.sum(flow, axis=1)
                if absolute is not None:
                    absolute += jnp.sum(jnp.abs(flow), axis=1)
                return (signed, absolute, edges), (d_q, d_ks, d_vs)

            empty = jnp.zeros((batch, stream.rows, high - low), jnp.float32)
            start = (
                empty,
                empty if probe.reduction == "sum_of_abs" else None,
                None if probe.count_tap is None else jnp.zeros(empty.shape, bool),
            )
            by_head = {name: rows[name] for name in ("q", "chosen", "norm", "out")} | {"k": ks, "v": vs}
            (signed, absolute, edges), (d_q, d_ks, d_vs) = jax.lax.scan(head, start, by_head)
            totals = dict(totals)
            for name, news in (("k", d_ks), ("v", d_vs)):
                news = zip(totals[name], news, ranges, strict=True)
                totals[name] = [total.at[:, :, slice(*at)].add(new) for total, new, at in news]
            if one_hot is not None:
                before = (jnp.arange(low, high, dtype=jnp.int32)[None, :] < rows["row"][:, None])[None]
                flow = jnp.abs(signed) if absolute is None else absolute
                for name, what in (("flow", flow), ("count", edges)):
                    if totals[name] is not None:
                        what = jnp.where(before, what.astype(jnp.float32), 0.0)
                        by_class = jnp.einsum("brs,bsk->brk", what, one_hot[:, low:high])
                        totals[name] += jnp.einsum("brc,brk->bck", rows["one_hot"], by_class)
            picture = None
            if probe.map_tap is not None:
                picture = jnp.pad(signed, [(0, 0), (0, 0), (low, tokens - high)])
            return totals, (d_q, picture)

        totals, part = jax.lax.scan(block, totals, jax.tree.map(lambda x, at=blocks: x[at], inputs))
        parts.append(part)
    d_q, picture = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    if picture is not None:
        picture = picture.swapaxes(0, 1).reshape(batch, -1, tokens)[:, :tokens]
    d_keys = tuple(d.transpose(1, 2, 0, 3).astype(k.dtype) for d, k in zip(totals["k"], keys, strict=True))
    d_values = tuple(
        d.transpose(1, 2, 0, 3).astype(v.dtype) for d, v in zip(totals["v"], values, strict=True)
    )
    d_probe = dataclasses.replace(
        probe,
        class_tap=totals["flow"],
        count_tap=totals["count"],
        map_tap=picture,
        blocked=None,
        classes=None,
    )
    return stream.join_heads(d_q).astype(q.dtype), d_keys, d_values, None, None, d_probe


def _to_tokens(branch: Branch, x: Array, key_range, low: int, high: int, equal: bool = False) -> Array:
    """[..., keys of a branch] -> [..., tokens low..high]; `equal` divides among the tokens a key stands for."""
    if branch.length == branch.stride == 1:
        return x
    start = jnp.arange(*key_range, dtype=jnp.int32)[:, None] * branch.stride
    token = jnp.arange(low, high, dtype=jnp.int32)[None, :]
    spread = ((start <= token) & (token < start + branch.length)).astype(jnp.float32)
    return x @ (spread / branch.length if equal else spread)


_attend.defvjp(_attend_forward, _attend_backward)
