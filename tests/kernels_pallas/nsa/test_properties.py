"""What must hold whatever the numbers: causality, padding, packing, decoding, refusals, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import (
    compress_blocks,
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import Case, cotangents, relative_error


def compression(case: Case, dim: int, width: int = 6, seed: int = 5) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    shapes = {
        "position": (case.block_len, dim),
        "hidden": (case.block_len, dim, width),
        "hidden_bias": (width,),
        "output": (width, dim),
        "output_bias": (dim,),
    }
    return {name: jnp.asarray(0.3 * random.standard_normal(s), jnp.float32) for name, s in shapes.items()}


def layer_arguments(case: Case) -> dict[str, jax.Array]:
    """Arguments of `layer`: tokens' queries, keys, values and gates, and the two compression MLPs."""
    args = {name: x for name, x in case.arguments().items() if name not in ("k_cmp", "v_cmp")}
    random = np.random.default_rng(7)
    for name, dim in (("k_raw", case.key_dim), ("v_raw", case.value_dim)):
        shape = (case.batch, case.length, case.kv_heads, dim)
        args[name] = jnp.asarray(random.standard_normal(shape), jnp.float32)
    return args | {"phi_k": compression(case, case.key_dim), "phi_v": compression(case, case.value_dim)}


def layer(case: Case, args, segment_ids=None, q_positions=None):
    """NSA from tokens on, compression included."""
    rest = dict(args)
    blocks = {"block_len": case.block_len, "stride": case.stride, "segment_ids": segment_ids}
    k_cmp = compress_blocks(rest.pop("k_raw"), rest.pop("phi_k"), **blocks)
    v_cmp = compress_blocks(rest.pop("v_raw"), rest.pop("phi_v"), **blocks)
    return nsa_attention(
        **rest, k_cmp=k_cmp, v_cmp=v_cmp, **case.sizes, segment_ids=segment_ids, q_positions=q_positions
    )[0]


TOKEN_ARRAYS = ("q", "k_slc", "v_slc", "k_win", "v_win", "k_raw", "v_raw", "gates")


@pytest.mark.parametrize(("block_len", "stride", "length"), [(8, 4, 33), (10, 3, 40), (4, 6, 25), (5, 1, 12)])
def test_compression_against_the_oracle(block_len, stride, length):
    case = Case(length, kv_heads=2, key_dim=5, block_len=block_len, stride=stride)
    params = compression(case, 5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 2, 5)), jnp.float32)
    weight = np.random.default_rng(1).standard_normal((case.blocks, 2, 5))

    def loss(x, params):
        out = compress_blocks(x, params, block_len=block_len, stride=stride)
        return jnp.sum(out[0] * jnp.asarray(weight, jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, params)
    tree = (np.asarray(x[0], np.float64), {name: np.asarray(p, np.float64) for name, p in params.items()})
    expected = oracle.compress(*tree, block_len, stride)
    assert relative_error(out[0], expected, floor=1e-3) < 1e-6
    # Gradients along one random direction for each argument, by differences in float64.
    random = np.random.default_rng(2)
    leaves, structure = jax.tree.flatten(tree)
    got = [np.asarray(g, np.float64) for g in jax.tree.leaves((gradients[0][0], gradients[1]))]
    for i, leaf in enumerate(leaves):
        direction = random.standard_normal(leaf.shape)
        ends = []
        for sign in (1, -1):
            moved = [y + sign * 1e-5 * direction if j == i else y for j, y in enumerate(leaves)]
            ends.append((oracle.compress(*structure.unflatten(moved), block_len, stride) * weight).sum())
        expected_slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose((got[i] * direction).sum(), expected_slope, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(("block_len", "stride"), [(8, 4), (7, 3)])
def test_a_linear_map_and_the_mean_against_loops(block_len, stride):
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 30, 2, 5))
    params = {"position": (block_len, 5), "weight": (block_len, 5, 5), "bias": (5,)}
    params = {name: random.standard_normal(shape) for name, shape in params.items()}
    blocks = [x[0, start : start + block_len] for start in range(0, 30 - block_len + 1, stride)]
    linear = lambda b: (
        np.einsum("jhd,jdf->hf", b + params["position"][:, None], params["weight"]) + params["bias"]
    )
    for phi, expected in ((params, linear), ({}, lambda b: b.mean(axis=0))):
        phi = {name: jnp.asarray(p, jnp.float32) for name, p in phi.items()}
        for ids in (None, jnp.ones((1, 30), jnp.int32)):
            found = compress_blocks(
                jnp.asarray(x, jnp.float32), phi, block_len=block_len, stride=stride, segment_ids=ids
            )
            wanted = np.stack([expected(b) for b in blocks])
            np.testing.assert_allclose(found[0, : len(blocks)], wanted, rtol=1e-4, atol=1e-5)


PACKED = Case(72, kv_heads=4, segments=(-3, 30, -8, 25, -6))
"""A head a group; texts begin at no multiple of anything."""


