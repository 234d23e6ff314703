"""NSA in anybody's model: from tokens on, on a mesh, under vmap and remat."""

import collections
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels_pallas.nsa import (
    NSA_RESIDUALS,
    NewTokens,
    attend_to_text,
    nsa_attention,
    shared_tokens,
)
from kernels_pallas.sharding import MeshAxes
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import Case, cotangents, relative_error
from tests.kernels_pallas.nsa.test_properties import layer, layer_arguments

CASE = Case(48, batch=2)
IDS = jnp.asarray([[1] * 11 + [2] * 30 + [0] * 7, [1] * 19 + [2] * 29], jnp.int32)
AXES = MeshAxes(("data",), "model", "context")


def attend(args, ids=None, **more):
    tokens = NewTokens(*(args[name] for name in ("k_raw", "v_raw", "k_slc", "v_slc", "k_win", "v_win")))
    phis = args["phi_k"], args["phi_v"]
    return attend_to_text(args["q"], tokens, args["gates"], *phis, segment_ids=ids, **CASE.sizes, **more)[0]


def rotate(x, positions):
    """No rotary positions, but something that depends on them."""
    return x * jnp.cos(positions)[..., None, None].astype(x.dtype)


def test_it_is_compression_and_attention():
    args = layer_arguments(CASE)
    np.testing.assert_array_equal(jax.jit(attend)(args, IDS), jax.jit(lambda a: layer(CASE, a, IDS))(args))


STEP = jax.value_and_grad(
    lambda args, ids: jnp.sum(jnp.sin(attend(args, ids, rotate=rotate, axes=AXES))), argnums=0
)


@functools.cache
def of_one_device():
    return jax.jit(STEP)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mesh_gives_what_one_device_gives(packed):
    """Examples are spread, heads and stretches of tokens split; texts begin at no multiple of anything. Rows
    without segments are, on one device, rows of one text."""
    args = layer_arguments(CASE)
    expected = of_one_device()(args, IDS if packed else jnp.ones_like(IDS))
    mesh = jax.make_mesh((1, 2, 2), ("data", "model", "context"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        found = jax.jit(STEP)(args, IDS if packed else None)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_what_a_mesh_cannot_split_is_named():
    odd = Case(47)
    for case, shape, message in (
        (CASE, (1, 4, 1), "2 heads cannot be split over 4"),
        (odd, (1, 1, 4), "47 tokens cannot be split over 4"),
    ):
        args = layer_arguments(case)
        mesh = jax.make_mesh(shape, ("data", "model", "context"), axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(attend, axes=AXES), args)


def test_a_mesh_of_explicit_axes_is_refused_by_name():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'data' is Explicit.*Auto,\) \* 2"):
        jax.eval_shape(functools.partial(attend, axes=AXES), layer_arguments(CASE))


def test_shared_keys_and_values_are_those_of_every_branch():
    args = layer_arguments(CASE)
    k, v = args["k_slc"], args["v_slc"]
    assert shared_tokens(k, v, args["k_win"]) == (k, v, args["k_win"], v, args["k_win"], v)
    np.testing.assert_array_equal(shared_tokens(k, v).k_win, k)


def test_vmap_gives_what_a_loop_gives():
    """Outputs, choices and gradients, against the oracle one by one."""
    case = Case(30)
    each = [case.arguments(seed=seed) for seed in range(3)]
    d_outs = jnp.stack([cotangents(case, seed)[0] for seed in range(3)])

    def step(args, d_out):
        def attention(args):
            out, branches = nsa_attention(**args, **case.sizes)
            return out, branches.indices

        out, pull, indices = jax.vjp(attention, args, has_aux=True)
        return out, indices, pull(d_out)[0]

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
    outs, indices, gradients = jax.jit(jax.vmap(step))(stacked, d_outs)
    for i, args in enumerate(each):
        nothing = jnp.zeros_like(d_outs[i])
        d_outputs = [d_outs[i], nothing, nothing, nothing]
        expected, expected_gradients = oracle.batched_nsa(args, indices[i], case.sizes, d_outputs)
        chosen, _ = oracle.brute_force_choice(args["q"][0], args["k_cmp"][0], case.length, case.sizes)
        for head, row in np.ndindex(case.kv_heads, case.length):
            assert [j for j in indices[i, 0, head, row].tolist() if j >= 0] == chosen[head][row]
        assert relative_error(outs[i], expected[0]) < 1e-5
        for name, reference in expected_gradients.items():
            assert relative_error(gradients[name][i], reference) < 1e-5, name


def test_forward_mode_is_refused_in_one_line():
    case = Case(12)
    args = case.arguments()
    with pytest.raises(TypeError, match="forward-mode") as error:
        jax.jvp(lambda q: nsa_attention(**args | {"q": q}, **case.sizes)[0], (args["q"],), (args["q"],))
    assert "\n" not in str(error.value).strip()


def operations(jaxpr):
    """How often each one stands in a program, inner functions included."""
    found = collections.Counter(equation.primitive.name for equation in jaxpr.eqns)
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += operations(inner)
    return found


def test_a_policy_keeps_what_the_backward_passes_need():
    """With the names kept no attention and no choice runs twice."""
    case = Case(40)
    args = case.arguments()
    attention = lambda a: jnp.sum(jnp.sin(nsa_attention(**a, **case.sizes)[0]))
    keep = jax.checkpoint_policies.save_only_these_names(*NSA_RESIDUALS)
    plain, kept, again = (
        operations(jax.make_jaxpr(jax.value_and_grad(f))(args).jaxpr)
        for f in (attention, jax.checkpoint(attention, policy=keep), jax.checkpoint(attention))
    )
    for name in ("dot_general", "sort", "exp"):
        assert kept[name] == plain[name] < again[name], name
