"""The list of argument specs: what hangs on names and tags."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa import nsa_attention
from kernels_pallas.nsa.specs.arg_specs import ARG_SPECS, ArgSpec, with_tag


def test_names_are_unique_and_every_tag_is_used():
    assert len({spec.name for spec in ARG_SPECS}) == len(ARG_SPECS)
    for tag in ("test", "compile", "shapes", "tune", "benchmark"):
        assert with_tag(tag), tag
    assert all(spec.tags for spec in ARG_SPECS)


def test_the_papers_sizes_are_compiled_and_all_groups():
    compiled = with_tag("compile").values()
    assert {(s.key_dim, s.value_dim) for s in compiled if s.length == 65536} == {(192, 128), (128, 128)}
    assert {s.groups for s in compiled} == {1, 8, 16, 64}
    assert [s.length for s in with_tag("shapes").values()] == [1 << 20]


LARGE = [spec for spec in ARG_SPECS if spec.name in ("paper", "one head a group", "a million tokens")]


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.name)
def test_every_spec_is_a_call(spec):
    """Some that no test calls with numbers: shapes by hand for q, and what the attention makes of all."""
    shapes = spec.shapes()
    assert shapes["q"].shape == (spec.batch, spec.length, spec.heads, spec.key_dim)
    out, branches = jax.eval_shape(
        lambda args: nsa_attention(**args, **spec.sizes, segment_ids=spec.segment_ids), shapes
    )
    assert out == spec.output()
    assert branches.indices.shape == (spec.batch, spec.kv_heads, spec.length, spec.num_blocks)


def test_arguments_have_the_shapes_and_follow_the_seed():
    spec = ArgSpec(3, heads=2, kv_heads=1, key_dim=4, value_dim=2, segments=(2, -1))
    args = spec.arguments(seed=5)
    assert {name: (x.shape, x.dtype) for name, x in args.items()} == {
        name: (x.shape, x.dtype) for name, x in spec.shapes().items()
    }
    assert args["k_cmp"].shape == (1, 0, 1, 4)  # no complete block
    assert jnp.array_equal(args["q"], spec.arguments(seed=5)["q"])
    assert not jnp.array_equal(args["q"], spec.arguments(seed=6)["q"])
    assert spec.segment_ids.tolist() == [[1, 1, 0]]
