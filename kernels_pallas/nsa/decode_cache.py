"""What decoding with Native Sparse Attention keeps of one layer, contiguous or in pages, and how a chunk of
new tokens gets in.

Kept are selection K/V of every token, compressed K/V of every complete block, window K/V of the tokens that
the next one can still see, and the K/V of the tokens of blocks that are not complete yet. Axis letters as in
api.py, and P pages, R = window slots, W = block_len - 1 waiting tokens. A layer axis may be stacked in front
and scanned.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import NOWHERE, SelectionGrid, ceil_div, num_compressed
from kernels_pallas.nsa.checks import check_sizes

TILE = 64
"""Keys that the decode kernel reads at once."""
PIECE = 8
"""Of the compressed keys of a tile at least so many lie beside each other, in a page."""


class NsaCache(NamedTuple):
    """One layer; S is a multiple of the selection block and M is num_compressed(S, packed=True) rounded up to
    tiles."""

    k_slc: Float[Array, "*layers B S Hkv Dk"]
    v_slc: Float[Array, "*layers B S Hkv Dv"]
    k_cmp: Float[Array, "*layers B M Hkv Dk"]
    v_cmp: Float[Array, "*layers B M Hkv Dv"]
    k_win: Float[Array, "*layers B R Hkv Dk"]
    """A ring: the token at position p lies in slot p % R."""
    v_win: Float[Array, "*layers B R Hkv Dv"]
    k_wait: Float[Array, "*layers B W Hkv Dk"]
    """From the first token of the first incomplete block on, as `compress` wants them (without RoPE)."""
    v_wait: Float[Array, "*layers B W Hkv Dv"]
    length: Int[Array, "*layers B"]
    """Tokens read, for each sequence."""
    k_index: Float[Array, "*layers B S 1 R"] | None = None
    """Keys of an indexer, of every token; None: there is none."""


class PagedCache(NamedTuple):
    """One layer whose selection and compressed K/V lie in pages that sequences take from a common pool.

    Token t of a sequence is in its page t // page_size, and a compressed block in the page of its first
    token. Who assigns pages does it before the tokens are appended: a token without a page is lost.
    """

    k_slc: Float[Array, "*layers P page_size Hkv Dk"]
    v_slc: Float[Array, "*layers P page_size Hkv Dv"]
    k_cmp: Float[Array, "*layers P blocks Hkv Dk"]
    """blocks = page_size / stride"""
    v_cmp: Float[Array, "*layers P blocks Hkv Dv"]
    k_win: Float[Array, "*layers B R Hkv Dk"]
    v_win: Float[Array, "*layers B R Hkv Dv"]
    k_wait: Float[Array, "*layers B W Hkv Dk"]
    v_wait: Float[Array, "*layers B W Hkv Dv"]
    length: Int[Array, "*layers B"]
    page_table: Int[Array, "*layers B max_pages"]
    """Pages of each sequence in order; -1 is none and never read."""
    k_index: Float[Array, "*layers P page_size 1 R"] | None = None
    """As of NsaCache."""


Cache = NsaCache | PagedCache


class NewTokens(NamedTuple):
    """K/V of a chunk: those to compress as `compress` wants them, the others with their positions (RoPE)."""

    k_cmp: Float[Array, "B T Hkv Dk"]
    v_cmp: Float[Array, "B T Hkv Dv"]
    k_slc: Float[Array, "B T Hkv Dk"]
    v_slc: Float[Array, "B T Hkv Dv"]
    k_win: Float[Array, "B T Hkv Dk"]
    v_win: Float[Array, "B T Hkv Dv"]


class Recent(NamedTuple):
    """What the window of a chunk's queries can reach: the R tokens before the chunk and the chunk's own, or
    for a single token the ring that holds it, as it lies (then X = R)."""

    k: Float[Array, "B X Hkv Dk"]
    v: Float[Array, "B X Hkv Dv"]
    positions: Int[Array, "B X"]
    """-1: no token. In ascending order if T > 1."""
    num_new: Int[Array, " B"]
    """Tokens of the chunk that are not padding, for each sequence."""


Compress = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(k [B, X, Hkv, Dk], v [B, X, Hkv, Dv], starts int32 [B, C]) -> the C = num_compressed(X) blocks of k and v;
the first token of block c stands at position starts[b, c] of its sequence, for RoPE."""


