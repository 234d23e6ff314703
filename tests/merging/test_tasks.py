"""The tasks merge and merge-search on saved models: what they write is what they say, bit for bit."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoints import OpenModel, host_tensors, load_model, open_model, save_model
from jaxlab.config import build, dump, load
from jaxlab.errors import UserError
from jaxlab.merging import (
    AccountLine,
    InjectRecipe,
    MergeAccount,
    MergeRecipe,
    Method,
    Trio,
    inject,
    load_recipe,
    plan_injection,
    read_trio,
    verify_merged,
)
from jaxlab.merging.injection import layer_weights, prepare_task_vectors, weight_task_vectors
from jaxlab.models import ModelConfig, NoPositions, PlainVisionConfig, abstract_params
from jaxlab.models.sharding import MeshConfig, make_mesh, param_shardings
from jaxlab.tasks import main

LM = ModelConfig(
    vocab_size=256, width=8, num_layers=2, num_heads=2, mlp="plain", mlp_width=8, position=NoPositions()
)
VISION = PlainVisionConfig(num_layers=1, width=8, num_heads=2, mlp_width=4, image_token=255)


def make(config, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), abstract_params(config)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VLM, an expert, a base, and models that do not fit."""
    place = tmp_path_factory.mktemp("models")
    configs = {
        "vlm": dataclasses.replace(LM, vision=VISION),
        "expert": LM,
        "base": LM,
        "wide": dataclasses.replace(LM, mlp_width=7),
        "other": dataclasses.replace(LM, activation="relu"),
    }
    for seed, (name, config) in enumerate(configs.items()):
        save_model(place / name, config, make(config, seed))
    return place


def write(path, text):
    path.write_text(text)
    return str(path)


def injection(folder, **more):
    lines = {"kind": "inject", **{role: folder / role for role in ("vlm", "expert", "base")}, **more}
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def same(a, b):
    left, right = dict(host_tensors(a)), dict(host_tensors(b))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


