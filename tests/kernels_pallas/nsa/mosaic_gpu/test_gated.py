"""The branches with their gates as one function, in the interpreter, against XLA in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import nsa_attention
from kernels_pallas.nsa.mosaic_gpu import gated, operators
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.nsa.specs.arg_specs import ArgSpec
from kernels_pallas.target import OLDEST_JAX, interpreted

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}"
)

SPEC = ArgSpec(
    192, heads=8, kv_heads=1, key_dim=64, value_dim=64, num_blocks=2, num_init=0, num_local=1, window=60
)
QUERIES = np.arange(184, 192)
SIZES = SPEC.sizes


@pytest.fixture(autouse=True)
def one_warpgroup(monkeypatch):
    tuning = lambda *_: Tuning(warpgroups=1, registers=False)
    monkeypatch.setattr(operators, "kernel_tuning", tuning)


def gradients(implementation, args, d_outs, indices, used):
    """Outputs that are `used`, of the sum and the branches, indices and all gradients."""
    positions = jnp.asarray(QUERIES[None], jnp.int32)

    def attend(args):
        out, branches = nsa_attention(
            **args, **SIZES, q_positions=positions, indices=indices, implementation=implementation
        )
        return [x for x, use in zip((out, *branches[:4]), used, strict=True) if use], branches.indices

    @jax.jit
    def run(args, d_outs):
        outs, pull, indices = jax.vjp(attend, args, has_aux=True)
        return outs, indices, pull(d_outs)[0]

    return jax.tree.map(np.asarray, run(args, d_outs))


@pytest.mark.parametrize(
    ("used", "own_q_cmp"),
    [
        ((True, False, False, False, False), False),
        pytest.param((True, False, False, False, False), True, marks=pytest.mark.slow),
        pytest.param((True, True, True, True, True), False, marks=pytest.mark.slow),
        pytest.param((False, True, False, False, True), True, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_those_of_the_branches_one_by_one(monkeypatch, used, own_q_cmp):
    taken = []
    original = gated.attend_gated
    monkeypatch.setattr(operators, "attend_gated", lambda *x: taken.append(0) or original(*x))
    args = SPEC.arguments(dtype=jnp.bfloat16)
    args |= {name: args[name][:, QUERIES] for name in ("q", "gates")}  # gates of both signs
    if own_q_cmp:
        args["q_cmp"] = dataclasses.replace(SPEC, length=8).arguments(3, jnp.bfloat16)["q"]
    random = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(random.standard_normal((1, len(QUERIES), SPEC.heads, *shape)))
    d_all = [*(normal(64).astype(jnp.bfloat16) for _ in range(4)), normal().astype(jnp.float32)]
    d_outs = [x for x, use in zip(d_all, used, strict=True) if use]
    with interpreted():
        outs, indices, found = gradients("mosaic_gpu", args, d_outs, None, used)
    assert taken
    assert len(np.unique(indices)) == 3  # queries differ in what they read
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    expected_outs, _, expected = gradients("xla", wide(args), wide(d_outs), jnp.asarray(indices), used)
    relative = lambda x, y: np.linalg.norm(np.float64(x) - y) / max(np.linalg.norm(np.float64(y)), 1e-6)
    for x, y in zip(outs, expected_outs, strict=True):
        assert relative(x, y) < 0.005
    for name in args:
        assert relative(found[name], expected[name]) < 0.006, name
