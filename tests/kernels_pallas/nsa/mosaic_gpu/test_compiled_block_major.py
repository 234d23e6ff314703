"""Selection in the order of the blocks, compiled for an H100 with 64 heads: no spilled registers, and memory
that does not hold the parts of all heads at once."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa.base import Block, Positions
from kernels_pallas.nsa.mosaic_gpu import operators
from kernels_pallas.nsa.specs import h100
from kernels_pallas.target import compiled_elsewhere

pytestmark = pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or "")

LENGTH, HEADS, KEY_DIM, VALUE_DIM, SLOTS = 65536, 64, 192, 128, 16


@pytest.mark.parametrize("groups", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_forward_and_backward_at_64k(dump, groups):
    kv_heads = HEADS // groups
    of = lambda *shape: jax.ShapeDtypeStruct((1, LENGTH, *shape), jnp.bfloat16)
    q, d_out = of(kv_heads, groups, KEY_DIM), of(kv_heads, groups, VALUE_DIM)
    k, v = of(kv_heads, KEY_DIM), of(kv_heads, VALUE_DIM)
    indices = jax.ShapeDtypeStruct((1, LENGTH, kv_heads, SLOTS), jnp.int32)

    def step(q, k, v, indices, d_out):
        places = Positions(jnp.arange(LENGTH, dtype=jnp.int32)[None])
        block = Block(64, KEY_DIM**-0.5)
        out, pull = jax.vjp(
            lambda *a: operators.selected_attention(block, *a, indices, places, order="blocks"), q, k, v
        )
        return out, pull(d_out)

    with compiled_elsewhere():
        report = h100.compile_for_h100(step, q, k, v, indices, d_out, dump=dump)
    print(report)
    names = sorted(kernel.name for kernel in report.kernels)
    assert names == ["nsa_forward", "nsa_key_gradients", "nsa_query_gradient"]
    for kernel in report.kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.registers <= 168, kernel  # three warpgroups fill the register file with more
    # Of all heads at once, the rows that the backward pass keeps would take
    # 64 * 65536 * 16 * (2 * 192 + 128) * 2 bytes = 64 GiB.
    assert report.temporary_bytes < 9 * 2**30
