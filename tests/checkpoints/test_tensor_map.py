"""The map between our parameter tree and Hugging Face's names and shapes."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlab.checkpoints.families.jaxlab import ROWS as TABLE
from jaxlab.checkpoints.fused_qkv import fused_shape, join_fused, split_fused
from jaxlab.checkpoints.tensor_map import entries, host_tensors, to_hf
from jaxlab.checkpoints.tensor_table import parse
from jaxlab.errors import UserError
from jaxlab.models import (
    LatentConfig,
    LearnedPositions,
    ModelConfig,
    MoEConfig,
    NSAConfig,
    PlainVisionConfig,
    RopeConfig,
    abstract_params,
)
from tests.checkpoints import folders

SMALL = ModelConfig(
    vocab_size=11, width=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=5
)
VISION = PlainVisionConfig(num_layers=2, width=8, num_heads=2, mlp_width=7, image_token=10)
CONFIGS = {
    "llama": SMALL,
    "untied": dataclasses.replace(SMALL, tie_embeddings=False, position=LearnedPositions(), max_length=9),
    "biases": dataclasses.replace(SMALL, attention_bias=True, mlp_bias=True, norm="layer", mlp="plain"),
    "norms after": dataclasses.replace(SMALL, pre_norms=False, post_norms=True, qk_norm="width"),
    "a norm for each head": dataclasses.replace(SMALL, qk_norm="each_head", norm="layer"),
    "nsa": dataclasses.replace(SMALL, attention_bias=True, attention=NSAConfig()),
    "nsa, one projection": dataclasses.replace(SMALL, attention=NSAConfig(shared_kv=True)),
    "nsa, scorer": dataclasses.replace(SMALL, attention=NSAConfig(selector="auxiliary")),
    "nsa, indexer": dataclasses.replace(
        SMALL, attention=NSAConfig(selector="indexer", compress_kind="linear", gated=False)
    ),
    "vlm": dataclasses.replace(SMALL, vision=VISION),
    "latent": dataclasses.replace(
        SMALL, latent=LatentConfig(kv_rank=5, query_rank=7), position=RopeConfig(dim=2), num_kv_heads=4
    ),
    "experts": dataclasses.replace(
        SMALL,
        attention_sinks=True,
        moe=MoEConfig(
            num_experts=4,
            width=3,
            shared_width=2,
            shared_gate=True,
            router_bias=True,
            choice_bias=True,
            bias=True,
            first_dense=1,
        ),
    ),
    "three layers of nsa": dataclasses.replace(SMALL, attention=NSAConfig(), num_layers=3),
}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_params(config))


def hf_tensors(params):
    return {entry.pattern: to_hf(params, entry) for entry in entries(params)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_returns_bit_for_bit(name):
    params = random_params(CONFIGS[name])
    back = folders.from_hf_tensors(hf_tensors(params), params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert a.shape == b.shape


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_unique_and_as_many_as_stacked(name):
    params = random_params(CONFIGS[name])
    tensors = list(host_tensors(params))
    assert len({key for key, _ in tensors}) == len(tensors)
    assert sum(value.size for _, value in tensors) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_table_has_no_name_twice():
    assert len({row.path for row in TABLE}) == len(TABLE)
    once = [row for row in TABLE if not row.paths[0].startswith("dense_layers.")]  # layers of one numbering
    assert len({row.name for row in once}) == len(once)


def test_orientation_is_that_of_linear_layers():
    """y = x W^T with Hugging Face's W gives what our einsums give."""
    params = random_params(dataclasses.replace(CONFIGS["untied"], attention_bias=True))
    hf = dict(host_tensors(params))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    attention = jax.tree.map(lambda leaf: np.asarray(leaf)[1], params["layers"]["attention"])
    query = np.einsum("td,dhk->thk", x, attention["query"]) + attention["query_bias"]
    name = "model.layers.1.self_attn.q_proj"
    want = x @ hf[f"{name}.weight"].T + hf[f"{name}.bias"]
    assert hf[f"{name}.weight"].shape == (24, 8)
    np.testing.assert_allclose(query.reshape(4, 24), want, rtol=1e-5)
    heads = np.random.default_rng(1).normal(size=(4, 4, 6)).astype(np.float32)
    out = np.einsum("thk,hkd->td", heads, attention["output"])
    np.testing.assert_allclose(
        out, heads.reshape(4, 24) @ hf["model.layers.1.self_attn.o_proj.weight"].T, rtol=1e-4, atol=1e-5
    )
    assert hf["model.layers.1.self_attn.o_proj.weight"].shape == (8, 24)
    assert hf["model.layers.2.mlp.gate_proj.weight"].shape == (5, 8)
    np.testing.assert_array_equal(hf["lm_head.weight"], np.asarray(params["head"]["table"]).T)
    np.testing.assert_array_equal(hf["model.embed_tokens.weight"], np.asarray(params["embedding"]["table"]))


