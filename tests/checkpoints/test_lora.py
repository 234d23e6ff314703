"""LoRA adapters by hand: scales, transposed layers, embeddings, replaced modules, names; what is not read."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints.lora import merged
from jaxlab.checkpoints.tensor_folder import Planned, open_folder, write_folder
from jaxlab.errors import UserError

RNG = np.random.default_rng(0)
Q, EMBED, CONV = "model.layers.0.self_attn.q_proj", "model.embed_tokens", "transformer.h.0.attn.c_attn"
BASE = {
    f"{Q}.weight": RNG.standard_normal((6, 4)).astype(np.float32),
    "model.layers.0.mlp.up_proj.weight": RNG.standard_normal((5, 4)).astype(ml_dtypes.bfloat16),
    f"{EMBED}.weight": RNG.standard_normal((7, 4)).astype(np.float32),
    f"{CONV}.weight": RNG.standard_normal((4, 9)).astype(np.float32),
    "language_model.model.layers.0.self_attn.k_proj.weight": RNG.standard_normal((3, 4)).astype(np.float32),
    "lm_head.weight": RNG.standard_normal((7, 4)).astype(np.float32),
}


def drawn(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def adapter(path, tensors, **config):
    """A folder with an adapter; the writer of models serves, its files are renamed."""
    planned = [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()]
    write_folder(path, planned, config={})
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "config.json").unlink()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "owner/base", **config}
    (path / "adapter_config.json").write_text(json.dumps(told))
    return path


@pytest.fixture
def base(tmp_path):
    planned = [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in BASE.items()]
    write_folder(tmp_path / "base", planned, config={})
    return open_folder(tmp_path / "base")


def pair(module, rows, columns, infix="", rank=2):
    key = f"base_model.model.{module}"
    a, b = drawn(rank, columns), drawn(rows, rank)
    return {f"{key}.lora_A{infix}.weight": a, f"{key}.lora_B{infix}.weight": b}, b @ a


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 4}}, 2.0),
        ({"alpha_pattern": {"k_proj": 4}}, 3.0),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 4}}, 2.0),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.(q|k)_proj": 4}}, 2.0),
        ({"r": 8, "rank_pattern": {"layers.0.self_attn.q_proj": 2}}, 3.0),
    ],
)
def test_the_update_is_scaled(base, tmp_path, config, scale):
    tensors, update = pair(Q, 6, 4)
    found = merged(base, adapter(tmp_path / "a", tensors, **config))
    np.testing.assert_allclose(found[f"{Q}.weight"].read(), BASE[f"{Q}.weight"] + scale * update, rtol=1e-6)
    rows = found[f"{Q}.weight"].read_rows(2, 5)
    np.testing.assert_allclose(rows, (BASE[f"{Q}.weight"] + scale * update)[2:5], rtol=1e-6)
    assert set(found) == set(BASE)
    np.testing.assert_array_equal(found["lm_head.weight"].read(), BASE["lm_head.weight"])


def test_the_dtype_of_the_base_stays(base, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    tensors, update = pair(name, 5, 4, infix=".default")
    found = merged(base, adapter(tmp_path / "a", tensors))[f"{name}.weight"].read()
    expected = (BASE[f"{name}.weight"].astype(np.float32) + 3 * update).astype(ml_dtypes.bfloat16)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_layers_that_lie_transposed(base, tmp_path):
    tensors, update = pair("transformer.h.0.attn.c_attn", 9, 4)
    found = merged(base, adapter(tmp_path / "a", tensors, fan_in_fan_out=True))
    expected = BASE[f"{CONV}.weight"] + 3 * update.T
    np.testing.assert_allclose(found[f"{CONV}.weight"].read_rows(1, 3), expected[1:3], rtol=1e-5)


def test_embeddings_and_replaced_modules(base, tmp_path):
    a, b, head = drawn(2, 7), drawn(4, 2), drawn(7, 4)
    key = f"base_model.model.{EMBED}"
    tensors = {
        f"{key}.lora_embedding_A": a,
        f"{key}.lora_embedding_B": b,
        "base_model.model.lm_head.modules_to_save.weight": head,
    }
    found = merged(base, adapter(tmp_path / "a", tensors))
    np.testing.assert_allclose(
        found[f"{EMBED}.weight"].read(), BASE[f"{EMBED}.weight"] + 3 * (b @ a).T, rtol=1e-5
    )
    np.testing.assert_array_equal(found["lm_head.weight"].read(), head)


@pytest.mark.parametrize(
    "module", ["model.language_model.layers.0.self_attn.k_proj", "layers.0.self_attn.q_proj"]
)
def test_names_in_memory_find_those_on_disk(base, tmp_path, module):
    rows = 3 if "k_proj" in module else 6
    tensors, update = pair(module, rows, 4)
    found = merged(base, adapter(tmp_path / "a", tensors))
    place = next(name for name in BASE if name.endswith(module[-21:] + ".weight"))
    np.testing.assert_allclose(found[place].read(), BASE[place] + 3 * update, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.text_model."])
def test_an_adapter_of_a_vlm_s_language_model(tmp_path, prefix):
    """Trained on the language model by itself; vision has layers of the same names."""
    end = "layers.0.self_attn.q_proj.weight"
    weights = {prefix + end: drawn(6, 4), f"vision_tower.vision_model.encoder.{end}": drawn(6, 4)}
    planned = [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in weights.items()]
    tensors, update = pair("model.layers.0.self_attn.q_proj", 6, 4)
    path = adapter(tmp_path / "a", tensors)
    write_folder(tmp_path / "vlm", planned, config={})
    found = merged(open_folder(tmp_path / "vlm"), path)
    np.testing.assert_allclose(found[prefix + end].read(), weights[prefix + end] + 3 * update, rtol=1e-5)
    (other,) = set(weights) - {prefix + end}
    assert found[other].read().tobytes() == weights[other].tobytes()
    # Where layers that read images shift the numbers, the name means nothing.
    write_folder(tmp_path / "mllama", planned, config={"text_config": {"cross_attention_layers": [3]}})
    with pytest.raises(
        UserError, match=r"layers 3 of this model read images .* base_model\.model\..*layers\.N\.\.\."
    ):
        merged(open_folder(tmp_path / "mllama"), path)


def test_patterns_are_for_names_in_memory(base, tmp_path):
    module = "model.language_model.layers.0.self_attn.k_proj"
    tensors, update = pair(module, 3, 4)
    found = merged(base, adapter(tmp_path / "a", tensors, alpha_pattern={module: 4}))
    place = "language_model.model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_allclose(found[place].read(), BASE[place] + 2 * update, rtol=1e-5)


def test_a_folder_without_the_prefix_of_its_family(tmp_path):
    weight = drawn(4, 9)
    planned = [Planned("h.0.attn.c_attn.weight", weight.dtype, weight.shape, lambda: weight)]
    write_folder(tmp_path / "gpt2", planned, config={})
    tensors, update = pair("transformer.h.0.attn.c_attn", 9, 4)
    path = adapter(tmp_path / "a", tensors, fan_in_fan_out=True)
    found = merged(open_folder(tmp_path / "gpt2"), path)["h.0.attn.c_attn.weight"].read()
    np.testing.assert_allclose(found, weight + 3 * update.T, rtol=1e-5)


def test_a_name_that_may_mean_two_tensors(tmp_path):
    names = ["model.h.0.q.weight", "transformer.h.0.q.weight"]
    planned = [Planned(name, np.dtype(np.float32), (3, 4), lambda: drawn(3, 4)) for name in names]
    write_folder(tmp_path / "base", planned, config={})
    with pytest.raises(UserError, match=r"may mean each of model\.h\.0\.q\.weight, transformer\."):
        merged(open_folder(tmp_path / "base"), adapter(tmp_path / "a", pair("h.0.q", 3, 4)[0]))


def test_a_pickled_adapter_needs_leave(base, tmp_path):
    path = adapter(tmp_path / "a", GOOD)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(UserError, match="--allow-pickle"):
        merged(base, path)
    with pytest.raises(UserError, match="not a checkpoint of PyTorch"):
        merged(base, path, allow_pickle=True)


GOOD, _ = pair(Q, 6, 4)
A, B = GOOD
BAD = {
    "another kind": (GOOD, {"peft_type": "IA3"}),
    "DoRA": (GOOD, {"use_dora": True}),
    "biases": (GOOD, {"bias": "all"}),
    "layers said twice": (GOOD, {"layer_replication": [[0, 1], [0, 1]]}),
    "a start that changes the base": (GOOD, {"init_lora_weights": "pissa_niter_4"}),
    "patterns that are none": (GOOD, {"alpha_pattern": {"(": 1}}),
    "a list of patterns": (GOOD, {"rank_pattern": [1]}),
    "an alpha that is no number": (GOOD, {"lora_alpha": "6"}),
    "an alpha beyond all numbers": (GOOD, {"lora_alpha": 10**400}),
    "an alpha beyond float32": (GOOD, {"lora_alpha": 1e300}),
    "an alpha that is NaN": (GOOD, {"lora_alpha": float("nan")}),
    "a pattern that takes for ever": (GOOD, {"alpha_pattern": {r"([a-z_.\d]+)+!": 1}}),
    "a pattern of many choices": (GOOD, {"alpha_pattern": {"(.|.)" * 30 + "!": 1}}),
    "a pattern of many options": (GOOD, {"alpha_pattern": {".?" * 30 + "!": 1}}),
    "no rank at all": ({A: GOOD[A][:0], B: GOOD[B][:, :0]}, {"rank_pattern": {"q_proj": 0}}),
    "no tensors": ({}, {}),
    "a tensor given twice": ({**GOOD, A.replace("A.weight", "A.default.weight"): GOOD[A]}, {}),
    "a module changed and replaced": (
        {**GOOD, f"base_model.model.{Q}.modules_to_save.weight": drawn(6, 4)},
        {},
    ),
    "matrices that are none": ({A: GOOD[A][None], B: GOOD[B]}, {}),
    "no rank": (GOOD, {"r": None}),
    "another rank": (GOOD, {"r": 3}),
    "half of a pair": ({A: GOOD[A]}, {}),
    "shapes that do not fit": ({A: GOOD[A][:, :3], B: GOOD[B]}, {}),
    "ranks that do not fit": ({A: GOOD[A], B: GOOD[B][:, :1]}, {}),
    "a module that is not there": (pair("model.layers.9.self_attn.q_proj", 6, 4)[0], {}),
    "something else": ({"base_model.model.extra": drawn(2)}, {}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(base, tmp_path, name):
    tensors, config = BAD[name]
    with pytest.raises(UserError) as error:
        merged(base, adapter(tmp_path / "a", tensors, **config))
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_not_there(base, tmp_path):
    with pytest.raises(UserError, match="no such adapter"):
        merged(base, tmp_path / "absent")
