"""Merges of two folders of one family, of kinds whose tensors lie or are named in their own way."""

import json

import numpy as np
import pytest

from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.tasks import main
from tests.checkpoints import folders

SLOW = ("granitemoe", "qwen2_moe", "cohere2", "exaone4", "glm4_moe", "deepseek_v2", "olmoe", "seed_oss")
CASES = ("gpt_oss", "deepseek_v3", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW))


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_the_average_tensor_by_tensor(tmp_path, case, capsys):
    one = folders.weights(case)
    rng = np.random.default_rng(0)
    other = {n: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for n, x in one.items()}
    for name, tensors in (("one", one), ("other", other)):
        folders.write(tmp_path / name, folders.config(case), tensors)
    models = [{"model": str(tmp_path / n), "weight": w} for n, w in (("one", 0.25), ("other", 0.75))]
    recipe = {"kind": "merge", "operator": "linear", "models": models}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    merged = str(tmp_path / "merged")
    assert main(["merge", str(tmp_path / "recipe.yaml"), "--out", merged, "--verify"]) == 0
    assert main(["convert", merged, str(tmp_path / "out")]) == 0
    capsys.readouterr()
    found = open_folder(tmp_path / "out")
    assert set(found) == set(one)
    for name in found:
        expected = 0.25 * one[name] + 0.75 * other[name]
        np.testing.assert_allclose(found[name].read(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
