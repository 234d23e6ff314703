"""Which parameters there are: names, shapes, logical axes, numbers; and what a config refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.models import (
    FullAttentionConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    NSAConfig,
    PlainVisionConfig,
    Quest,
    RopeConfig,
    SlidingAttentionConfig,
    abstract_params,
    count_params,
    init_params,
    language_model,
    logical_axes,
)
from jaxlab.models.axis_rules import partition_spec
from jaxlab.models.sharding import MeshConfig, make_mesh, param_shardings
from kernels_pallas.nsa import compress_blocks
from tests.models.tiny import NSA, VARIANTS, VISION, make_config


def shapes(config):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


LATENT = {
    "latent": LatentConfig(kv_rank=5, query_rank=7),
    "position": RopeConfig(dim=2),
    "num_kv_heads": None,
}
EXPERTS = MoEConfig(
    num_experts=4, router_bias=True, choice_bias=True, bias=True, swiglu_limit=7.0, shared_width=3
)
CONFIGS = {name: make_config(name) for name in VARIANTS} | {
    "latent": make_config(**LATENT),
    "experts": make_config(moe=EXPERTS, attention_sinks=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_axes_that_the_sharding_table_knows(name):
    config = CONFIGS[name]
    params, axes = abstract_params(config), logical_axes(config)
    assert jax.tree.structure(params) == jax.tree.structure(axes)
    for shape, names in zip(jax.tree.leaves(params), jax.tree.leaves(axes), strict=True):
        assert len(shape.shape) == len(names)
        assert shape.dtype == jnp.float32
        partition_spec(names)  # raises on an unknown axis or one mesh axis used twice


def test_names_and_shapes():
    found = shapes(make_config("nsa", mlp_bias=True))
    assert found == {
        "embedding.table": (13, 12),
        "final_norm.scale": (12,),
        "layers.attention_norm.scale": (2, 12),
        "layers.mlp_norm.scale": (2, 12),
        "layers.attention.query": (2, 12, 4, 4),
        "layers.attention.key": (2, 3, 12, 2, 4),
        "layers.attention.value": (2, 3, 12, 2, 6),
        "layers.attention.output": (2, 4, 6, 12),
        "layers.attention.query_bias": (2, 4, 4),
        "layers.attention.key_bias": (2, 3, 2, 4),
        "layers.attention.value_bias": (2, 3, 2, 6),
        "layers.attention.output_bias": (2, 12),
        "layers.attention.compress_key.position": (2, 4, 4),
        "layers.attention.compress_key.hidden": (2, 4, 4, 4),
        "layers.attention.compress_key.hidden_bias": (2, 4),
        "layers.attention.compress_key.output": (2, 4, 4),
        "layers.attention.compress_key.output_bias": (2, 4),
        "layers.attention.compress_value.position": (2, 4, 6),
        "layers.attention.compress_value.hidden": (2, 4, 6, 4),
        "layers.attention.compress_value.hidden_bias": (2, 4),
        "layers.attention.compress_value.output": (2, 4, 6),
        "layers.attention.compress_value.output_bias": (2, 6),
        "layers.attention.gate.output": (2, 12, 4, 3),
        "layers.attention.gate.bias": (2, 4, 3),
        "layers.mlp.gate": (2, 12, 8),
        "layers.mlp.up": (2, 12, 8),
        "layers.mlp.down": (2, 8, 12),
        "layers.mlp.gate_bias": (2, 8),
        "layers.mlp.up_bias": (2, 8),
        "layers.mlp.down_bias": (2, 12),
    }
    other = shapes(make_config("other"))
    assert other["position.table"] == (24, 12)
    assert other["head.table"] == (12, 13)
    assert other["layers.attention_norm.bias"] == (2, 12)
    assert "layers.mlp.gate" not in other
    hidden_gate = shapes(make_config("nsa", attention=NSAConfig(gate_width=7)))
    assert hidden_gate["layers.attention.gate.hidden"] == (2, 12, 7)
    assert hidden_gate["layers.attention.gate.output"] == (2, 7, 4, 3)


def test_a_vision_language_model_holds_its_language_model():
    config = make_config("vision")
    found = shapes(config)
    assert found["vision.patch.table"] == (2 * 2 * 2, 8)
    assert found["vision.position.table"] == (4, 8)
    assert found["vision.layers.attention.query"] == (1, 8, 2, 4)
    assert found["projector.hidden"] == (8, 12)
    assert found["projector.output"] == (12, 12)
    language = abstract_params(config.language)
    assert jax.tree.map(lambda x: x.shape, language_model(abstract_params(config))) == jax.tree.map(
        lambda x: x.shape, language
    )


def test_count_by_hand():
    config = make_config()
    layer = 12 * 4 * 4 + 12 * 2 * 4 + 12 * 2 * 6 + 4 * 6 * 12 + 3 * 12 * 8 + 2 * 12
    assert count_params(abstract_params(config)) == 13 * 12 + 2 * layer + 12


def test_compression_that_starts_as_the_mean():
    nsa = replace(make_config("nsa").nsa, compress_init="mean", compress_width=20)
    config = make_config("nsa", attention=nsa)
    attention = init_params(config, jax.random.key(0))["layers"]["attention"]
    rng = np.random.default_rng(0)
    for name, dim in (("compress_key", config.key_dim), ("compress_value", config.value_dim)):
        for layer in range(config.num_layers):
            params = jax.tree.map(lambda leaf: leaf[layer], attention[name])  # noqa: B023
            x = jnp.asarray(rng.standard_normal((1, 12, 2, dim)), jnp.float32)
            got = compress_blocks(x, params, block_len=nsa.block_len, stride=nsa.stride)
            mean = np.stack([x[:, s : s + 4].mean(axis=1) for s in range(0, 9, 2)], axis=1)
            np.testing.assert_allclose(got, mean, atol=1e-6)
    # Units beyond have something to learn from, and nothing to say yet.
    assert (np.asarray(attention["compress_key"]["hidden"][..., 2 * config.key_dim :]) != 0).all()


def test_initial_values_do_not_depend_on_where_they_are_made():
    config = make_config("vision", width=16)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    shardings = param_shardings(config, mesh)
    init = lambda key: init_params(config, key)
    here = jax.jit(init)(jax.random.key(3))
    spread = jax.jit(init, out_shardings=shardings)(jax.random.key(3))
    assert spread["layers"]["mlp"]["up"].sharding.shard_shape((2, 16, 8)) == (2, 8, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), here, spread)
    query, output = here["layers"]["attention"]["query"], here["layers"]["attention"]["output"]
    assert np.std(query) == pytest.approx(0.02, rel=0.2)
    assert np.std(output) == pytest.approx(0.02 / 2, rel=0.2)  # 1 / sqrt(2 L) of two layers
    assert (here["layers"]["mlp_norm"]["scale"] == 1).all()
    assert not (query[0] == query[1]).any()  # layers are drawn apart


def test_sharding_table_refuses():
    with pytest.raises(ValueError, match="'colour' is not in the table"):
        partition_spec(("embed", "colour"))
    with pytest.raises(ValueError, match="'fsdp' twice"):
        partition_spec(("embed", "embed"))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (
            lambda: make_config("nsa", attention=NSAConfig(compress_init="mean", compress_width=3)),
            "attention.compress_init",
        ),
        (lambda: ModelConfig(num_layers=0), "num_layers"),
        (lambda: ModelConfig(num_heads=4, num_kv_heads=3), "num_kv_heads"),
        (lambda: ModelConfig(width=10, num_heads=4), "num_heads"),
        (lambda: ModelConfig(head_dim=5), "head_dim"),
        (lambda: RopeConfig(theta=0.0), "theta"),
        (
            lambda: ModelConfig(attention=FullAttentionConfig(implementation="cudnn")),
            "attention.implementation",
        ),
        (
            lambda: ModelConfig(
                attention=SlidingAttentionConfig(implementation="chunked"), attention_softcap=1.0
            ),
            "attention.implementation",
        ),
        (lambda: ModelConfig(vision=PlainVisionConfig(num_layers=1, image_token=256)), "vision.image_token"),
        (lambda: PlainVisionConfig(num_layers=-1), "num_layers"),
        (lambda: PlainVisionConfig(patch_size=0), "patch_size"),
        (lambda: PlainVisionConfig(num_layers=1, image_size=9), "patch_size"),
        (lambda: PlainVisionConfig(num_layers=1, num_heads=5), "num_heads"),
        (lambda: LatentConfig(kv_rank=0), "kv_rank"),
        (lambda: ModelConfig(latent=LatentConfig()), "latent"),  # nothing of a head is without positions
        (lambda: make_config("nsa", **LATENT), "latent"),
        (lambda: make_config(sparsity=Quest(), **LATENT), "latent"),
        (lambda: make_config(**{**LATENT, "num_kv_heads": 2}), "latent"),
        (lambda: make_config(**LATENT, attention_bias=True), "latent"),
        (lambda: make_config(**LATENT, qk_norm="head"), "latent"),
        (lambda: make_config("nsa", attention_sinks=True), "attention_sinks"),
        (lambda: make_config(sparsity=Quest(), attention_sinks=True), "attention_sinks"),
        (
            lambda: make_config(
                attention=FullAttentionConfig(implementation="chunked"), attention_sinks=True
            ),
            "attention_sinks",
        ),
        (lambda: ModelConfig(residual_scale=0.0), "residual_scale"),
        (lambda: ModelConfig(logit_scale=float("inf")), "logit_scale"),
        (lambda: NSAConfig(num_blocks=2), "num_blocks"),
        (lambda: NSAConfig(stride=64), "stride"),
        (lambda: NSAConfig(window=0), "window"),
        (lambda: NSAConfig(num_init=-1), "num_init"),
        (lambda: NSAConfig(branches=()), "branches"),
        (lambda: NSAConfig(branches=("window", "window")), "branches"),
        (lambda: NSAConfig(branches=("selection", "window")), "branches"),
        (lambda: NSAConfig(selector="min_max", num_local=0), "selector"),
    ],
)
def test_impossible_combinations_name_the_key(make, key):
    with pytest.raises(ConfigError) as raised:
        make()
    assert raised.value.key == key
    assert "\n" not in str(raised.value)


def test_derived_sizes():
    config = ModelConfig(width=64, num_heads=8)
    assert (config.kv_heads, config.key_dim, config.value_dim) == (8, 8, 8)
    assert make_config("vision").language == make_config()
    assert VISION.num_patches == 4
    assert hash(NSA) == hash(NSAConfig(**vars(NSA)))  # configs are static arguments of jit
