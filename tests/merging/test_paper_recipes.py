"""configs/paper/injection: every recipe is checked against the public models' config.json, whose tensors are
stood in for by headers over empty files. No weights, no hub."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from jaxlab import config as configs
from jaxlab.checkpoints import entries, families
from jaxlab.merging import load_recipe
from jaxlab.models import abstract_params
from jaxlab.tasks import main
from jaxlab.tasks.merge_search import Config

ROOT = Path(__file__).parents[2]
CONFIGS = json.loads((ROOT / "tests" / "golden" / "injection_configs.json").read_text())
"""By hub id, the keys that say what the model is: from public copies and papers; rows of the experts' tables
are those of their bases where they were not at hand."""
FILES = sorted((ROOT / "configs" / "paper" / "injection").glob("*.yaml"))
SEARCHES = [path for path in FILES if path.stem.startswith("search_")]
RECIPES = [path for path in FILES if path not in SEARCHES]
QUICK = ("reason_dart_layers", "dim3_emma_breadcrumbs")
EMBEDDINGS = ("embed_tokens", "lm_head")


def stand_in(folder, config):
    """A model of Hugging Face whose tensors are a hole in a file: their header is all that is written."""
    described = families.read_config(config, str(folder))
    shapes = abstract_params(described)
    header, end = {}, 0
    for entry in entries(shapes, described.family):
        shape = entry.shape(shapes)
        for name in entry.names:
            size = 2
            for n in shape:
                size *= n
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in which hub ids are paths, on a disk with room."""
    monkeypatch.chdir(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 50, 0, 1 << 50))
    return tmp_path


def put(hub, references):
    for reference in references:
        if not (hub / reference).exists():
            stand_in(hub / reference, CONFIGS[reference])


def check(hub, path, capsys):
    put(hub, load_recipe(path).references())
    status = main(["merge", str(path), "--out", "out", "--check"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert list(hub.rglob("out*")) == []
    return captured.out


def test_there_are_recipes_and_every_model_of_them_is_described():
    named = {reference for path in RECIPES for reference in load_recipe(path).references()}
    assert len(RECIPES) > 12
    assert named == set(CONFIGS)


@pytest.mark.parametrize(
    "path",
    [p if p.stem in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_fits_its_models(hub, path, capsys):
    recipe = load_recipe(path)
    lines = check(hub, path, capsys).splitlines()
    actions = {
        line.split()[2]: line.split()[0] for line in lines[1:] if line.startswith(("merged", "copied"))
    }
    tables = [action for name, action in actions.items() if any(word in name for word in EMBEDDINGS)]
    seeing = ("vision", "visual", "connector")
    language = [n for n in actions if "layers.{i}.mlp." in n and not any(word in n for word in seeing)]
    assert len(tables) == 2
    assert len(language) == 3
    assert {actions[name] for name in language} == {"merged"}
    if recipe.kind == "merge":
        assert set(actions.values()) == {"merged"}
        return
    assert set(tables) == {"copied" if recipe.embeddings == "vlm" else "merged"}
    vision = [action for name, action in actions.items() if any(word in name for word in seeing)]
    assert vision
    assert set(vision) == {"copied"}


@pytest.mark.parametrize(
    "path",
    [p if p == SEARCHES[0] else pytest.param(p, marks=pytest.mark.slow) for p in SEARCHES],
    ids=lambda path: path.stem,
)
def test_a_search_fits_its_models(hub, path, capsys):
    config = configs.load(Config, path)
    put(hub, (config.vlm, config.expert, config.base))
    (hub / "data").mkdir()
    for data in config.evaluate.values():
        question = {"prompt": "What?", "answer": "that", "choices": ["that", "this"]}
        if data.measure == "rules":
            question = {"prompt": "What?", "rules": [{"kind": "lower"}]}
        if data.measure == "multiple_choice":
            question["answer"] = 0
        (hub / data.path).write_text(2 * f"{json.dumps(question)}\n")
    status = main(["merge-search", str(path), "--check"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    points = {config.evaluations_of(label) for label in config.entries}
    assert len(points) == 1
    assert captured.out.count(f": {points.pop()}\n") == len(config.entries)