def test_merge_injects_writes_and_verifies(folder, tmp_path, capsys):
    text = injection(folder, lambda_v=0.9, lambda_e=0.4, operator="ties", density=0.5)
    recipe, out = write(tmp_path / "recipe.yaml", text), tmp_path / "out"
    assert main(["merge", recipe, "--out", str(out), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "verified" in printed
    assert "model.layers.{i}.mlp.up_proj.weight" in printed
    config, params, _ = load_model(out)
    trio = read_trio(*(open_model(folder / role) for role in ("vlm", "expert", "base")))
    want, _ = inject(
        trio.vlm, trio.expert, trio.base, operator="ties", density=0.5, lambda_v=0.9, lambda_e=0.4
    )
    same(params, want)
    assert config == trio.config
    written = json.loads((out / "account.json").read_text())
    lines = (line | {key: tuple(line[key]) for key in ("shape", "models")} for line in written["tensors"])
    account = MergeAccount(tuple(AccountLine(**line) for line in lines))
    assert account.differences(params) == []
    assert written["recipe"]["operator"] == "ties"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    # A model that is not the account's is found.
    with pytest.raises(UserError, match=r"tensors differ from the account: model\.layers"):
        verify_merged(folder / "vlm", account)


def tree_hash(place):
    """Of every file, folder and link below a place: its path, what it is, its bytes."""
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*")):
        kind = "link" if path.is_symlink() else "file" if path.is_file() else "folder"
        content = {"link": os.readlink, "file": Path.read_bytes, "folder": lambda _: ""}[kind](path)
        digest.update(f"{path.relative_to(place)}\0{kind}\0{content}\0".encode())
    return digest.hexdigest()


@pytest.fixture
def desk(folder, tmp_path):
    """A place with the three models, a recipe of them, and other people's things."""
    for role in ("vlm", "expert", "base"):
        shutil.copytree(folder / role, tmp_path / "models" / role)
    write(tmp_path / "inject.yaml", injection(tmp_path / "models", lambda_e=0.5))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    (tmp_path / "photo").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    return tmp_path


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("models/vlm", "is an input"),
        ("models/base", "is an input"),
        ("models", "holds the input"),
        (".", "holds the input"),
        ("models/expert/merged", "lies in the input"),
        ("photos", "not a folder that this tool wrote"),
        ("photo", "is no folder"),
        ("link", "a link"),
    ],
)
def test_overwrite_replaces_nothing_that_merge_did_not_write(desk, capsys, monkeypatch, out, message):
    before = tree_hash(desk)
    monkeypatch.setattr(OpenModel, "__init__", lambda *_: pytest.fail("a model was opened"))
    assert main(["merge", str(desk / "inject.yaml"), "--out", str(desk / out), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert tree_hash(desk) == before


def test_overwrite_replaces_its_own_output_last(desk, capsys, monkeypatch):
    out, recipe = desk / "merged", str(desk / "inject.yaml")
    assert main(["merge", recipe, "--out", str(out)]) == 0
    first, models = dict(host_tensors(load_model(out)[1])), tree_hash(desk / "models")
    assert main(["merge", recipe, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    # Something of another hand in it: kept.
    (out / "notes.txt").write_text("mine")
    before = tree_hash(desk)
    assert main(["merge", recipe, "--out", str(out), "--overwrite"]) == 2
    assert "notes.txt, which this tool did not write" in capsys.readouterr().err
    assert tree_hash(desk) == before
    (out / "notes.txt").unlink()
    # A failure on the way leaves the old one.
    broken = write(desk / "broken.yaml", injection(desk / "models", lambda_e="[1.0, 2.0, 3.0]"))
    before = tree_hash(desk)
    assert main(["merge", broken, "--out", str(out), "--overwrite"]) == 2
    assert tree_hash(desk) == before
    opened = []
    init = OpenModel.__init__
    monkeypatch.setattr(OpenModel, "__init__", lambda self, path: (opened.append(path), init(self, path))[1])
    write(desk / "inject.yaml", injection(desk / "models", lambda_e=0.25))
    assert main(["merge", recipe, "--out", str(out), "--overwrite"]) == 0
    assert sorted(opened) == sorted(desk / "models" / role for role in ("vlm", "expert", "base"))
    second = dict(host_tensors(load_model(out)[1]))
    assert any(np.any(first[name] != second[name]) for name in first)
    assert tree_hash(desk / "models") == models
    assert [p.name for p in desk.iterdir() if p.name.startswith(".")] == []


def test_merge_of_language_models(folder, tmp_path, capsys):
    text = f"kind: merge\noperator: task_arithmetic\nlambda: 0.5\nbase: {folder}/base\nmodels:\n"
    text += f"  - {{model: {folder}/expert, weight: 0.5}}\n  - {{model: {folder}/base}}\n"
    out = tmp_path / "out"
    assert main(["merge", write(tmp_path / "r.yaml", text), "--out", str(out), "--verify"]) == 0
    capsys.readouterr()
    merged, expert, base = (
        dict(host_tensors(load_model(p)[1])) for p in (out, folder / "expert", folder / "base")
    )
    for name, value in merged.items():
        np.testing.assert_allclose(value, base[name] + 0.25 * (expert[name] - base[name]), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": "{}/wide"}, "cannot be merged: mlp_width is 8 in one, 7 in the other"),
        ({"expert": "{}/other"}, "cannot be merged: activation is silu in one, relu in the other"),
        ({"base": "{}/absent"}, "no such model"),
        ({"base": ""}, "base"),
        ({"operator": "tie"}, "operator: no operator 'tie'"),
        ({"operator": "ties"}, "density: ties needs it"),
        ({"lamda_v": 1}, "did you mean lambda_v?"),
        ({"kind": "injct"}, "did you mean inject?"),
        ({"kind": "[inject]"}, "no such kind of recipe"),
        ({"lambda_v": "[1.0, 2.0, 3.0]"}, "3 values for 2 layers"),
    ],
)
def test_merge_refuses_in_one_line(folder, tmp_path, capsys, change, message):
    change = {key: str(value).format(folder) for key, value in change.items()}
    recipe = write(tmp_path / "recipe.yaml", injection(folder, **change))
    assert main(["merge", recipe, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_recipes_say_what_they_are(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="one of models, slices and modules is needed, found none"):
        load_recipe(write(tmp_path / "a.yaml", "merge_method: ties\nmodels: []\n"))
    with pytest.raises(UserError, match="expected lines of `key: value`"):
        load_recipe(write(tmp_path / "b.yaml", "- 1\n"))
    rules = "lambda_e:\n  - {pattern: '*.mlp.*', value: 0.5}\n  - {pattern: '*', value: 1}\n"
    recipe = load_recipe(write(tmp_path / "c.yaml", "kind: inject\nvlm: v\nexpert: e\nbase: b\n" + rules))
    assert isinstance(recipe, InjectRecipe)
    assert recipe.lambda_e[1].value == 1.0
    again = load(InjectRecipe, write(tmp_path / "d.yaml", dump(recipe)))
    assert again == recipe
    for text, message in {
        "kind: merge\noperator: linear\nbase: b\nmodels: [{model: a}]\n": "linear takes no base",
        "kind: merge\noperator: ties\nmodels: [{model: a}]\n": "ties needs a base",
        "kind: merge\noperator: linear\nlambda: 1.0\nmodels: [{model: a}]\n": "lambda: linear does not",
        "kind: merge\noperator: slerp\nmodels: [{model: a}]\n": "t: slerp needs it",
        "kind: merge\nmodels: []\n": "needs a list of models",
    }.items():
        with pytest.raises(UserError, match=message):
            load_recipe(write(tmp_path / "e.yaml", text))
    assert build(MergeRecipe, {"base": "b", "lambda": 0.5, "models": [{"model": "a"}]}).parameters == {
        "lambda": 0.5
    }


def hand_trio(keep=lambda params: params):
    vlm = dataclasses.replace(LM, vision=VISION)
    return Trio(vlm, None, keep(make(vlm, 0)), keep(make(LM, 1)), keep(make(LM, 2)), None, LM, LM)


def few(params):
    """A part of the tensors, quicker to compile."""
    mlp = {name: params["layers"]["mlp"][name] for name in ("up", "down")}
    return {**params, "layers": {"mlp": mlp}}


def test_sharded_models_give_the_same_bits():
    trio = hand_trio(few)
    plan = plan_injection(trio.vlm, trio.expert, trio.base)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    spread = [few(param_shardings(config, mesh)) for config in (trio.config, LM, LM)]

    method = Method.of("ties", density=0.3)
    weights = layer_weights(plan, 0.9), layer_weights(plan, 0.4)
    results = []
    for where in ([jax.devices()[0]] * 3, spread):
        models = (trio.vlm, trio.expert, trio.base)
        vlm, expert, base = (jax.device_put(model, place) for model, place in zip(models, where, strict=True))
        prepared = prepare_task_vectors(plan, method, vlm, expert, base)
        results.append(weight_task_vectors(plan, method, vlm, prepared, *weights))
    same(*results)