@pytest.fixture(scope="module")
def packed():
    """Outputs and gradients of packed texts as a function of `layer_arguments` and d_out."""

    def step(args, d_out):
        out, pull = jax.vjp(lambda a: layer(PACKED, a, PACKED.segment_ids), args)
        return out, pull(d_out)[0]

    return jax.jit(step)


def test_no_output_depends_on_a_later_token(packed):
    args, d_out = layer_arguments(PACKED), cotangents(PACKED)[0]
    out, _ = packed(args, d_out)
    for moment in (4, 22, 50):
        changed = {name: x.at[:, moment:].add(3.0) if name in TOKEN_ARRAYS else x for name, x in args.items()}
        other, _ = packed(changed, d_out)
        np.testing.assert_allclose(other[:, :moment], out[:, :moment], rtol=1e-5, atol=1e-6)
        assert not np.allclose(other[:, moment], out[:, moment], atol=1e-2)


def test_padding_full_of_nan_reaches_nothing(packed):
    padding = np.asarray(PACKED.segment_ids)[0] == 0
    args = layer_arguments(PACKED)
    d_out = cotangents(PACKED)[0]
    clean = packed(args, d_out)
    poison = {name: x.at[:, padding].set(jnp.nan) if name in TOKEN_ARRAYS else x for name, x in args.items()}
    poisoned = packed(poison, d_out.at[:, padding].set(jnp.nan))
    # The gate of a padding token meets the NaN cotangent outside of the branches.
    gate_gradient = poisoned[1]["gates"].at[:, padding].set(0.0)
    poisoned = (poisoned[0].at[:, padding].set(0.0), poisoned[1] | {"gates": gate_gradient})
    for x, y in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(x, y)
    assert all(
        (np.asarray(clean[1][name])[:, padding] == 0).all() for name in TOKEN_ARRAYS if name != "gates"
    )


@pytest.mark.slow  # test_decoding.py compares chunks as well, and operators_base.py with the oracle
def test_decoding_and_prefill_in_chunks_equal_the_full_forward():
    case = Case(70, batch=2, segments=(-4, 66))
    args, ids = case.arguments(), case.segment_ids
    full = jax.jit(lambda a: nsa_attention(**a, **case.sizes, segment_ids=ids)[0])(args)

    @jax.jit
    def ask(args, positions):
        rows = positions[:, :, None, None]
        own = {name: jnp.take_along_axis(args[name], rows, axis=1) for name in ("q", "gates")}
        return nsa_attention(**args | own, **case.sizes, segment_ids=ids, q_positions=positions)[0]

    for starts in ((0, 47), (23, 0), (46, 9)):  # rows of different lengths
        positions = jnp.asarray([np.arange(start, start + 23) for start in starts], jnp.int32)
        expected = jnp.take_along_axis(full, positions[:, :, None, None], axis=1)
        np.testing.assert_allclose(ask(args, positions), expected, rtol=2e-5, atol=2e-6)


Q, KV = jnp.ones((1, 6, 4, 3)), jnp.ones((1, 6, 2, 3))
CMP = jnp.ones((1, 2, 2, 3))
INDICES = jnp.zeros((1, 2, 6, 1), jnp.int32)
BLOCKS = {"block_len": 4, "stride": 2}


@pytest.mark.parametrize(
    "call",
    [
        lambda **how: window_attention(Q, KV, KV, window=2, **how),
        lambda **how: selected_attention(Q, KV, KV, INDICES, block_size=2, **how),
        lambda **how: compressed_attention(Q, CMP, CMP, **BLOCKS, **how),
        lambda **how: select_blocks(Q, CMP, Q[..., 0], **BLOCKS, block_size=2, num_blocks=3, **how),
    ],
)
def test_a_named_implementation_runs_or_raises(call):
    assert jax.eval_shape(functools.partial(call, implementation="xla")) == jax.eval_shape(call)
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        call(implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_attention(Q[:, :, :3], KV, KV, window=2), "3 query heads cannot share 2"),
        (lambda: window_attention(Q, KV, KV, window=0), "window must be positive"),
        (lambda: window_attention(Q[:, :4], KV, KV, window=2), "4 queries against 6 keys need q_positions"),
        (lambda: window_attention(Q.astype(jnp.bfloat16), KV, KV, window=2), "one dtype"),
        (lambda: compressed_attention(Q, CMP[:, :1], CMP[:, :1], **BLOCKS), "2 complete blocks"),
        (
            lambda: select_blocks(Q, CMP, Q[..., 0], **BLOCKS, block_size=2, num_blocks=2),
            "1 first and 2 local blocks do not fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_memory_grows_with_the_length_not_its_square():
    length = 16384
    case = Case(length, heads=4, kv_heads=1, block_len=32, stride=16, block_size=64, window=512)
    step = jax.value_and_grad(lambda a: jnp.sum(nsa_attention(**a, **case.sizes)[0] ** 2))
    memory = jax.jit(step).lower(case.shapes()).compile().memory_analysis()
    # Half as many tokens take 4,073 bytes each, these 3,863; one float32 for each query and selection block
    # alone would add 1,024.
    assert memory.temp_size_in_bytes < 4400 * length
