"""Attention of one layer: projections, positions, the cache, and the kinds full, sliding and nsa."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.models.config import BRANCHES, ModelConfig
from jaxlab.models.layers import norm, softcap
from jaxlab.models.modules import Params
from jaxlab.models.probe import Probe, probed_attention, probed_nsa_attention
from jaxlab.models.rotary import Rotary, rotary_table, rotate
from jaxlab.models.selectors import auxiliary_loss, auxiliary_scores, block_bounds, bound_scores
from jaxlab.models.sparse_inference import sparse_attention
from kernels_pallas.nsa import best_blocks, compress_blocks, nsa_attention, window_attention


class Where(NamedTuple):
    """Where the tokens of a batch stand: what every layer's attention needs to know of them."""

    positions: Int[Array, "B T *axes"]
    """Position within the sequence; with M-RoPE its three coordinates."""
    segment_ids: Int[Array, "B T"] | None = None
    """Packed sequences; 0 is padding. None: one sequence a row, no padding."""
    rows: Int[Array, "B T"] | None = None
    """With a cache: the row of the cache that each token takes."""
    together: Int[Array, "B T"] | None = None
    """Tokens of one number above 0 see each other whatever their order (the patches of an image)."""
    local_segments: Int[Array, "B T"] | None = None
    """Segments of sliding layers, where they are others (the windows of a vision tower)."""
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """Turns of full and of sliding layers; None: attention has no rotary positions."""
    together_in_window: bool = False
    """Sliding layers bound what `together` allows by their window (Gemma 3)."""
    visible: Bool[Array, "B T"] | None = None
    """Tokens that may be seen; None: all (the patches of an image within a larger tensor)."""


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, one row a position; NSA keeps those of its three branches.

    NSA's keys are kept un-rotated, since its compressed blocks are built from un-rotated keys.
    """

    key: Float[Array, "L B ..."]
    value: Float[Array, "L B ..."]
    length: Int[Array, " B"]
    """Tokens held, for each sequence."""
    offset: Int[Array, " B"]
    """By how much the next position exceeds its row (M-RoPE: an image has fewer positions than rows)."""


class Choice(NamedTuple):
    """What one layer of NSA chose to read, and how far the choice is from where attention lies."""

    blocks: Int[Array, "B Hkv T n"] | None = None
    """None without a selection branch."""
    loss: Float[Array, ""] | None = None
    """Of the auxiliary selector."""


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` sequences of at most `length` tokens, in the compute dtype."""
    branch = (3,) if config.attention == "nsa" else ()
    shape = (config.num_layers, batch_size, *branch, length, config.kv_heads)
    dtype = jnp.dtype(config.compute_dtype)
    return Cache(
        jnp.zeros((*shape, config.key_dim), dtype),
        jnp.zeros((*shape, config.value_dim), dtype),
        jnp.zeros((batch_size,), jnp.int32),
        jnp.zeros((batch_size,), jnp.int32),
    )


def attention(
    params: Params,
    x: Float[Array, "B T D"],
    where: Where,
    config: ModelConfig,
    *,
    kind: str = "full",
    causal: bool = True,
    probe: Probe | None = None,
    cache: tuple[Array, Array] | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None, Choice]:
    """Attention of one layer, of a kind of `config.kinds`, on its normed input.

    Returns the output, the layer's cache with these tokens in it, and NSA's choice of blocks. `probe` is
    the layer's slice; it taps or edits the attention of full and sliding layers, and of NSA's branches.
    """
    rotary = where.local_rotary if kind == "sliding" else where.rotary
    q, k, v = projections(params, x, config, kind)
    if rotary is not None:
        q = rotate(q, rotary, config.rope.interleaved)
        if kind != "nsa":
            k = rotate(k, rotary, config.rope.interleaved)

    if cache is not None:
        cache = k, v = _write(cache[0], k, where.rows), _write(cache[1], v, where.rows)
    if kind == "nsa":
        out, choice = _nsa(params, x, q, k, v, where, config, probe, cached=cache is not None)
    else:
        window = config.window if kind == "sliding" else None
        if kind == "sliding" and where.local_segments is not None:
            where, window = where._replace(segment_ids=where.local_segments), None
        out = _dense(q, k, v, where, config, window, causal, probe, cached=cache is not None)
        choice = Choice()
    y = jnp.einsum("bthk,hkd->btd", out, params["output"].astype(x.dtype))
    if config.has_output_bias:
        y = y + params["output_bias"].astype(x.dtype)[None, None]
    return y, cache, choice


