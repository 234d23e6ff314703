"""Full and sliding attention: masks, softmax, and the implementations of others."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import softcap
from jaxlab.models.mesh import Part, in_parts
from jaxlab.models.probe import Probe, probed_attention
from jaxlab.models.sparse_inference import sparse_attention
from jaxlab.models.where import Where
from kernels_pallas.nsa import window_attention


def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    where: Where,
    config: ModelConfig,
    window: int | None,
    causal: bool,
    probe: Probe | None,
    cached: bool,
) -> Array:
    scale = config.key_dim**-0.5 if config.attention_scale is None else config.attention_scale
    if config.sparsity.method != "none":
        if cached or probe is not None or where.segment_ids is not None or where.together is not None:
            raise ValueError("sparsity reads one whole text a row: no cache, probe, segments or images")
        return sparse_attention(q, k, v, config.sparsity, scale=scale)
    if probe is not None:
        if config.attention_softcap is not None or where.together is not None:
            raise ValueError("flows and blocking know no softcap and no images that see themselves whole")
        return probed_attention(q, k, v, probe, segment_ids=where.segment_ids, window=window, scale=scale)
    if cached or not causal:
        return _dense_part(q, k, v, where, config, window, causal, cached, scale)

    def core(
        tokens: tuple[Array, ...], rows: tuple[Any, ...], _: None, __: None, part: Part | None
    ) -> tuple[Array, None]:
        q, k, v = tokens
        if part is not None:
            k, v = part.whole(k), part.whole(v)
        here = where._replace(**dict(zip(of_keys, rows, strict=True)))
        return _dense_part(q, k, v, here, config, window, causal, cached, scale, part), None

    of_keys = ("positions", "segment_ids", "together", "visible")
    return in_parts(core, (q, k, v), tuple(getattr(where, name) for name in of_keys), None)[0]


def _dense_part(
    q: Array,
    k: Array,
    v: Array,
    where: Where,
    config: ModelConfig,
    window: int | None,
    causal: bool,
    cached: bool,
    scale: float,
    part: Part | None = None,
) -> Array:
    """Of all queries, or of those of one stretch; `where` is of all keys."""
    if config.attention_implementation == "chunked" and not cached:
        if not causal or where.together is not None or where.visible is not None:
            raise ValueError("chunked attention is causal and knows no images; use xla")
        reach = k.shape[1] if window is None else window
        positions = None if part is None else part.positions(q.shape[0])
        return window_attention(
            q, k, v, window=reach, scale=scale, segment_ids=where.segment_ids, q_positions=positions
        )
    mask = lambda: _mask(where, k.shape[1], window, causal, cached, part)
    if config.attention_implementation in ("xla", "chunked"):
        return _softmax_attention(q, k, v, mask(), scale, config.attention_softcap)
    kwargs: dict[str, Any] = {"implementation": config.attention_implementation, "scale": scale}
    plain = where.segment_ids is None and where.together is None and where.visible is None
    if plain and not cached and part is None:
        kwargs |= {"is_causal": causal, "local_window_size": None if window is None else (window - 1, 0)}
    else:
        kwargs["mask"] = mask()[:, None]
    with jax.numpy_dtype_promotion("standard"):  # jax's own function mixes bfloat16 and float32 inside
        return jax.nn.dot_product_attention(q, k, v, **kwargs)


def _softmax_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    mask: Bool[Array, "B T S"],
    scale: float,
    cap: float | None,
) -> Float[Array, "B T H Dv"]:
    """Scores and softmax in float32. Dk and Dv may differ, unlike in jax.nn.dot_product_attention.

    A score has one row for each query and head of a group: with an axis for each, XLA takes half as long
    again on a CPU.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    rows = q.transpose(0, 2, 1, 3).reshape(batch, k.shape[2], groups * length, dim)
    scores = jnp.einsum("bhrd,bshd->bhrs", rows, k, preferred_element_type=jnp.float32) * scale
    of_rows = jnp.broadcast_to(mask[:, None], (batch, groups, *mask.shape[1:])).reshape(
        batch, 1, -1, k.shape[1]
    )
    scores = jnp.where(of_rows, softcap(scores, cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhrs,bshd->bhrd", weights, v)
    return out.reshape(batch, heads, length, v.shape[-1]).transpose(0, 2, 1, 3)


def _mask(
    where: Where, source_len: int, window: int | None, causal: bool, cached: bool, part: Part | None = None
) -> Bool[Array, "B T S"]:
    batch, target_len = where.positions.shape[:2]
    targets = where.rows if cached else jnp.broadcast_to(jnp.arange(target_len)[None], (batch, target_len))
    if part is not None:
        targets = part.positions(batch)
    assert targets is not None
    of_targets = lambda x: x if part is None else part.own(x)
    behind = targets[:, :, None] - jnp.arange(source_len)[None, None]
    mask = behind >= 0 if causal else jnp.ones_like(behind, dtype=bool)
    if window is not None and not where.together_in_window:
        mask &= behind < window
    if where.together is not None:
        of_sources = where.together
        if cached:  # rows that were read before belong to no image of this batch
            empty = jnp.zeros((batch, source_len), jnp.int32)
            of_sources = jax.vmap(lambda e, n, r: e.at[r].set(n, mode="drop"))(
                empty, where.together, where.rows
            )
        together = of_targets(where.together)
        mask |= (together[:, :, None] == of_sources[:, None, :]) & (together > 0)[:, :, None]
    if window is not None and where.together_in_window:
        mask &= behind < window
    if where.visible is not None and not cached:
        mask &= where.visible[:, None, :]
    if where.segment_ids is not None and not cached:
        mask &= of_targets(where.segment_ids)[:, :, None] == where.segment_ids[:, None, :]
    return mask
