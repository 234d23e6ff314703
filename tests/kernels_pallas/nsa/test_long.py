"""A million tokens: no axis, index or position outgrows an int32, though whole arrays do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import (
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.mosaic_gpu.plan import plan_rows
from kernels_pallas.nsa.specs.arg_specs import with_tag
from kernels_pallas.target import OLDEST_JAX, compiled_elsewhere, interpreted
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import relative_error

SPEC = with_tag("shapes")["a million tokens"]
LARGEST = np.iinfo(np.int32).max
needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)


def equations(jaxpr):
    """All of them, those of inner programs and kernels too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("mosaic_gpu", marks=needs_pallas)])
def test_indices_are_per_axis_and_axes_fit_an_int32(implementation):
    """Forward and backward: arrays have more than 2^31 elements, but integers are made of the numbers along
    an axis only; a factor on one (tile times rows, block times tokens) stays within the longest axis."""

    def step(args, d_out):
        out, pull = jax.vjp(lambda a: nsa_attention(**a, implementation=implementation)[0], args)
        return out, pull(d_out)[0]

    with compiled_elsewhere():
        traced = jax.make_jaxpr(step)(SPEC.shapes(), SPEC.output())
    seen = list(equations(traced.jaxpr))
    shapes = [v.aval.shape for e in seen for v in (*e.invars, *e.outvars) if hasattr(v.aval, "shape")]
    assert max(math.prod(shape) for shape in shapes) > LARGEST
    assert max(size for shape in shapes for size in shape) < LARGEST // 8
    for equation in seen:
        if equation.primitive.name == "iota":
            shape, axis = equation.params["shape"], equation.params["dimension"]
            assert shape[axis] <= 1 << 24, equation  # rows of a key/value head: tokens times heads
        if equation.primitive.name in ("gather", "scatter", "scatter-add", "scatter-min"):
            indices = equation.invars[1].aval
            assert indices.dtype in (jnp.int32, jnp.uint32), equation
            assert max(equation.invars[0].aval.shape) < LARGEST, equation
    if implementation == "mosaic_gpu":
        layout = plan_rows(SPEC.length, SPEC.groups, 128)
        assert layout.padded_length * layout.padded_groups == 1 << 24


def last_queries():
    """Two queries at the end of 2^20 keys, two heads, one of keys and values."""
    length, queries = SPEC.length, 2
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
    q, k, v = draw(1, queries, 2, 4), draw(1, length, 1, 4), draw(1, length, 1, 4)
    positions = jnp.arange(length - queries, length, dtype=jnp.int32)[None]
    return q, k, v, positions


def expected(q, k, v, mask):
    return np.stack(
        [oracle.softmax(q[0, :, h], k[0, :, 0], mask, q.shape[-1] ** -0.5) @ v[0, :, 0] for h in range(2)], 1
    )[None]


def tokens_of_blocks(indices, positions, length):
    mask = np.zeros((indices.shape[2], length), bool)
    for t, row in enumerate(np.asarray(indices)[0, 0]):
        for block in row[row >= 0]:
            mask[t, block * 64 : block * 64 + 64] = True
    return mask & (np.arange(length) <= np.asarray(positions)[0][:, None])


def test_the_last_queries_of_a_million_tokens_in_xla():
    """All three branches and the choice against the float64 oracle."""
    q, k, v, positions = last_queries()
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    length, geometry = SPEC.length, {"block_len": SPEC.block_len, "stride": SPEC.stride}
    k_cmp, v_cmp = k[:, : SPEC.blocks], v[:, : SPEC.blocks]

    @jax.jit
    def run(q, k, v, k_cmp, v_cmp, positions):
        place = {"q_positions": positions}
        out, lse = compressed_attention(q, k_cmp, v_cmp, **geometry, **place)
        indices = select_blocks(q, k_cmp, lse, **SPEC.selection_sizes, kv_len=length, **place)
        selected = selected_attention(q, k, v, indices, block_size=64, **place)
        recent = window_attention(q, k, v, window=512, **place)
        return out, indices, selected, recent

    out, indices, selected, recent = run(q, k, v, k_cmp, v_cmp, positions)

    wide = [np.asarray(x, np.float64) for x in (q, k, v, k_cmp, v_cmp)]
    ends = np.arange(SPEC.blocks) * SPEC.stride + SPEC.block_len - 1
    at = np.asarray(positions)[0][:, None]
    visible = ends[None] <= at
    assert relative_error(out, expected(wide[0], *wide[3:], visible)) < 1e-4
    shares = sum(oracle.softmax(wide[0][0, :, h], wide[3][0, :, 0], visible, 0.5) for h in range(2))
    scores = oracle.importance(shares, length, SPEC.block_len, SPEC.stride, SPEC.block_size)
    forced = {0, length // 64 - 2, length // 64 - 1}
    for t, row in enumerate(np.asarray(indices)[0, 0].tolist()):
        free = [block for block in np.argsort(-scores[t], kind="stable").tolist() if block not in forced]
        assert row == sorted([*forced, *free[:13]])
    assert relative_error(selected, expected(*wide[:3], tokens_of_blocks(indices, positions, length))) < 1e-4
    age = at - np.arange(length)
    assert relative_error(recent, expected(*wide[:3], (age >= 0) & (age < 512))) < 1e-4


@pytest.mark.slow
@needs_pallas
def test_the_last_queries_of_a_million_tokens_in_the_kernels():
    """Selection in the interpreter, of blocks from the first to the last."""
    q, k, v, positions = last_queries()
    last = SPEC.length // 64 - 1
    indices = jnp.tile(jnp.asarray([0, 1, last // 2, last - 1, last], jnp.int32), (1, 1, 2, 1))
    with interpreted():
        found = selected_attention(
            q, k, v, indices, block_size=64, q_positions=positions, implementation="mosaic_gpu"
        )
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    mask = tokens_of_blocks(indices, positions, SPEC.length)
    assert relative_error(found, expected(*wide, mask)) < 0.005