def projections(
    params: Params, x: Float[Array, "B T D"], config: ModelConfig, kind: str
) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B ... T Hkv Dk"], Float[Array, "B ... T Hkv Dv"]]:
    """Queries, keys and values of a layer, normed where the model has it, before their rotary positions.

    With NSA keys and values of its three branches: [B, 3, T, Hkv, D].
    """
    equation = "btd,cdhk->bcthk" if kind == "nsa" else "btd,dhk->bthk"
    q = _project(params, "query", x, "btd,dhk->bthk")
    k, v = _project(params, "key", x, equation), _project(params, "value", x, equation)
    if config.qk_norm != "none":
        q = _head_norm(params["query_norm"], q, config)
        k = _head_norm(params["key_norm"], k, config)
    return q, k, v


def _head_norm(
    params: Params, x: Float[Array, "*rows H K"], config: ModelConfig
) -> Float[Array, "*rows H K"]:
    """Queries or keys normed over each head, or over all heads together."""
    if config.qk_norm == "head":
        return norm(params, x, config)
    return norm(params, x.reshape(*x.shape[:-2], -1), config).reshape(x.shape)


def _project(params: Params, name: str, x: Array, equation: str) -> Array:
    if equation.startswith("btd,c") and params[name].ndim == 3:  # one projection for all of NSA's branches
        y = _project(params, name, x, "btd,dhk->bthk")
        return jnp.broadcast_to(y[:, None], (y.shape[0], len(BRANCHES), *y.shape[1:]))
    y = jnp.einsum(equation, x, params[name].astype(x.dtype))
    if f"{name}_bias" not in params:
        return y
    bias = params[f"{name}_bias"].astype(x.dtype)
    # [H, K] -> [1, 1, H, K]; with NSA's branches [3, H, K] -> [1, 3, 1, H, K]
    return y + (bias[None, None] if bias.ndim == 2 else bias[None, :, None])


def _write(cached: Array, new: Array, rows: Int[Array, "B T"] | None) -> Array:
    """`cached` [B, ..., S, H, K] with row `rows[b, t]` replaced by token t of `new`; none past the end."""
    put = lambda c, n, r: c.at[..., r, :, :].set(n.astype(c.dtype), mode="drop")  # noqa: E731
    return jax.vmap(put)(cached, new, rows)


def _dense(
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
    if config.attention_implementation == "chunked" and not cached:
        if not causal or where.together is not None or where.visible is not None:
            raise ValueError("chunked attention is causal and knows no images; use xla")
        reach = q.shape[1] if window is None else window
        return window_attention(q, k, v, window=reach, scale=scale, segment_ids=where.segment_ids)
    if config.attention_implementation in ("xla", "chunked"):
        mask = _mask(where, k.shape[1], window, causal, cached)
        return _softmax_attention(q, k, v, mask, scale, config.attention_softcap)
    kwargs: dict[str, Any] = {"implementation": config.attention_implementation, "scale": scale}
    if not cached and where.segment_ids is None and where.together is None and where.visible is None:
        kwargs |= {"is_causal": causal, "local_window_size": None if window is None else (window - 1, 0)}
    else:
        kwargs["mask"] = _mask(where, k.shape[1], window, causal, cached)[:, None]
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
    where: Where, source_len: int, window: int | None, causal: bool, cached: bool
) -> Bool[Array, "B T S"]:
    batch, target_len = where.positions.shape[:2]
    targets = where.rows if cached else jnp.broadcast_to(jnp.arange(target_len)[None], (batch, target_len))
    assert targets is not None
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
        same = where.together[:, :, None] == of_sources[:, None, :]
        mask |= same & (where.together > 0)[:, :, None]
    if window is not None and where.together_in_window:
        mask &= behind < window
    if where.visible is not None and not cached:
        mask &= where.visible[:, None, :]
    if where.segment_ids is not None and not cached:
        mask &= where.segment_ids[:, :, None] == where.segment_ids[:, None, :]
    return mask


