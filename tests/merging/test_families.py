"""Injection into vision-language models of Hugging Face: from folders, to a folder, tensor by tensor."""

import dataclasses
import json
import re

import numpy as np
import pytest

from jaxlab.checkpoints import families
from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.tasks import main
from tests.checkpoints import folders

VLMS = {  # case: where its language model's tensors are, beside a model of language alone
    "llava": r"^language_model\.",
    "qwen2_vl": r"^(?=model\.|lm_head)",
}
LAMBDA_V, LAMBDA_E = 0.9, 0.4


def text_folder(path, case, pattern, seed):
    """The language model of a case as one of its own, with other numbers."""
    config = folders.config(case)
    kind = families.find_by_model_type(config["model_type"]).read_config(config)
    text = config.get("text_config", config)
    text = {**text, "model_type": "qwen2" if case.startswith("qwen") else text["model_type"]}
    rng = np.random.default_rng(seed)
    tensors = {
        re.sub(pattern, "", name): value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in folders.weights(case).items()
        if re.search(pattern, name)
    }
    folders.write(path, language_config(kind, text), tensors)
    return tensors


def language_config(kind, text):
    """config.json of a plain language model like the one inside `kind`."""
    family = families.find(text["model_type"])
    rope = dataclasses.replace(kind.rope, sections=(), sections_interleaved=False)
    return family.write_config(dataclasses.replace(kind.language, position=rope, family=family.name))


@pytest.mark.parametrize("case", VLMS)
def test_an_expert_reaches_the_language_model_and_nothing_else(tmp_path, case, capsys):
    pattern = VLMS[case]
    vlm = folders.weights(case)
    folders.make(tmp_path / "vlm", case)
    base = text_folder(tmp_path / "base", case, pattern, seed=0)
    expert = text_folder(tmp_path / "expert", case, pattern, seed=1)
    recipe = {
        "kind": "inject",
        "vlm": str(tmp_path / "vlm"),
        "expert": str(tmp_path / "expert"),
        "base": str(tmp_path / "base"),
        "operator": "task_arithmetic",
        "lambda_v": LAMBDA_V,
        "lambda_e": LAMBDA_E,
        "embeddings": "vlm",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    merged = str(tmp_path / "merged")
    assert main(["merge", str(tmp_path / "recipe.yaml"), "--out", merged, "--verify"]) == 0
    assert main(["convert", merged, str(tmp_path / "out")]) == 0
    capsys.readouterr()
    found = open_folder(tmp_path / "out")
    assert set(found) == set(vlm)
    for name, before in vlm.items():
        after, own = found[name].read(), re.sub(pattern, "", name)
        if not re.search(pattern, name) or "embed_tokens" in name or "lm_head" in name:
            assert after.tobytes() == before.tobytes(), name
            continue
        expected = base[own] + LAMBDA_V * (before - base[own]) + LAMBDA_E * (expert[own] - base[own])
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6, err_msg=name)


LANGUAGE = ("gpt_neox", "phi3_longrope", "stablelm_parallel", "gpt_oss", "deepseek_v3")
SLOW = (
    "opt",
    "olmo2",
    "olmo3",
    "smollm3",
    "phi",
    "cohere_qk_norm",
    "exaone4",
    "glm4_moe",
    "granitemoe",
    "olmoe",
)


@pytest.mark.parametrize("case", [*LANGUAGE, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_two_models_of_a_family_merge_tensor_by_tensor(tmp_path, case, capsys):
    """Fused tensors and norms of single heads too, as the folders have them."""
    rng = np.random.default_rng(0)
    one = folders.weights(case)
    other = {name: value + 0.1 * rng.standard_normal(value.shape, np.float32) for name, value in one.items()}
    for name, tensors in (("one", one), ("other", other)):
        folders.write(tmp_path / name, folders.config(case), tensors)
    models = [{"model": str(tmp_path / name), "weight": 0.5} for name in ("one", "other")]
    (tmp_path / "r.yaml").write_text(json.dumps({"kind": "merge", "operator": "linear", "models": models}))
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--verify"]) == 0
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    found = open_folder(tmp_path / "hf")
    assert set(found) == set(one)
    for name in one:
        np.testing.assert_allclose(found[name].read(), (one[name] + other[name]) / 2, atol=1e-6)
