"""The branches with their gates as one function, in the interpreter, against the float64 oracle."""

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
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import relative_error

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}"
)

SPEC = ArgSpec(
    192, heads=8, kv_heads=1, key_dim=64, value_dim=64, num_blocks=2, num_init=0, num_local=1, window=60
)
QUERIES = np.arange(176, 184)
FUTURE = {"slc": 184, "win": 184, "cmp": 45}
"""The first token, and the first block of 8 tokens every 4, after all queries: in tiles that they read."""
SIZES = SPEC.sizes


@pytest.fixture(autouse=True)
def one_warpgroup(monkeypatch):
    tuning = lambda *_: Tuning(warpgroups=1, registers=False)
    monkeypatch.setattr(operators, "kernel_tuning", tuning)


def gradients(args, d_outs, used):
    """Outputs that are `used`, of the sum and the branches, indices and all gradients."""
    positions = jnp.asarray(QUERIES[None], jnp.int32)

    def attend(args):
        out, branches = nsa_attention(**args, **SIZES, q_positions=positions, implementation="mosaic_gpu")
        return [x for x, use in zip((out, *branches[:4]), used, strict=True) if use], branches.indices

    @jax.jit
    def run(args, d_outs):
        outs, pull, indices = jax.vjp(attend, args, has_aux=True)
        return outs, indices, pull(d_outs)[0]

    with interpreted():
        return jax.tree.map(np.asarray, run(args, d_outs))


def expected(args, d_all, indices, used):
    """The same by the oracle."""
    *d_outs, d_lse = (np.float64(d) * use for d, use in zip(d_all, used, strict=True))
    positions = QUERIES[None]
    outs, found = oracle.batched_nsa(args, indices, SIZES, d_outs, positions=positions, d_lse=d_lse)
    tokens = oracle.visible_tokens(SPEC.length, positions=QUERIES)
    blocks = oracle.visible_blocks(tokens, SPEC.block_len, SPEC.stride)
    queries, keys = (np.float64(args[name][0]) for name in ("q_cmp" if "q_cmp" in args else "q", "k_cmp"))
    lse = [oracle.log_sum_exp(queries[:, h], keys[:, 0], blocks, 64**-0.5) for h in range(SPEC.heads)]
    outs.append(np.stack(lse, axis=1)[None])
    return [x for x, use in zip(outs, used, strict=True) if use], found


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
    """With NaN in the future of all queries, which reaches neither outputs nor gradients."""
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
    unseen = {f"{x}_{branch}": start for x in "kv" for branch, start in FUTURE.items()}
    poisoned = args | {name: args[name].at[:, start:].set(jnp.nan) for name, start in unseen.items()}
    outs, indices, found = gradients(poisoned, d_outs, used)
    assert taken
    assert len(np.unique(indices)) == 3  # queries differ in what they read
    expected_outs, expected_gradients = expected(args, d_all, indices, used)
    for x, y in zip(outs, expected_outs, strict=True):
        assert relative_error(x, y, floor=1e-6) < 0.005
    for name in args:
        assert relative_error(found[name], expected_gradients[name], floor=1e-6) < 0.006, name
