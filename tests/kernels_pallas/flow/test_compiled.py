"""The Hopper kernel of flows compiled for an H100: no spilled registers, memory linear in the tokens."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.flow import Probe, flow_attention
from kernels_pallas.nsa.specs import h100
from kernels_pallas.target import compiled_elsewhere

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or ""),
]
CLASSES = 3


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
    """One folder for all of them: its name is read when the first kernel is compiled."""
    folder = tmp_path_factory.mktemp("ptxas")
    h100.dump_to(folder)
    return folder


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "kv_heads", "dim", "per_head", "window"),
    [
        (1, 65536, 32, 32, 128, False, None),
        (16, 320, 25, 25, 64, False, None),
        (1, 4096, 32, 8, 128, True, None),
        (1, 4096, 64, 8, 64, False, 128),  # gpt-oss, with sinks
    ],
)
def test_forward_and_backward(dump, batch, tokens, heads, kv_heads, dim, per_head, window):
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    q, kv = of(batch, tokens, heads, dim), of(batch, tokens, kv_heads, dim)
    pair = of(batch, CLASSES, CLASSES, dtype=jnp.float32)
    tap = of(batch, heads, CLASSES, CLASSES, dtype=jnp.float32) if per_head else pair

    sinks = None if window is None else jnp.zeros(heads)

    def step(q, k, v, cotangent, classes, tap, count):
        def attend(q, k, v, tap, count):
            probe = Probe(tap, count, classes=classes, implementation="mosaic_gpu")
            return flow_attention(q, k, v, probe, window=window, sinks=sinks)

        out, pull = jax.vjp(attend, q, k, v, tap, count)
        return out, pull(cotangent)

    with compiled_elsewhere():
        report = h100.compile_for_h100(
            step, q, kv, kv, q, of(batch, tokens, dtype=jnp.int32), tap, pair, dump=dump
        )
    print(report)
    names = sorted(kernel.name for kernel in report.kernels)
    assert names == ["flow_class_sums", "nsa_forward", "nsa_key_gradients", "nsa_query_gradient"]
    for kernel in report.kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.registers <= 168, kernel  # three warpgroups fill the register file with more
        assert 0 < kernel.shared_bytes <= h100.SHARED_BYTES, kernel
    assert report.temporary_bytes < 2**28 + 3.5 * report.argument_bytes