def test_branches_of_nsa_have_their_own_names():
    params = random_params(CONFIGS["nsa"])
    hf = dict(host_tensors(params))
    key = np.asarray(params["layers"]["attention"]["key"])
    for branch, name in enumerate(("compression", "selection", "window")):
        tensor = hf[f"model.layers.2.self_attn.k_proj.{name}.weight"]
        np.testing.assert_array_equal(tensor, key[2, branch].reshape(8, 12).T)
        assert f"model.layers.0.self_attn.v_proj.{name}.bias" in hf
    assert "model.layers.0.self_attn.k_proj.weight" not in hf


def test_parameters_without_a_name_are_errors():
    params = random_params(SMALL)
    with pytest.raises(UserError, match="no name"):
        entries({**params, "extra": {"table": np.zeros((2, 2), np.float32)}})
    with pytest.raises(UserError, match="does not fit"):
        entries({"embedding": {"table": np.zeros((2, 2, 2), np.float32)}})


FUSED = {
    # Three queries a key: q q q k v of the first key's head, then of the second.
    "grouped heads": ("(h k) d -> d h k", 0, "h", [(5, 6, 4), (5, 2, 4), (5, 2, 4)]),
    # Keys and values of different sizes, head by head.
    "latents": ("(h k) d -> d h k", 0, "h", [(5, 3, 4), (5, 3, 2)]),
    # Gate and up in turns.
    "neurons": ("e d f -> e d f", 2, "f", [(2, 5, 3), (2, 5, 3)]),
    "one after the other": ("(h k) d -> d h k", 0, "", [(5, 6, 4), (5, 2, 4)]),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_tensor_is_taken_apart_and_put_together(name):
    text, axis, runs, shapes = FUSED[name]
    layout = parse(text)
    tensor = np.arange(np.prod(fused_shape(layout, axis, shapes))).reshape(fused_shape(layout, axis, shapes))
    parts = split_fused(tensor, layout, axis, shapes, runs=runs)
    leaves = [layout.to_ours(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    if name == "grouped heads":  # rows of one head of a key: 3 x 4 of queries, 4 of the key, 4 of the value
        rows = tensor.reshape(2, 20, 5)
        np.testing.assert_array_equal(leaves[0][:, 4].T, rows[1, 4:8])
        np.testing.assert_array_equal(leaves[1][:, 1].T, rows[1, 12:16])
    if name == "latents":
        np.testing.assert_array_equal(leaves[1][:, 2].T, tensor[16:18])
    if name == "neurons":
        np.testing.assert_array_equal(leaves[0], tensor[..., ::2])
        np.testing.assert_array_equal(leaves[1], tensor[..., 1::2])
    theirs = [layout.to_theirs(leaf) for leaf in leaves]
    back = join_fused(theirs, layout, axis, shapes, runs=runs, module=np)
    np.testing.assert_array_equal(back, tensor)
