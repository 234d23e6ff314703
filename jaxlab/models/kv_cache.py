"""What decoding keeps of the tokens read so far, for every layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.models.config import ModelConfig, RopeConfig
from jaxlab.models.mesh import split_heads
from kernels_pallas import nsa
from kernels_pallas.nsa import PagedCache

LayerCache = tuple[Array, Array] | PagedCache
"""Of one layer: keys and values [B, S, Hkv, D], a slot a position; or what NSA keeps."""


class CrossCache(NamedTuple):
    """Of layers that read images and not the text (Mllama): what they need of them."""

    keys: Float[Array, "n B S Hkv Dk"]
    values: Float[Array, "n B S Hkv Dv"]
    visible: Bool[Array, "B T S"] | None
    """What each token sees; of tokens to come T is 1. None: everything."""

    def of_next(self, lengths: Int[Array, " B"]) -> "CrossCache":
        """For what follows texts of these lengths: it sees what their last tokens see."""
        if self.visible is None:
            return self
        last = jnp.clip(lengths - 1, 0, self.visible.shape[1] - 1)
        return self._replace(visible=jnp.take_along_axis(self.visible, last[:, None, None], axis=1))


class Cache(NamedTuple):
    """What all layers keep of the tokens read so far."""

    layers: LayerCache
    """Stacked on a leading axis L: keys and values [L, B, S, Hkv, D]; or NSA's PagedCache, with a page for
    every layer and sequence in one pool [L * B, ...] that all layers share."""
    length: Int[Array, " B"]
    """Tokens held, for each sequence."""
    offset: Int[Array, " B"]
    """By how much the next position exceeds its slot (M-RoPE: an image has fewer positions than slots)."""
    cross: CrossCache | None = None
    """Of images that layers read; None: there are none."""

    @property
    def slots(self) -> int:
        """Room for so many tokens, of keys and values."""
        if isinstance(self.layers, PagedCache):
            raise ValueError("NSA's cache has pages, not slots")
        return int(self.layers[0].shape[2])


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` sequences of at most `length` tokens, in the compute dtype.

    Raises:
      ValueError: NSA with positions of several coordinates: its blocks know one a token.
    """
    if (
        config.attention.kind == "nsa"
        and isinstance(config.position, RopeConfig)
        and config.position.sections
    ):
        raise ValueError("NSA has no cache for positions of several coordinates; set position.sections: []")
    make = _empty_nsa if config.attention.kind == "nsa" else _empty_full
    empty = jnp.zeros((batch_size,), jnp.int32)
    return Cache(make(config, batch_size, length), empty, jnp.zeros_like(empty))


def _empty_full(config: ModelConfig, batch_size: int, length: int) -> tuple[Array, Array]:
    shape = (config.num_layers, batch_size, length, config.kv_heads)
    dtype = jnp.dtype(config.compute_dtype)
    empty = (jnp.zeros((*shape, size), dtype) for size in (config.key_dim, config.value_dim))
    keys, values = (split_heads(x, batch=1, heads=3) for x in empty)
    return keys, values


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
        index_dim=n.selector_dim if n.selector == "indexer" else None,
    )
    pool, own = split_cache(cache)
    own = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), own)
    return join_cache(pool, own._replace(page_table=pages))


def split_cache(cache: Any) -> tuple[dict[str, Array] | None, Any]:
    """What layers share, to be carried from one to the next and changed in place, and what is each one's own.

    Scanned over, a layer's pages would be copied whole at every step.
    """
    if not isinstance(cache, PagedCache):
        return None, cache
    pool = {name: getattr(cache, name) for name in ("k_slc", "v_slc", "k_cmp", "v_cmp", "k_index")}
    nothing: dict[str, Any] = dict.fromkeys(pool)
    return pool, cache._replace(**nothing)


def join_cache(pool: dict[str, Array] | None, own: Any) -> Any:
    """Undo `split_cache`."""
    return own if pool is None else own._replace(**pool)


def write(cached: Array, new: Array, slots: Int[Array, "B T"] | None) -> Array:
    """`cached` [B, S, H, K] with slot `slots[b, t]` replaced by token t of `new`; none past the end."""
    put = lambda c, n, r: c.at[r].set(n.astype(c.dtype), mode="drop")
    return jax.vmap(put)(cached, new, slots)
