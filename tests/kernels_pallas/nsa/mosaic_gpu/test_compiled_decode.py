"""Decoding compiled for an H100 at the paper's sizes: four launches, nothing spilled or copied."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa import Recent, cached_attention, init_cache, init_paged_cache
from kernels_pallas.nsa.specs import h100
from kernels_pallas.nsa.specs.outside import outside
from kernels_pallas.target import compiled_elsewhere

pytestmark = pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or "")

LENGTH, WINDOW = 65536, 512


def empty(batch: int, page_size: int | None, shapes: dict):
    if page_size is None:
        return init_cache(batch, LENGTH, **shapes)
    pages = LENGTH // page_size
    return init_paged_cache(
        jnp.zeros((batch, pages), jnp.int32), num_pages=batch * pages, page_size=page_size, **shapes
    )


@pytest.mark.parametrize(
    ("batch", "page_size", "heads", "kv_heads", "key_dim"),
    [(1, None, 64, 4, 192), (64, None, 64, 4, 192), (64, 128, 64, 4, 128), (8, 1024, 32, 32, 128)],
)
def test_one_token_at_64k(dump, batch, page_size, heads, kv_heads, key_dim):
    shapes = {"kv_heads": kv_heads, "key_dim": key_dim, "value_dim": 128, "dtype": jnp.bfloat16}
    cache = jax.eval_shape(lambda: empty(batch, page_size, shapes))

    def step(cache, q, gates, num_new):
        recent = Recent(cache.k_win, cache.v_win, jnp.zeros((batch, WINDOW), jnp.int32), num_new)
        return cached_attention(cache, recent, q, gates, implementation="mosaic_gpu")[0]

    like = lambda *shape: jax.ShapeDtypeStruct((batch, 1, heads, *shape), jnp.bfloat16)
    num_new = jax.ShapeDtypeStruct((batch,), jnp.int32)
    with compiled_elsewhere():
        report = h100.compile_for_h100(step, cache, like(key_dim), like(3), num_new, dump=dump)
    print(report)
    names = sorted(kernel.name for kernel in report.kernels)
    assert names == ["nsa_decode", "nsa_decode", "nsa_decode_choice", "nsa_decode_join"]
    for kernel in report.kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.registers <= 128, kernel  # so that two programs of 256 threads fit a multiprocessor
    # Scores of all heads for the choice and the programs' sums; a copy of the cache would take 0.2 to 11 GB.
    assert report.temporary_bytes < (8 + batch * kv_heads // 2) * 2**20
    traffic = outside(report.compiled.as_text())
    assert traffic.kernels == 4
    # Groups that are no multiple of 8 are padded and cut again.
    assert traffic.launches <= (0 if heads // kv_heads % 8 == 0 else 2), traffic
