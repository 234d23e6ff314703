"""LoRA: the arithmetic beside merged matrices, PEFT's own logits and names, what is trained and what not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxlab.checkpoints import load_model, open_model
from jaxlab.errors import UserError
from jaxlab.models import (
    LowRank,
    ModelConfig,
    MoEConfig,
    PlainVisionConfig,
    merge_updates,
)
from jaxlab.training import LoraConfig, find_trainable
from tests.models.tiny import make_params, run_model
from tests.training import lora_cases

QUICK = ("gpt2", "llava")


def logits(params, case, config):
    batch = lora_cases.inputs(case)
    batch = {{"pixel_values": "images"}.get(name, name): value for name, value in batch.items()}
    return np.asarray(run_model(params, batch, config).logits)


@pytest.mark.parametrize(
    "case",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in lora_cases.CASES],
)
def test_peft_gives_the_same_logits(case, tmp_path):
    config, params, trainable = lora_cases.opened(case, tmp_path / "base")
    trained = lora_cases.tree(trainable)
    with np.load(lora_cases.GOLDEN / f"{case}.npz") as file:
        expected = file["logits"]
    scale = np.abs(expected).max()
    found = logits(trainable.join(trained, trainable.frozen(params)), case, config)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)
    # What is written has PEFT's names, and is the same model when it is read and merged.
    lora_cases.write_adapter(tmp_path / "adapter", trainable, trained, "base")
    told = json.loads((lora_cases.GOLDEN / "peft.json").read_text())["cases"][case]["tensors"]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "np") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == told  # noqa: SIM118
    opened = open_model(tmp_path / "base", adapter=tmp_path / "adapter")
    merged = opened.read()
    ours = merge_updates(trainable.join(trained, params))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    jax.tree.map(same, ours, merged)
    assert load_model(tmp_path / "base")[0] == config


def test_dropout_is_of_what_enters_the_adapter():
    base, a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(6, 4), (6, 2), (2, 4)]))
    x = jax.random.normal(jax.random.key(9), (3, 5, 6))
    key = jax.random.key(3)
    dropping = LowRank(base, a, b, key, 0.5, 0.25)
    kept = jax.random.bernoulli(key, 0.75, x.shape)
    expected = 0.5 * (jnp.where(kept, x / 0.75, 0) @ a) @ b
    np.testing.assert_allclose(dropping.product(x), expected, rtol=1e-6)
    assert 0 < float(jnp.mean(kept)) < 1
    np.testing.assert_allclose(LowRank(base, a, b, None, 0.5, 0.25).product(x), 0.5 * x @ a @ b, rtol=1e-5)
    with pytest.raises(ValueError, match="dropout"):
        dropping.merged()


MODEL = ModelConfig(num_layers=2, width=16, num_heads=2, mlp_width=24, vocab_size=32)
VLM = dataclasses.replace(MODEL, vision=PlainVisionConfig(image_size=4, patch_size=2, width=8, mlp_width=12))
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=4, experts_per_token=2))


@pytest.mark.parametrize(
    ("model", "lora", "match"),
    [
        (MODEL, LoraConfig(targets=("q_prj",)), r"lora\.targets: .* called 'q_prj'; did you mean q_proj"),
        (MODEL, LoraConfig(targets=("fc",)), r"there are all-linear, down_proj, embed_tokens, gate_proj"),
        (MODEL, LoraConfig(targets=("embed_tokens",)), "is the head too"),
        (MODEL, LoraConfig(targets=("q_proj",), parts=("vision",)), "the model's vision is called"),
        (VLM, LoraConfig(targets=("linear_3",), parts=("projector",)), "did you mean linear_2"),
        (EXPERTS, LoraConfig(targets=("up_proj",)), "called 'up_proj'"),
        (MODEL, LoraConfig(also=("layers.mlp",)), r"both name layers\.mlp\.\w+; leave"),
        (MODEL, LoraConfig(also=("projector",)), r"lora\.also: no parameter matches 'projector'"),
        (MODEL, LoraConfig(also=("layers.mlp.upp",)), r"did you mean layers\.mlp\.up"),
        (
            dataclasses.replace(MODEL, tie_embeddings=False),
            LoraConfig(targets=("lm_head",), dropout=0.1),
            r"lora\.dropout is not known to lm_head",
        ),
    ],
)
def test_what_matches_nothing_is_refused(model, lora, match):
    with pytest.raises(UserError, match=match):
        find_trainable(model, lora)


def test_what_is_trained_is_small():
    lora = find_trainable(VLM, LoraConfig(rank=2, targets=("q_proj", "down_proj"), also=("projector",)))
    assert set(lora.abstract()) == {"layers", "projector"}
    assert lora.abstract()["layers"]["attention"]["query"]["lora_b"].shape == (2, 2, 2, 8)
    assert "projector" not in lora.frozen(lora.shapes)
    assert find_trainable(VLM, None).everything
    only = find_trainable(VLM, None, lambda name: not name.startswith("vision."))
    assert set(only.abstract()) == {"vision"}
    assert set(only.frozen(only.shapes)) == {"embedding", "layers", "final_norm", "projector"}
    params = make_params(VLM, jax.random.key(0))
    begun = lora.join(jax.jit(lora.begin)(params, jax.random.key(1)), lora.frozen(params))
    tokens = {"tokens": np.arange(6, dtype=np.int32)[None]}
    # Nothing is changed before the first step.
    np.testing.assert_array_equal(run_model(begun, tokens, VLM)[0], run_model(params, tokens, VLM)[0])
