"""The check of one token over a cache in pages: sequences of different lengths, NaN where no token lies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa.checking.cases import CheckCase
from kernels_pallas.nsa.checking.choice import importance
from kernels_pallas.nsa.decode_cache import NewTokens, PagedCache, append_tokens, init_paged_cache, whole
from kernels_pallas.nsa.decoding import cached_attention
from kernels_pallas.nsa.implementations import calls_noted
from kernels_pallas.nsa.records import Key

Array = Any


def lengths(case: CheckCase, batch: int) -> np.ndarray:
    """Tokens of each sequence before the new one: the longest first, then ever shorter ones."""
    return np.maximum(1, (case.length - 1) * np.linspace(1.0, 0.55, batch)).astype(np.int32)


def filled(case: CheckCase, batch: int) -> PagedCache:
    """A cache of random tokens, appended as a prompt is; pages lie anywhere, in no order."""
    pages = -(-case.length // case.page_size)
    random = np.random.default_rng(case.seed)
    table = random.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
    empty = init_paged_cache(
        jnp.asarray(table),
        num_pages=batch * pages,
        page_size=case.page_size,
        kv_heads=case.kv_heads,
        key_dim=case.key_dim,
        value_dim=case.value_dim,
        dtype=jnp.dtype(case.dtype),
        block_len=case.block_len,
        stride=case.stride,
        block_size=case.block_size,
        window=case.window,
    )
    kept = ("k_slc", "v_slc", "k_cmp", "v_cmp", "k_win", "v_win")
    empty = empty._replace(**{name: jnp.full_like(getattr(empty, name), jnp.nan) for name in kept})

    @jax.jit
    def fill(cache: PagedCache, key: Array, num_new: Array) -> PagedCache:
        new = _tokens(case, batch, case.length - 1, key)
        sizes: dict[str, Any] = {"block_len": case.block_len, "stride": case.stride}
        return append_tokens(cache, new, _mean(case), **sizes, num_new=num_new)[0]

    return fill(empty, jax.random.key(case.seed), jnp.asarray(lengths(case, batch)))


def _tokens(case: CheckCase, batch: int, count: int, key: Array) -> NewTokens:
    dims = [case.key_dim, case.value_dim] * 3
    keys = jax.random.split(key, 6)
    shape = (batch, count, case.kv_heads)
    drawn = [
        jax.random.normal(k, (*shape, d), jnp.dtype(case.dtype)) for k, d in zip(keys, dims, strict=True)
    ]
    return NewTokens(*drawn)


def _mean(case: CheckCase) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """Blocks as means, times what gives them the size of a token's numbers."""

    def compress(k: Array, v: Array, starts: Array) -> tuple[Array, Array]:
        tokens = np.arange(starts.shape[1])[:, None] * case.stride + np.arange(case.block_len)[None]
        each = lambda x: (x[:, tokens].astype(jnp.float32).mean(axis=2) * case.block_len**0.5).astype(x.dtype)
        return each(k), each(v)

    return compress


def prepare(
    case: CheckCase, implementation: str, running: Any, judge: Callable[..., list[Any]]
) -> tuple[set[Key], Callable[[], list[Any]]]:
    """Compile the check of one token at each of the case's batches."""
    keys: set[Key] = set()
    runs = []
    for batch in case.batches:
        found, run = _one_batch(case, batch, implementation, running, judge)
        keys |= found
        runs.append(run)
    return keys, lambda: [finding for run in runs for finding in run()]


def _one_batch(
    case: CheckCase, batch: int, implementation: str, running: Any, judge: Callable[..., list[Any]]
) -> tuple[set[Key], Callable[[], list[Any]]]:
    cache = filled(case, batch)
    key = jax.random.key(case.seed + 1)
    token = jax.jit(lambda key: _tokens(case, batch, 1, key))(key)
    shape, dtype = (batch, 1, case.heads), jnp.dtype(case.dtype)
    q = jax.random.normal(jax.random.fold_in(key, 1), (*shape, case.key_dim), dtype)
    gates = jax.random.uniform(jax.random.fold_in(key, 2), (*shape, 3), dtype)
    sizes: dict[str, Any] = {"block_len": case.block_len, "stride": case.stride}
    whole_sizes: dict[str, Any] = dict(case.sizes)

    def step(implementation: Any) -> Callable[..., Any]:
        def one(cache, token, q, gates, indices):  # type: ignore[no-untyped-def]
            cache, recent = append_tokens(cache, token, _mean(case), **sizes)
            out, b = cached_attention(
                cache, recent, q, gates, **whole_sizes, indices=indices, implementation=implementation
            )
            return out, b.compressed, b.selected, b.window, b.lse, b.indices

        return one

    with running(), calls_noted() as noted:
        program = jax.jit(step(implementation)).lower(cache, token, q, gates, None).compile()
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        (cache, token, q, gates),
    )
    choice = jax.ShapeDtypeStruct((batch, case.kv_heads, 1, case.num_blocks), jnp.int32)
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(step("xla")).lower(*wide, choice).compile()

    @jax.jit
    def worth(cache: PagedCache, token: NewTokens, q: Array) -> tuple[Array, Array]:
        cache, _ = append_tokens(cache, token, _mean(case), **sizes)
        blocks = (cache.length - case.block_len) // case.stride + 1
        keys = whole(cache, cache.k_cmp)
        there = jnp.arange(keys.shape[1], dtype=jnp.int32)[None] < blocks[:, None]
        keys = jnp.where(there[..., None, None], keys, 0)[:, : case.blocks]
        return importance(case, q, keys, cache.length[:, None] - 1), cache.length[:, None] - 1

    def run() -> list[Any]:
        with running():
            found = jax.block_until_ready(program(cache, token, q, gates, None))
            again = jax.block_until_ready(program(cache, token, q, gates, None))
        *expected, _ = reference(*wide, found[-1])
        return judge(case, found, again, expected, worth(cache, token, q))

    return {key for name, key in noted if name == implementation}, run
