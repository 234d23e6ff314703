"""The Hopper kernel of flows in Pallas' GPU interpreter against the tiles of XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flow import Probe, flow_attention
from kernels_pallas.flow.mosaic_gpu import attention
from kernels_pallas.nsa import window_attention_with_lse
from kernels_pallas.target import OLDEST_JAX, interpreted

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)
CLASSES = 3


def draw(tokens, heads, kv_heads, dim, dtype=jnp.bfloat16):
    rng = np.random.default_rng(tokens)
    normal = lambda h: jnp.asarray(rng.normal(size=(1, tokens, h, dim)), dtype)
    classes = jnp.asarray(rng.integers(-1, CLASSES, (1, tokens)), jnp.int32)
    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads), classes


def tapped(implementation, operands, *, per_head=False, gradients=False, **more):
    """Sums and counts of edges; with `gradients` also the output and those of q, k, v."""
    q, k, v, cotangent, classes = operands
    options = {name: more.pop(name) for name in ("reduction", "signed") if name in more}
    sinks = more.pop("sinks", None)
    pair = jnp.zeros((1, CLASSES, CLASSES), jnp.float32)
    tap = jnp.zeros((1, q.shape[2], CLASSES, CLASSES), jnp.float32) if per_head else pair

    @jax.jit
    def run(q, k, v):
        def attend(q, k, v, sinks, tap, count):
            probe = Probe(tap, count, classes=classes, implementation=implementation, **options)
            return flow_attention(q, k, v, probe, sinks=sinks, **more)

        out, pull = jax.vjp(attend, q, k, v, sinks, tap, pair)
        *d_inputs, flow, count = pull(cotangent)
        d_inputs = [x for x in d_inputs if x is not None]
        return flow, count, *((out, *d_inputs) if gradients else ())

    return run(q, k, v)


def check(operands, **more):
    expected = tapped("xla", operands, **more)
    with interpreted():
        found = tapped("mosaic_gpu", operands, **more)
    np.testing.assert_array_equal(found[1], expected[1])
    for x, wanted, least in zip(found, expected, (1e-5, 0, *[1e-2] * 5), strict=False):
        x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
        assert np.abs(x - wanted).max() <= least * np.abs(wanted).max()


@needs_pallas
def test_sums_are_those_of_xla(monkeypatch):
    """Two tiles, heads that share keys, two segments and padding; attention itself is not interpreted."""
    plain = lambda *x, implementation, **more: window_attention_with_lse(*x, **more)
    monkeypatch.setattr(attention, "window_attention_with_lse", plain)
    segments = jnp.asarray([[1] * 30 + [2] * 30 + [0] * 7], jnp.int32)
    sinks = jnp.asarray([0.5, 2.0], jnp.float32)
    check(draw(67, 2, 1, 24), segment_ids=segments, sinks=sinks, gradients=True)


@needs_pallas
@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"gradients": True},
        {"gradients": True, "window": 40, "sinks": jnp.asarray([-1.0, 0.0, 1.0, 3.0], jnp.float32)},
        {"per_head": True, "window": 40},
        {"reduction": "mean_abs", "window": 70},
        {"reduction": "sum_of_abs"},
        {"signed": True},
    ],
)
def test_every_reduction(more):
    check(draw(150, 4, 2, 40), **more)


def test_what_the_kernel_does_not_take_is_said():
    q, k, v, _, classes = draw(9, 2, 1, 8)
    taps = {"class_tap": jnp.zeros((1, 1, 1)), "classes": classes, "implementation": "mosaic_gpu"}
    run = lambda *x, **more: flow_attention(*x, Probe(**taps), **more)
    with pytest.raises(
        NotImplementedError, match="implementation='mosaic_gpu': the default device is no Hopper"
    ):
        run(q, k, v)
    with interpreted():
        with pytest.raises(NotImplementedError, match="they have no softcaps; use 'xla'"):
            run(q, k, v, softcap=1.0)
        with pytest.raises(NotImplementedError, match="not float32"):
            run(*(x.astype(jnp.float32) for x in (q, k, v)))
    with pytest.raises(ValueError, match="implementation must be one of xla, mosaic_gpu"):
        Probe(implementation="triton")
