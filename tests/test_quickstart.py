"""The main job: its stages fit their configs; what it writes; and, slowly, that everything runs."""

import json
import types
from pathlib import Path

import pytest

from jaxlab import config as configs
from jaxlab.app.runs import RunResult
from jaxlab.config.command_line import from_mapping
from jaxlab.reporting import read_runs, render
from jaxlab.reporting.markup import Markup
from jaxlab.tasks import TASKS, main, quickstart
from tests.reporting import made

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("stage", quickstart.STAGES, ids=lambda stage: stage.config)
def test_stages_are_configs_that_name_the_models_of_earlier_stages(stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    schema = TASKS.find(stage.task).schema()
    config = configs.load(schema, stage.path)
    names = [earlier.config for earlier in quickstart.STAGES]
    for key, name in stage.reads.items():
        assert getattr(config, key) == f"configs/quickstart/{name}.yaml"
        assert names.index(name) < names.index(stage.config)
    named = {key: getattr(config, key, None) for key in ("init_from", "vlm", "expert", "base", "model")}
    trained = {key for key, value in named.items() if isinstance(value, str) and value.endswith(".yaml")}
    assert trained == set(stage.reads)
    # What a smoke test changes is valid too.
    configs.load(schema, stage.path, from_mapping(schema, quickstart.SMOKE[stage.task]))


def test_only_other_folders_and_settings_need_overrides():
    stage = quickstart.Stage("train", "b", {"init_from": "a"})
    ran = {"a": RunResult(Path("elsewhere/train/a-12345678"), {})}
    given = lambda **options: quickstart.overrides(stage, ran, quickstart.Arguments(**options))
    assert given() == {}
    assert given(outputs="elsewhere") == {"init_from": "elsewhere/train/a-12345678"}
    assert given(smoke=True) == {"init_from": "elsewhere/train/a-12345678", **quickstart.SMOKE["train"]}


def fake_execute(task, path, overrides, *, outputs, overwrite):
    """Runs by hand, found done the second time."""
    name, root = Path(path).stem, Path(outputs)
    folder = root / task / f"{name}-12345678"
    reused = folder.exists() and not overwrite
    if not folder.exists():
        skill = name.rpartition("_")[2]
        if task == "attention-speed":
            made.attention_speed(root, folder.name)
        elif task == "train":
            kind = {"n": "text", "d": "digits", "i": "episodes"}[name[0]]
            attention = "nsa" if "sparse" in name else "full"
            made.train(root, folder.name, attention, kind=kind, init_from=overrides.get("init_from"))
        elif task == "evaluate":
            made.evaluate(root, folder.name, Path(overrides["model"]).name, nsa="sparse" in name)
        elif task == "merge-search":
            folder = made.search(root, folder.name, skill, 0.9 if skill == "french" else 0.2)
            names = {key: str(overrides[key]) for key in ("vlm", "expert", "base")}
            (folder / "config.yaml").write_text(json.dumps(names))
        else:
            made.icl(root, folder.name)
    return RunResult(folder, json.loads((folder / "results.json").read_text()), reused)


def test_the_page_and_the_numbers(tmp_path, monkeypatch, capsys):
    # How figures are written is tested in reporting/; here it would take most of the time, three times.
    monkeypatch.setattr("jaxlab.reporting.plots.svg", lambda _, name, label: Markup(f"<svg>{name}</svg>"))
    monkeypatch.setattr(quickstart, "execute", fake_execute)
    assert main(["quickstart", "--outputs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for stage in quickstart.STAGES:
        assert f"quickstart: {stage.task} {stage.config}, " in said
    folder = tmp_path / "quickstart"
    results = json.loads((folder / "results.json").read_text())
    assert [line["name"] for line in results["stages"]] == [stage.config for stage in quickstart.STAGES]
    assert not any(line["reused"] for line in results["stages"])
    assert results["claims"]["M2"] == results["claims"]["I1"] == results["claims"]["N3"] == "seen"
    assert results["claims"]["N5"] == "not examined"
    assert set(results["headline"]) == {"nsa", "injection", "icl"}
    assert results["seconds"] > 0
    assert 2**20 < results["peak_memory_bytes"] < 2**40
    page = (folder / "report.html").read_text()
    assert (
        "Loaded, not trained in these runs: assets/icl_model (made by configs/quickstart/icl_model.yaml, "
        in page
    )
    assert "peak memory" in page
    assert page.count("<section") == 4

    # Again: everything was done before, and the page says so. The folder alone gives the same page anew.
    assert main(["quickstart", "--outputs", str(tmp_path)]) == 0
    assert "already done" in capsys.readouterr().out
    assert f"{len(quickstart.STAGES)} stages were done before" in (folder / "report.html").read_text()
    out = tmp_path / "again.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    assert out.read_text() == (folder / "report.html").read_text()


def test_a_smoke_test_says_that_it_is_one(tmp_path):
    runs = [made.train(tmp_path, "nsa_sparse-12345678", "nsa")]
    runs.append(made.write_run(tmp_path, "quickstart", "quickstart", {"smoke": True}, {"stages": []}))
    assert "A smoke test" in render(read_runs(runs))
    (runs[-1] / "config.yaml").write_text("smoke: false")
    assert "A smoke test" not in render(read_runs(runs))


def test_memory_is_in_bytes(monkeypatch):
    usage = types.SimpleNamespace(ru_maxrss=3)
    monkeypatch.setattr(quickstart.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(quickstart.sys, "platform", "linux")
    assert quickstart.peak_memory() == 3072


@pytest.mark.slow
def test_everything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["quickstart", "--smoke", "--outputs", str(tmp_path)]) == 0
    page = (tmp_path / "quickstart" / "report.html").read_text()
    assert page.count("<section") == 4
    assert (
        "Loaded, not trained in these runs: jaxlab/assets/icl_model (made by configs/quickstart/icl_" in page
    )