def _nsa(
    params: Params,
    x: Array,
    q: Array,
    k: Array,
    v: Array,
    where: Where,
    config: ModelConfig,
    probe: Probe | None,
    cached: bool,
) -> tuple[Array, Choice]:
    """Three branches with their own keys and values.

    Compressed keys are built from un-rotated keys and take the rotary position of their block's first token.
    """
    n = config.nsa
    compress = lambda name, y: compress_blocks(  # noqa: E731
        y, _cast(params[name], y.dtype), block_len=n.block_len, stride=n.stride
    )
    k_cmp, v_cmp = compress("compress_key", k[:, 0]), compress("compress_value", v[:, 0])
    k_slc, k_win = k[:, 1], k[:, 2]
    if config.position == "rotary":
        # In a cache row s holds position s; without one the batch says which position stands where.
        rows = jnp.arange(k_slc.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(rows, k_slc.shape[:2]) if cached else where.positions
        starts = positions[:, : k_cmp.shape[1] * n.stride : n.stride]
        at_starts, at_tokens = (rotary_table(p, config.rope, config.rotary_dim) for p in (starts, positions))
        k_cmp = rotate(k_cmp, at_starts, config.rope.interleaved)
        k_slc = rotate(k_slc, at_tokens, config.rope.interleaved)
        k_win = rotate(k_win, at_tokens, config.rope.interleaved)
    there = [branch in n.branches for branch in BRANCHES]
    gates = jnp.where(jnp.asarray(there)[None, None, None], _gates(params["gate"], x), 0)
    operands = (q, k_cmp, v_cmp, k_slc, v[:, 1], k_win, v[:, 2], gates)
    sizes: dict[str, Any] = {
        "block_len": n.block_len, "stride": n.stride, "block_size": n.block_size, "num_blocks": n.num_blocks,
        "num_init": n.num_init, "num_local": n.num_local, "window": n.window, "scale": config.attention_scale,
    }  # fmt: skip
    if probe is not None:
        if n.selector != "compressed":
            raise ValueError("flows and blocking know no selector of NSA but compressed")
        return probed_nsa_attention(*operands, probe, segment_ids=where.segment_ids, **sizes), Choice()
    segment_ids = None if cached else where.segment_ids
    indices, loss = None, None
    if n.selector != "compressed" and "selection" in n.branches:
        of_groups = q.reshape(*q.shape[:2], config.kv_heads, -1, config.key_dim)
        if n.selector == "min_max":
            importance = jnp.sum(bound_scores(of_groups, block_bounds(k_slc, n.block_size)), axis=2)
        else:
            if cached or segment_ids is not None:
                raise ValueError("the auxiliary selector reads one whole text a row: no cache, no segments")
            scale = config.key_dim**-0.5 if config.attention_scale is None else config.attention_scale
            importance = auxiliary_scores(params["selector"], x, n.block_size)
            loss = auxiliary_loss(importance, of_groups, k_slc, n, scale=scale)
        indices = best_blocks(
            importance, block_size=n.block_size, num_blocks=n.num_blocks, num_init=n.num_init,
            num_local=n.num_local, segment_ids=segment_ids, q_positions=where.rows,
        )  # fmt: skip
    out, branches = nsa_attention(
        *operands, segment_ids=segment_ids, q_positions=where.rows, indices=indices, **sizes
    )
    if all(there):
        return out, Choice(branches.indices, loss)
    # What the other branches would give is not used, so it is not computed.
    outputs = zip(there, (branches.compressed, branches.selected, branches.window), strict=True)
    parts = [gates[..., i, None].astype(q.dtype) * y for i, (used, y) in enumerate(outputs) if used]
    chosen = branches.indices if "selection" in n.branches else None
    return jax.tree.reduce(jnp.add, parts), Choice(chosen, loss)


def _gates(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T H 3"]:
    if "hidden" in params:
        x = jax.nn.silu(x @ params["hidden"].astype(x.dtype))
    logits = jnp.einsum("btd,dhc->bthc", x, params["output"].astype(x.dtype))
    return jax.nn.sigmoid(logits + params["bias"].astype(x.dtype)[None, None])


def _cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)
