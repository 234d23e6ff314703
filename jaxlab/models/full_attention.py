"""Full and sliding attention: masks, softmax, and the implementations of others."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.models.attention import Attended, Attention
from jaxlab.models.config.attention import FASTEST
from jaxlab.models.context import AttentionContext
from jaxlab.models.kv_cache import LayerCache, write
from jaxlab.models.layers import softcap
from jaxlab.models.mesh import Part, in_parts, split_heads
from jaxlab.models.sparse_inference import sparse_attention
from jaxlab.models.taps import NO_TAP, Tap
from kernels_pallas.flow import Probe, flow_attention, read_weights, slot_factors
from kernels_pallas.nsa import window_attention, window_of_part


class FullAttention(Attention):
    """Softmax attention over the whole text or, in sliding layers, over a window of it."""

    def attend(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        *,
        kind: str,
        tap: Tap,
        cache: LayerCache | None,
    ) -> Attended:
        sliding = kind == "sliding"
        rotary = context.local_rotary if sliding else context.rotary
        q, k, v = self.project(x)
        q, k = self.with_rope(q, rotary), self.with_rope(k, rotary)
        q, k, v = tap("queries", q), tap("keys", k), tap("values", v)
        if isinstance(cache, tuple):
            slots = context.cache_slots
            k, v = write(cache[0], k, slots), write(cache[1], v, slots)
            cache = k, v = split_heads(k, batch=0, heads=2), split_heads(v, batch=0, heads=2)
        window = self.config.sliding.window if sliding else None
        read = None
        if tap.probe is not None and tap.probe.read_from is not None:
            read = self._read(q, k, context, window, tap.probe)
        return Attended(self._heads_output(q, k, v, context, window, tap), cache, weights_read=read)

    def _read(
        self, q: Array, k: Array, context: AttentionContext, window: int | None, probe: Probe
    ) -> Float[Array, "B H P"]:
        """Attention weights from one token of each row at others."""
        c, one = self.config, _Rows(probe.read_from[:, None])
        seen = attention_mask(context, k.shape[1], window, one)[:, 0]
        at = (probe.read_from, probe.read_at)
        return read_weights(
            q, k, *at, seen, scale=c.score_scale, softcap=c.attention_softcap, sinks=self._sinks
        )

    def _heads_output(
        self, q: Array, k: Array, v: Array, context: AttentionContext, window: int | None, tap: Tap
    ) -> Array:
        c, segment_ids = self.config, context.segment_ids
        cached = context.cache_slots is not None
        if c.sparsity is not None:
            if cached or tap.probe is not None or segment_ids is not None or context.together is not None:
                raise ValueError("sparsity reads one whole text a row: no cache, probe, segments or images")
            return sparse_attention(q, k, v, c.sparsity, scale=c.score_scale)
        if tap.probe is not None and tap.probe.streams and context.cache_slots is not None:
            mask = attention_mask(context, k.shape[1], window)
            factors = slot_factors(tap.probe, context.cache_slots)
            return self._softmax(q, k, v, mask, self._sinks, factors=factors)
        if tap.probe is not None and tap.probe.streams:
            return flow_attention(
                q,
                k,
                v,
                tap.probe,
                segment_ids=segment_ids,
                together=context.together,
                together_in_window=context.together_in_window,
                window=window,
                scale=c.score_scale,
                softcap=c.attention_softcap,
                sinks=self._sinks,
            )
        if tap.wants("attention_scores", "attention_pattern"):
            mask = attention_mask(context, k.shape[1], window)
            return self._softmax(q, k, v, mask, self._sinks, tap)
        if cached or not context.causal:
            return self._part_output(q, k, v, self._sinks, context, window)

        def core(
            tokens: tuple[Array, ...], rows: tuple[Any, ...], _: None, __: None, part: Part | None
        ) -> tuple[Array, None]:
            q, k, v, *sinks = tokens
            if part is not None and window is not None and self._by_neighbours(window, part):
                # Keys of the window come from the devices that have them, and from no other.
                return window_of_part(
                    q, k, v, window=window, part=part, segment_ids=rows[1], scale=self.config.score_scale
                ), None
            if part is not None:
                k, v = part.whole(k), part.whole(v)
            here = context._replace(**dict(zip(of_keys, rows, strict=True)))
            of_heads = sinks[0][0, 0] if sinks else None
            return self._part_output(q, k, v, of_heads, here, window, part), None

        of_keys = ("positions", "segment_ids", "together", "visible")
        tokens: tuple[Array, ...] = (q, k, v)
        if self._sinks is not None:  # split as the heads are: a device has those of its own
            tokens += (jnp.broadcast_to(self._sinks[None, None], q.shape[:3]),)
        of_rows = tuple(getattr(context, name) for name in of_keys)
        return in_parts(core, tokens, of_rows, None, stretches=context.stretches)[0]

    def _by_neighbours(self, window: int, part: Part) -> bool:
        """Whether a window of a split sequence is read in tiles, and reaches over one neighbour at most."""
        return self.config.attention.implementation == "chunked" and window - 1 <= part.stretch

    def _part_output(
        self,
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        context: AttentionContext,
        window: int | None,
        part: Part | None = None,
    ) -> Array:
        """Of all queries, or of those of one stretch; `context` is of all keys."""
        c = self.config
        implementation: str = c.attention.implementation
        cached = context.cache_slots is not None
        if implementation == "auto":
            marked = context.together is not None or context.visible is not None
            special = c.attention_softcap is not None or sinks is not None
            causal = context.causal and not (cached or marked or special)
            implementation = fastest(q.dtype, k.shape[1]) if causal else "xla"
        if implementation == "chunked" and not cached:
            if not context.causal or context.together is not None or context.visible is not None:
                raise ValueError("chunked attention is causal and knows no images; use xla")
            return window_attention(
                q,
                k,
                v,
                window=k.shape[1] if window is None else window,
                scale=c.score_scale,
                segment_ids=context.segment_ids,
                q_positions=None if part is None else part.positions(q.shape[0]),
            )
        if implementation in ("xla", "chunked"):
            mask = attention_mask(context, k.shape[1], window, part)
            return self._softmax(q, k, v, mask, sinks)
        kwargs: dict[str, Any] = {"implementation": implementation, "scale": c.score_scale}
        marks = (context.segment_ids, context.together, context.visible, context.apart)
        plain = all(mark is None for mark in marks)
        if plain and not cached and part is None:
            kwargs["is_causal"] = context.causal
            kwargs["local_window_size"] = None if window is None else (window - 1, 0)
        else:
            kwargs["mask"] = attention_mask(context, k.shape[1], window, part)[:, None]
        with jax.numpy_dtype_promotion("standard"):  # jax's own function mixes bfloat16 and float32 inside
            return jax.nn.dot_product_attention(q, k, v, **kwargs)

    def _softmax(
        self, q: Array, k: Array, v: Array, mask: Array, sinks: Array | None, tap: Tap = NO_TAP, **more: Any
    ) -> Array:
        c = self.config
        return softmax_attention(
            q, k, v, mask, scale=c.score_scale, cap=c.attention_softcap, sinks=sinks, tap=tap, **more
        )

    @property
    def _sinks(self) -> Array | None:
        return None if self.sinks is None else self.sinks[...]


def fastest(dtype: jax.typing.DTypeLike, length: int) -> str:
    """The implementation that is the fastest here for causal texts of so many tokens, as measured."""
    here = (jax.default_backend(), jnp.dtype(dtype).name)
    return next((name for *of, least, name in FASTEST if tuple(of) == here and length >= least), "xla")


def softmax_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    tap: Tap = NO_TAP,
    factors: Float[Array, "B H T S"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """softmax(cap(scale q k)) v, the weights times `factors` where they are given. Scores and softmax in
    float32, the output in the dtype of v.

    `sinks` stand beside the scores of every query of their head and have no value: what goes to them is lost.
    Dk and Dv may differ, unlike in jax.nn.dot_product_attention. A score has one row for each query and head
    of a group: with an axis for each, XLA takes half as long again on a CPU.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]

    def tap_heads(name: str, x: Array) -> Array:
        return tap(name, x.reshape(batch, heads, length, -1)).reshape(x.shape) if tap.wants(name) else x

    rows = q.transpose(0, 2, 1, 3).reshape(batch, k.shape[2], groups * length, dim)
    scores = jnp.einsum("bhrd,bshd->bhrs", rows, k, preferred_element_type=jnp.float32) * scale
    of_rows = jnp.broadcast_to(mask[:, None], (batch, groups, *mask.shape[1:])).reshape(
        batch, 1, -1, k.shape[1]
    )
    scores = jnp.where(of_rows, softcap(scores, cap), jnp.finfo(jnp.float32).min)
    scores = tap_heads("attention_scores", scores)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        beside = sinks.astype(jnp.float32).reshape(1, k.shape[2], groups, 1)
        beside = jnp.broadcast_to(beside, (batch, k.shape[2], groups, length)).reshape(*scores.shape[:3], 1)
        weights = jax.nn.softmax(jnp.concatenate([scores, beside], axis=-1), axis=-1)[..., :-1]
    if factors is not None:
        weights = weights * factors.reshape(weights.shape)
    weights = tap_heads("attention_pattern", weights.astype(v.dtype))
    out = jnp.einsum("bhrs,bshd->bhrd", weights, v)
    return out.reshape(batch, heads, length, v.shape[-1]).transpose(0, 2, 1, 3)


