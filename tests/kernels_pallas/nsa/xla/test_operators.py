"""Outputs, gradients and selected blocks in XLA against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas.nsa import nsa_attention
from kernels_pallas.nsa.specs.arg_specs import ArgSpec, with_tag
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import Case, cotangents, relative_error, shrink_tiles
from tests.kernels_pallas.nsa.operators_base import OperatorTests

SPECS = with_tag("test")
USUAL_TILES = ("one token", "odd head dims", "paper's blocks")
SLOW = (
    "many tiles",
    "one head per group",
    "sixteen heads per group",
    "packed, with padding",
    "odd head dims",
)
"""Also in `TestOperators` (sixteen heads, packed, odd dims), spread over devices (many tiles) and in
test_properties.py (a head a group)."""


class TestOperators(OperatorTests):
    """With tiles so small that there are many."""

    implementation = "xla"
    dtype = jnp.float32
    tolerance = 1e-5

    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch):
        shrink_tiles(monkeypatch)


def run(case: ArgSpec, dtype=jnp.float32, mesh=None):
    """Arguments, cotangents, the four outputs, the chosen blocks, gradients; two calls agree bit for bit."""
    args = case.arguments(dtype=dtype)
    d_outputs = [w.astype(dtype) for w in cotangents(case)]

    def attention(args):
        out, branches = nsa_attention(**args, **case.sizes, segment_ids=case.segment_ids)
        return (out, *branches[:3]), branches.indices

    def step(args, d_outputs):
        outputs, pull, indices = jax.vjp(attention, args, has_aux=True)
        return outputs, indices, pull(tuple(d_outputs))[0]

    compiled = jax.jit(step)
    if mesh is not None:
        args = jax.device_put(args, NamedSharding(mesh, PartitionSpec("data")))
    results = compiled(args, d_outputs)
    for x, again in zip(*map(jax.tree.leaves, (results, compiled(args, d_outputs))), strict=True):
        np.testing.assert_array_equal(x, again)
    return args, d_outputs, *results


def compare(case: ArgSpec, mesh=None) -> None:
    args, d_outputs, outputs, indices, gradients = run(case, mesh=mesh)
    expected, expected_gradients = oracle.batched_nsa(args, indices, case.sizes, d_outputs, case.segment_ids)
    for name, x, reference in zip(("total", "cmp", "slc", "win"), outputs, expected, strict=True):
        assert relative_error(x, reference, floor=1e-3) < 1e-5, name
    for name, reference in expected_gradients.items():
        assert relative_error(gradients[name], reference) < 1e-5, name
    for b in range(case.batch):
        segments = None if case.segment_ids is None else case.segment_ids[b]
        chosen, _ = oracle.brute_force_choice(
            args["q"][b], args["k_cmp"][b], case.length, case.sizes, segments
        )
        for head in range(case.kv_heads):
            for t in range(case.length):
                row = [int(j) for j in indices[b, head, t] if j >= 0]
                assert row == chosen[head][t], (head, t)
    if case.segments:
        padding = np.asarray(case.segment_ids) == 0
        assert all((np.asarray(x)[padding] == 0).all() for x in outputs)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in SPECS
        if name not in USUAL_TILES
    ],
)
def test_many_chunks_and_tiles(name, monkeypatch):
    shrink_tiles(monkeypatch)
    compare(SPECS[name])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in USUAL_TILES]
)
def test_tiles_of_the_usual_size(name):
    compare(SPECS[name])


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 31, 32, 33, 63, 64, 65, 127, 511, 512, 513, 1000, 2047, 2048, 2049])
def test_lengths_around_the_papers_blocks(length):
    compare(
        Case(
            length,
            heads=2,
            kv_heads=1,
            key_dim=8,
            value_dim=4,
            block_len=32,
            stride=16,
            block_size=64,
            num_blocks=16,
            num_local=2,
            window=512,
        )
    )


def test_a_batch_spread_over_devices(monkeypatch):
    shrink_tiles(monkeypatch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    compare(SPECS["many tiles"], mesh)


def test_bfloat16_is_close_to_float32():
    case = Case(129, heads=4, kv_heads=1, key_dim=64, value_dim=32, num_blocks=6)
    args, d_outputs, outputs, indices, gradients = run(case, jnp.bfloat16)
    expected, expected_gradients = oracle.batched_nsa(args, indices, case.sizes, d_outputs)
    for x, reference in zip(outputs[1:], expected[1:], strict=True):
        assert x.dtype == jnp.bfloat16
        assert relative_error(x, reference) < 0.005
    for name, reference in expected_gradients.items():
        assert gradients[name].dtype == jnp.bfloat16
        assert relative_error(gradients[name], reference) < 0.01, name


def test_the_oracle_by_differences():
    """The oracle's own gradients, which are written out by hand there."""
    case = Case(
        13, heads=2, kv_heads=1, key_dim=3, value_dim=2, block_len=4, stride=2, block_size=4, window=5
    )
    args = {name: np.asarray(x, np.float64) for name, x in case.arguments().items()}
    d_outputs = [np.asarray(w, np.float64) for w in cotangents(case)]
    chosen = np.full((1, 1, 13, 4), -1)
    chosen[..., 0], chosen[..., 1] = 0, np.arange(13) // 4

    def loss(args):
        outputs, _ = oracle.batched_nsa(
            args, np.where(chosen == 0, [0, -1, -1, -1], chosen), case.sizes, d_outputs
        )
        return sum((x * d).sum() for x, d in zip(outputs, d_outputs, strict=True))

    _, gradients = oracle.batched_nsa(
        args, np.where(chosen == 0, [0, -1, -1, -1], chosen), case.sizes, d_outputs
    )
    random, step = np.random.default_rng(2), 1e-6
    for name, gradient in gradients.items():
        direction = random.standard_normal(gradient.shape)
        ends = [loss({**args, name: args[name] + sign * step * direction}) for sign in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), (gradient * direction).sum(), rtol=1e-6)