def init_cache(
    batch: int,
    length: int,
    *,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: jax.typing.DTypeLike,
    block_len: int = 32,
    stride: int = 16,
    block_size: int = 64,
    window: int = 512,
    index_dim: int | None = None,
) -> NsaCache:
    """An empty cache for `batch` sequences of at most `length` tokens, rounded up to whole selection blocks;
    with `index_dim` it keeps an indexer's keys of this dimension too.

    Raises:
        ValueError: a size is below 1, or the stride leaves tokens out.
    """
    check_sizes(batch=batch, length=length, block_size=block_size, window=window, stride=stride)
    _check_stride(block_len, stride)
    length = ceil_div(length, block_size) * block_size
    sizes = {
        "slc": (batch, length),
        "cmp": (batch, _compressed_slots(length, block_len, stride)),
        "win": (batch, window),
        "wait": (batch, block_len - 1),
    }
    arrays = _arrays(sizes, kv_heads, key_dim, value_dim, dtype)
    k_index = None if index_dim is None else jnp.zeros((batch, length, 1, index_dim), dtype)
    return NsaCache(**arrays, length=jnp.zeros((batch,), jnp.int32), k_index=k_index)


def init_paged_cache(
    page_table: Int[Array, "B max_pages"],
    *,
    num_pages: int,
    page_size: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: jax.typing.DTypeLike,
    block_len: int = 32,
    stride: int = 16,
    block_size: int = 64,
    window: int = 512,
    index_dim: int | None = None,
) -> PagedCache:
    """An empty cache of `num_pages` pages of `page_size` tokens, a multiple of block_size and of stride; with
    `index_dim` as of `init_cache`.

    Raises:
        ValueError: sizes do not fit.
    """
    check_sizes(num_pages=num_pages, block_size=block_size, window=window, stride=stride)
    _check_stride(block_len, stride)
    if page_size < 1 or page_size % block_size or page_size % stride:
        raise ValueError(
            f"page_size {page_size} must be a multiple of block_size {block_size} and of stride {stride}"
        )
    batch = page_table.shape[0]
    sizes = {
        "slc": (num_pages, page_size),
        "cmp": (num_pages, page_size // stride),
        "win": (batch, window),
        "wait": (batch, block_len - 1),
    }
    arrays = _arrays(sizes, kv_heads, key_dim, value_dim, dtype)
    length = jnp.zeros((batch,), jnp.int32)
    k_index = None if index_dim is None else jnp.zeros((num_pages, page_size, 1, index_dim), dtype)
    return PagedCache(**arrays, length=length, page_table=page_table.astype(jnp.int32), k_index=k_index)


def page_for(length: int, *, block_size: int = 64, stride: int = 16) -> int:
    """Tokens of a page that holds a whole sequence of at most `length`, of a size that the kernels take."""
    unit = math.lcm(block_size, stride * (TILE if length >= TILE * stride else PIECE))
    return ceil_div(length, unit) * unit


def append_tokens[C: (NsaCache, PagedCache)](
    cache: C,
    new: NewTokens,
    compress: Compress,
    *,
    block_len: int,
    stride: int,
    num_new: Int[Array, " B"] | None = None,
    k_index: Float[Array, "B T 1 R"] | None = None,
) -> tuple[C, Recent]:
    """The cache with a chunk of T >= 1 tokens in it, and what `cached_attention` needs for their windows.

    Row b holds num_new[b] tokens (None: T), then padding, which is not read. Only when some sequence
    completes a block is anything compressed. Tokens beyond the cache's capacity are lost. `k_index` are an
    indexer's keys, for a cache that keeps them.

    Raises:
        ValueError: the chunk is empty or does not fit the cache, or only one of both has an indexer's keys.
    """
    batch, count = new.k_slc.shape[:2]
    if count == 0 or batch != cache.length.shape[0]:
        raise ValueError(f"a chunk of {batch} x {count} tokens for a cache of {cache.length.shape[0]} rows")
    check_cache(cache, block_len, stride)
    _check_chunk(cache, new, batch, count)
    if (k_index is None) != (cache.k_index is None):
        raise ValueError("k_index, an indexer's keys: the cache and the chunk must have them, or neither")
    num_new = jnp.full((batch,), count, jnp.int32) if num_new is None else num_new
    index = jnp.arange(count, dtype=jnp.int32)[None]
    valid = index < num_new[:, None]
    rows = cache.length[:, None] + index
    before = cache

    token = jnp.where(valid, rows, NOWHERE)
    ring = cache.k_win.shape[1]
    # Of tokens that share a slot the last one stays, so that no slot is written twice.
    slot = jnp.where(valid & (index >= num_new[:, None] - ring), rows % ring, NOWHERE)
    k_wait, v_wait, compressed, number = _complete(cache, new, compress, valid, num_new, block_len, stride)
    cache = cache._replace(
        k_slc=_put(cache, cache.k_slc, token, new.k_slc),
        v_slc=_put(cache, cache.v_slc, token, new.v_slc),
        k_cmp=_put(cache, cache.k_cmp, number, compressed[0]),
        v_cmp=_put(cache, cache.v_cmp, number, compressed[1]),
        k_win=put_rows(cache.k_win, slot, new.k_win),
        v_win=put_rows(cache.v_win, slot, new.v_win),
        k_wait=k_wait,
        v_wait=v_wait,
        length=cache.length + num_new,
    )
    if k_index is not None and cache.k_index is not None:
        cache = cache._replace(k_index=_put(before, cache.k_index, token, k_index))
    if count == 1:
        return cache, Recent(cache.k_win, cache.v_win, _held(cache.length - 1, ring), num_new)
    return cache, _recent(before, new, jnp.where(valid, rows, -1), num_new)


def check_cache(cache: Cache, block_len: int, stride: int, block_size: int = 1) -> None:
    """Whether a cache was made for these sizes, as far as its shapes tell.

    Raises:
        ValueError: it was not.
    """
    if cache.k_wait.shape[1] != block_len - 1:
        raise ValueError(f"the cache was made for block_len {cache.k_wait.shape[1] + 1}, not {block_len}")
    length, blocks = cache.k_slc.shape[1], cache.k_cmp.shape[1]
    if isinstance(cache, NsaCache):
        expected = _compressed_slots(length, block_len, stride)
    else:
        expected = length // stride
    if blocks != expected:
        raise ValueError(
            f"the cache was made for another stride than {stride}: it has {blocks} compressed blocks for "
            f"{length} tokens, not {expected}"
        )
    if length % block_size:
        raise ValueError(
            f"the cache was made for another block_size than {block_size}: it holds {length} tokens"
        )


def _compressed_slots(length: int, block_len: int, stride: int) -> int:
    """Of a cache that is not paged: whole tiles."""
    return max(1, ceil_div(num_compressed(length, block_len, stride, packed=True), TILE)) * TILE


def _check_chunk(cache: Cache, new: NewTokens, batch: int, count: int) -> None:
    for name, x in new._asdict().items():
        expected = (batch, count, *getattr(cache, name).shape[2:])
        if x.shape != expected:
            raise ValueError(f"{name} of the chunk has shape {x.shape}; for this cache it must be {expected}")


def address(cache: Cache, index: Int[Array, "B ..."], size: int) -> tuple[Array, Array]:
    """Where entries `index` of the sequences lie on the two first axes of a kept array, of which the second
    has `size` of them; out of range if nowhere."""
    batch = index.shape[0]
    if isinstance(cache, NsaCache):
        own = jnp.arange(batch, dtype=jnp.int32).reshape(batch, *[1] * (index.ndim - 1))
        return jnp.broadcast_to(own, index.shape), index
    page = (index // size).reshape(batch, -1)
    page = jnp.take_along_axis(cache.page_table, page, axis=1, mode="fill", fill_value=-1)
    page = page.reshape(index.shape)
    return jnp.where(page < 0, NOWHERE, page), index % size


def capacity(cache: Cache) -> int:
    """Tokens that the cache holds of a sequence."""
    length = cache.k_slc.shape[1]
    return length if isinstance(cache, NsaCache) else length * cache.page_table.shape[1]


def whole(cache: Cache, kept: Float[Array, "A C Hkv D"]) -> Float[Array, "B R Hkv D"]:
    """All entries of each sequence in order, zeros where there is no page."""
    if isinstance(cache, NsaCache):
        return kept
    pages = jnp.where(cache.page_table < 0, NOWHERE, cache.page_table)
    got = kept.at[pages].get(mode="fill", fill_value=0)
    return got.reshape(got.shape[0], got.shape[1] * got.shape[2], *got.shape[3:])


def compressed_keys(
    cache: Cache, grid: SelectionGrid
) -> tuple[Float[Array, "B M Hkv Dk"], Float[Array, "B M Hkv Dv"]]:
    """Compressed keys and values of each sequence in order, complete ones or not: as many as packed rows
    have slots."""
    blocks = num_compressed(grid.kv_len, grid.block_len, grid.stride, packed=True)
    return whole(cache, cache.k_cmp)[:, :blocks], whole(cache, cache.v_cmp)[:, :blocks]


def put_rows(x: Float[Array, "B R Hkv D"], rows: Int[Array, "B T"], new: Array) -> Array:
    """x with x[b, rows[b, t]] = new[b, t]; nothing is written out of range."""
    return jax.vmap(lambda y, r, n: y.at[r].set(n, mode="drop"))(x, rows, new)


def _put(cache: Cache, kept: Array, index: Int[Array, "B T"], new: Array) -> Array:
    if isinstance(cache, NsaCache):
        return put_rows(kept, index, new)
    return kept.at[address(cache, index, kept.shape[1])].set(new, mode="drop")


def _held(newest: Int[Array, " B"], ring: int) -> Int[Array, "B R"]:
    """Position of the token in each slot of the ring, -1 for none."""
    newest, slots = newest[:, None], jnp.arange(ring, dtype=jnp.int32)[None]
    return jnp.maximum(newest - (newest - slots) % ring, -1)


def _recent(cache: Cache, new: NewTokens, rows: Array, num_new: Array) -> Recent:
    """The ring in order, and the chunk after it."""
    ring = cache.k_win.shape[1]
    held = cache.length[:, None] - ring + jnp.arange(ring, dtype=jnp.int32)[None]
    k, v = (_rows(x, held % ring) for x in (cache.k_win, cache.v_win))
    k, v = jnp.concatenate([k, new.k_win], axis=1), jnp.concatenate([v, new.v_win], axis=1)
    return Recent(k, v, jnp.concatenate([jnp.maximum(held, -1), rows], axis=1), num_new)


def _complete(
    cache: Cache,
    new: NewTokens,
    compress: Compress,
    valid: Array,
    num_new: Array,
    block_len: int,
    stride: int,
) -> tuple[Array, Array, tuple[Array, Array], Int[Array, "B C"]]:
    """Waiting K/V after the chunk, and the blocks that it completes with their numbers (or NOWHERE)."""
    count = valid.shape[1]
    size = block_len - 1 + count
    blocks = _blocks_in(cache.length, block_len, stride)
    waiting = cache.length - blocks * stride
    place = waiting[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    place = jnp.where(valid, place, NOWHERE)
    pad = ((0, 0), (0, count), (0, 0), (0, 0))
    k = put_rows(jnp.pad(cache.k_wait, pad), place, new.k_cmp)
    v = put_rows(jnp.pad(cache.v_wait, pad), place, new.v_cmp)

    candidates = num_compressed(size, block_len, stride)
    candidate = jnp.arange(candidates, dtype=jnp.int32)[None]
    done = candidate * stride + block_len <= (waiting + num_new)[:, None]
    number = blocks[:, None] + candidate

    def nothing(k: Array, v: Array, starts: Array) -> tuple[Array, Array]:
        empty = [jnp.zeros((x.shape[0], candidates, *x.shape[2:]), x.dtype) for x in (k, v)]
        return empty[0], empty[1]

    compressed = lax.cond(jnp.any(done), compress, nothing, k, v, number * stride)
    shift = (_blocks_in(cache.length + num_new, block_len, stride) - blocks) * stride
    left = shift[:, None] + jnp.arange(block_len - 1, dtype=jnp.int32)[None]
    return _rows(k, left), _rows(v, left), compressed, jnp.where(done, number, NOWHERE)


def _blocks_in(length: Int[Array, " B"], block_len: int, stride: int) -> Int[Array, " B"]:
    """`num_compressed` of lengths that are known at run time only."""
    return jnp.maximum(0, (length - block_len) // stride + 1)


def _rows(x: Array, rows: Int[Array, "B T"]) -> Array:
    """x[b, rows[b, t]], zeros out of range."""
    return jax.vmap(lambda y, r: y.at[r].get(mode="fill", fill_value=0))(x, rows)


def _arrays(
    sizes: dict[str, tuple[int, int]], heads: int, key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike
) -> dict[str, Array]:
    return {
        f"{x}_{name}": jnp.zeros((*size, heads, dim), dtype)
        for name, size in sizes.items()
        for x, dim in (("k", key_dim), ("v", value_dim))
    }


def _check_stride(block_len: int, stride: int) -> None:
    if stride > block_len:
        raise ValueError(f"stride {stride} exceeds block_len {block_len}: tokens would be lost")
