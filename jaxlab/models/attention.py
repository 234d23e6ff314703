"""Attention of one layer: projections, positions, the cache, and the kinds full, sliding and nsa."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig
from jaxlab.models.dense import dense_attention
from jaxlab.models.layers import norm
from jaxlab.models.modules import Params
from jaxlab.models.native_sparse import Choice, cached_attention, whole_attention
from jaxlab.models.probe import Probe
from jaxlab.models.rotary import rotate
from jaxlab.models.sparse_config import BRANCHES
from jaxlab.models.where import Where
from kernels_pallas import nsa
from kernels_pallas.nsa import PagedCache

LayerCache = tuple[Array, Array] | PagedCache
"""Of one layer: keys and values, a row a position; or what NSA keeps."""


class Cache(NamedTuple):
    """What all layers keep of the tokens read so far."""

    layers: LayerCache
    """Stacked on a leading axis L: keys and values [L, B, S, Hkv, D]; or NSA's PagedCache, with a page for
    every layer and sequence in one pool [L * B, ...] that all layers share."""
    length: Int[Array, " B"]
    """Tokens held, for each sequence."""
    offset: Int[Array, " B"]
    """By how much the next position exceeds its row (M-RoPE: an image has fewer positions than rows)."""


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` sequences of at most `length` tokens, in the compute dtype.

    Raises ValueError for NSA with positions of several coordinates: its blocks know one a token.
    """
    if config.attention == "nsa" and config.rope.sections and config.position == "rotary":
        raise ValueError("NSA has no cache for positions of several coordinates; set rope.sections: []")
    make = _empty_nsa if config.attention == "nsa" else _empty_dense
    empty = jnp.zeros((batch_size,), jnp.int32)
    return Cache(make(config, batch_size, length), empty, jnp.zeros_like(empty))


def _empty_dense(config: ModelConfig, batch_size: int, length: int) -> tuple[Array, Array]:
    shape = (config.num_layers, batch_size, length, config.kv_heads)
    dtype = jnp.dtype(config.compute_dtype)
    return jnp.zeros((*shape, config.key_dim), dtype), jnp.zeros((*shape, config.value_dim), dtype)


def _empty_nsa(config: ModelConfig, batch_size: int, length: int) -> PagedCache:
    n, count = config.nsa, config.num_layers
    page_size = nsa.page_for(length, block_size=n.block_size, stride=n.stride)
    pages = jnp.arange(count * batch_size, dtype=jnp.int32).reshape(count, batch_size, 1)
    cache = nsa.init_paged_cache(
        pages[0],
        num_pages=count * batch_size,
        page_size=page_size,
        kv_heads=config.kv_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        dtype=jnp.dtype(config.compute_dtype),
        block_len=n.block_len,
        stride=n.stride,
        block_size=n.block_size,
        window=n.window,
    )
    pool, own = part_cache(cache)
    own = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), own)
    return join_cache(pool, own._replace(page_table=pages))


def part_cache(cache: Any) -> tuple[dict[str, Array] | None, Any]:
    """What layers share, to be carried from one to the next and changed in place, and what is each one's own.

    Scanned over, a layer's pages would be copied whole at every step.
    """
    if not isinstance(cache, PagedCache):
        return None, cache
    pool = {name: getattr(cache, name) for name in ("k_slc", "v_slc", "k_cmp", "v_cmp")}
    nothing: dict[str, Any] = dict.fromkeys(pool)
    return pool, cache._replace(**nothing)


def join_cache(pool: dict[str, Array] | None, own: Any) -> Any:
    """Undo `part_cache`."""
    return own if pool is None else own._replace(**pool)


def attention(
    params: Params,
    x: Float[Array, "B T D"],
    where: Where,
    config: ModelConfig,
    *,
    kind: str = "full",
    causal: bool = True,
    probe: Probe | None = None,
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None, Choice]:
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

    if isinstance(cache, PagedCache):
        out, cache, choice = cached_attention(params, x, q, k, v, where, config, cache)
    elif kind == "nsa":
        out, choice = whole_attention(params, x, q, k, v, where, config, probe)
    else:
        if cache is not None:
            cache = k, v = _write(cache[0], k, where.rows), _write(cache[1], v, where.rows)
        window = config.window if kind == "sliding" else None
        if kind == "sliding" and where.local_segments is not None:
            where, window = where._replace(segment_ids=where.local_segments), None
        out = dense_attention(q, k, v, where, config, window, causal, probe, cached=cache is not None)
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
    """`cached` [B, S, H, K] with row `rows[b, t]` replaced by token t of `new`; none past the end."""
    put = lambda c, n, r: c.at[r].set(n.astype(c.dtype), mode="drop")
    return jax.vmap(put)(cached, new, rows)