class _Rows(NamedTuple):
    """Some queries of each row of the batch, in the place of a `Part`."""

    places: Int[Array, "B T"]

    def positions(self, batch: int) -> Int[Array, "B T"]:
        """Where they stand."""
        return self.places

    def own(self, x: Array) -> Array:
        """[B, all tokens] -> [B, T]."""
        return jnp.take_along_axis(x, self.places, axis=1)


def attention_mask(
    context: AttentionContext, source_len: int, window: int | None = None, part: Part | _Rows | None = None
) -> Bool[Array, "B T S"]:
    """Which of `source_len` keys each query sees: those before it, within its window and segment."""
    batch, target_len = context.positions.shape[:2]
    cached = context.cache_slots is not None
    targets = context.cache_slots
    if targets is None:
        targets = jnp.broadcast_to(jnp.arange(target_len)[None], (batch, target_len))
    if part is not None:
        targets = part.positions(batch)
    of_targets = lambda x: x if part is None else part.own(x)
    behind = targets[:, :, None] - jnp.arange(source_len)[None, None]
    mask = behind >= 0 if context.causal else jnp.ones_like(behind, dtype=bool)
    if window is not None and not context.together_in_window:
        mask &= behind < window
    if context.together is not None:
        of_sources = context.together
        if cached:  # what was read before belongs to no image of this batch
            empty = jnp.zeros((batch, source_len), jnp.int32)
            of_sources = jax.vmap(lambda e, n, r: e.at[r].set(n, mode="drop"))(
                empty, context.together, context.cache_slots
            )
        together = of_targets(context.together)
        mask |= (together[:, :, None] == of_sources[:, None, :]) & (together > 0)[:, :, None]
    if window is not None and context.together_in_window:
        mask &= behind < window
    if context.visible is not None and not cached:
        mask &= context.visible[:, None, :]
    if context.apart is not None:
        mask &= ~(context.apart[:, :, None] & context.apart[:, None, :])
    if context.segment_ids is not None and not cached:
        mask &= of_targets(context.segment_ids)[:, :, None] == context.segment_ids[:, None, :]
    return mask
