"""The task merge-search end to end, killed and taken up again, and what its config refuses."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoints import host_tensors, load_model, open_model, save_model
from jaxlab.config import build
from jaxlab.errors import UserError, UserNote
from jaxlab.merging import Journal, write_merge
from jaxlab.tasks import main, merge_search
from jaxlab.tasks.merge_search import Config
from tests.checkpoints import folders
from tests.evaluation.chat_models import write_chat_model
from tests.merging.search.trio import LM, VISION, draw

ROOT = Path(__file__).parents[3]
TEXT = "  {name}: {{kind: text, path: {path}, pattern: '*.txt', sequence_length: 8, holdout_every: 2}}\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the three models and texts, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("vlm", "expert", "base")):
        config = dataclasses.replace(LM, vision=VISION) if role == "vlm" else LM
        save_model(tmp_path / role, config, draw(config, seed))
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text("".join(rng.choice(list("ab \n"), 200)))
    return tmp_path


def write_config(place, operators, more=""):
    text = "".join(f"{role}: {place / role}\n" for role in ("vlm", "expert", "base"))
    text += f"operators:\n{operators}evaluate:\n"
    text += "".join(TEXT.format(name=name, path=place / "texts") for name in ("text", "again"))
    path = place / "search.yaml"
    path.write_text(text + "batch_size: 2\nbatches: 3\nchunk: 3\nchoose: [text]\nkeep: [again]\n" + more)
    return str(path)


def results_of(place):
    (run,) = (place / "outputs" / "merge-search").iterdir()
    return run, json.loads((run / "results.json").read_text())


def same(a, b):
    left, right = dict(host_tensors(a)), dict(host_tensors(b))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


OPERATORS = """\
  task_arithmetic: {lambda_e: [0.0, 0.5, 1.0, 1.5]}
  dare_ties: {lambda_e: [0.5, 1.0], density: [0.3, 0.6]}
"""
MORE = """\
  chance: {operator: ties, method: random, density: [0.4, 0.6], lambda_e: {low: 0, high: 1}}
  each: {operator: task_arithmetic, method: bayesian, layers: each, lambda_e: {low: 0, high: 2}}
  learned: {operator: task_arithmetic, method: gradient, layers: each, lambda_e: {low: 0, high: 2}}
"""


def search_and_merge(place, capsys, operators):
    """The models that a search leaves are those that run.py merge makes of the recipes beside them."""
    config = write_config(place, operators, "save: each\n")
    assert main(["merge-search", config, "--check"]) == 0
    assert "tensors_merged" in capsys.readouterr().out
    assert main(["merge-search", config]) == 0
    run, results = results_of(place)
    for name, entry in results["operators"].items():
        assert entry["evaluations"] == 4
        assert entry["best"]["score"] == max(point["score"] for point in entry["points"])
        assert set(entry["best"]["test"]) == {"text", "again"}
        assert entry["pareto"]
        again, recipe = place / f"again-{name}", str(run / "recipes" / f"{name}.yaml")
        assert main(["merge", recipe, "--out", str(again), "--to", "orbax", "--verify"]) == 0
        same(load_model(run / "models" / name)[1], load_model(again)[1])
    capsys.readouterr()
    return results


def test_search_and_merge_agree(place, capsys):
    results = search_and_merge(place, capsys, OPERATORS)
    assert {name: len(entry["points"]) for name, entry in results["operators"].items()} == {
        "task_arithmetic": 4,
        "dare_ties": 4,
    }
    assert set(results["unmerged"]) == {"vlm", "expert", "base"}
    assert {row["module"] for row in results["task_vectors"]} >= {"attention", "mlp"}


def test_a_model_that_overflows_is_not_written(place):
    operators = "  task_arithmetic: {lambda_e: [1.0]}\n"
    operators += "  far: {operator: task_arithmetic, lambda_e: [3.0e+38]}\n"
    config = write_config(place, operators, "save: each\n")
    with pytest.warns(UserNote, match=r"models/far: not written: [\d,]+ values .* NaN or infinite"):
        assert main(["merge-search", config]) == 0
    run, _ = results_of(place)
    assert [path.name for path in (run / "models").iterdir()] == ["task_arithmetic"]


@pytest.mark.slow
def test_points_that_are_drawn_or_learned(place, capsys):
    found = search_and_merge(place, capsys, OPERATORS + MORE)["operators"]
    assert {name: len(found[name]["points"]) for name in ("chance", "each", "learned")} == {
        "chance": 4,
        "each": 4,
        "learned": 1,
    }
    for name in ("each", "learned"):
        assert len(set(found[name]["best"]["layers_e"])) == LM.num_layers


@pytest.mark.slow
def test_questions_of_folders_of_hugging_face(tmp_path, monkeypatch, capsys):
    """A language model in the VLM's place, asked questions; its folder is that of run.py merge, byte for
    byte."""
    monkeypatch.chdir(tmp_path)
    opened = open_model(write_chat_model(tmp_path / "first"))
    for seed, role in enumerate(("vlm", "expert", "base")):
        params = jax.tree.map(lambda x, s=seed: x * (1 + 0.1 * s), opened.read())
        save_model(tmp_path / role, opened.config, params, opened.tokenizer, form="huggingface")
        shutil.copy(tmp_path / "first" / "tokenizer_config.json", tmp_path / role)
    rows = [{"prompt": "ab", "choices": ["ab", "xy"], "answer": i % 2} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "".join(f"{role}: {tmp_path / role}\n" for role in ("vlm", "expert", "base"))
    text += "embeddings: merge\noperators:\n  dare_ties: {lambda_e: [0.5, 1.0], density: [0.6]}\n"
    text += "evaluate:\n  asked: {kind: questions, path: q.jsonl, measure: multiple_choice}\n"
    text += "choose_by: [labels, entropy, neighbours]\n"
    (tmp_path / "search.yaml").write_text(text)
    kept, add = [], Journal.add
    noted = lambda self, entry, kind, rows: kept.append(len(rows)) or add(self, entry, kind, rows)
    monkeypatch.setattr(Journal, "add", noted)
    assert main(["merge-search", "search.yaml", "--check"]) == 0
    assert main(["merge-search", "search.yaml"]) == 0
    assert set(kept) == {1}  # questions take long: each point is kept as it comes
    run, results = results_of(tmp_path)
    entry = results["operators"]["dare_ties"]
    assert entry["points"][0]["details"]["asked"]["accuracy"] == 0.0
    assert entry["points"][0]["entropy"]["asked"] > 0
    assert set(entry["chosen"]) == {"labels", "entropy", "neighbours"}
    assert results["unmerged"]["expert"]["test"] == {"asked": 1.0}
    assert set(results["examples"][0]["answers"]) == {"VLM alone", "injected"}
    assert main(["merge", str(run / "best.yaml"), "--out", "again", "--verify"]) == 0
    written, again = (
        (place / "model.safetensors").read_bytes() for place in (run / "model", tmp_path / "again")
    )
    assert written == again
    # What learns, and what follows flows, takes the questions' right answers.
    start, end = text.index("operators:"), text.index("evaluate:")
    entries = "operators:\n"
    for name, loss in (("learned", "labels"), ("surest", "entropy")):
        more = f"method: gradient, loss: {loss}, lambda_e: {{low: 0, high: 2}}"
        entries += f"  {name}: {{operator: task_arithmetic, {more}}}\n"
    entries += "  by_flows: {operator: task_arithmetic, layers: flows, lambda_e: [0.5, 1.0]}\n"
    text = text[:start] + entries + text[end:].replace("[labels, entropy, neighbours]", "[labels]")
    (tmp_path / "learn.yaml").write_text(f"{text}evaluations: 8\nequal_points: false\n")
    assert main(["merge-search", "learn.yaml"]) == 0
    (run,) = (tmp_path / "outputs" / "merge-search").glob("learn-*")
    results = json.loads((run / "results.json").read_text())
    for name in ("learned", "surest"):
        points = results["operators"][name]["points"]
        assert points[-1]["steps"] > 0
        assert points[-1]["lambda_e"] != 1.0  # where it began
    assert len(results["flow_profile"]) == opened.config.num_layers
    capsys.readouterr()


def search_on_folders(tmp_path, monkeypatch, case, save):
    """A search with a VLM of Hugging Face, and language models of its shapes."""
    monkeypatch.chdir(tmp_path)
    folders.make(tmp_path / "vlm", case)
    rng = np.random.default_rng(0)
    for role, scale in (("expert", 0.1), ("base", 0.2)):
        noise = {n: scale * rng.standard_normal(x.shape) for n, x in folders.weights(case).items()}
        tensors = {name: (x + noise[name]).astype(np.float32) for name, x in folders.weights(case).items()}
        folders.write(tmp_path / role, folders.config(case), tensors)
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text("ab \n" * 50)
    operators = "  dare: {operator: dare_linear, lambda_e: [0.4, 0.8], density: [0.5]}\n"
    operators += "  slerp: {lambda_e: [0.4, 0.8]}\n" if case != "llava" else ""
    return write_config(tmp_path, operators, f"embeddings: merge\nsave: {save}\n")


@pytest.mark.parametrize(
    ("case", "save"),
    [
        ("llava", "each"),
        pytest.param("llava", "best", marks=pytest.mark.slow),
        *(
            pytest.param(c, "each", marks=pytest.mark.slow)
            for c in ("qwen2_vl", "idefics3", "gemma3", "mllama")
        ),
    ],
)
def test_a_vlm_of_hugging_face_is_searched_and_written(tmp_path, monkeypatch, case, save, capsys):
    """What cannot be written loses nothing: the same command goes on, to what run.py merge makes."""
    config = search_on_folders(tmp_path, monkeypatch, case, save)

    def full(*args, **options):
        raise UserError("no room")

    def damaged(prepared, out, **options):
        write_merge(prepared, out, **options)
        file = out / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)

    with monkeypatch.context() as patch:
        patch.setattr(merge_search, "write_merge", full)
        assert main(["merge-search", config]) == 2
        if save == "best":  # one is enough
            patch.setattr(merge_search, "write_merge", damaged)
            with pytest.raises(RuntimeError, match="1 parameters are not those that were measured"):
                main(["merge-search", config])
    (run,) = (tmp_path / "outputs" / "merge-search").iterdir()
    before = json.loads((run / merge_search.UNSAVED).read_text())
    points = (run / "points.jsonl").read_bytes()
    assert main(["merge-search", config]) == 0
    assert (run / "points.jsonl").read_bytes() == points
    assert results_of(tmp_path) == (run, before)
    assert not (run / merge_search.UNSAVED).exists()
    made = {"best": run / "model"} if save == "best" else {p.name: p for p in (run / "models").iterdir()}
    assert len(made) == (1 if case == "llava" else 2)
    for name, model in made.items():
        recipe = run / ("best.yaml" if save == "best" else f"recipes/{name}.yaml")
        assert main(["merge", str(recipe), "--out", f"again-{name}", "--verify"]) == 0
        files = [(place / "model.safetensors").read_bytes() for place in (model, tmp_path / f"again-{name}")]
        assert files[0] == files[1]
    capsys.readouterr()


def test_a_model_that_was_not_measured_is_told(tmp_path):
    params = draw(LM, 0)
    save_model(tmp_path / "model", LM, params)
    merge_search.check_written(tmp_path / "model", params)
    up = params["layers"]["mlp"]["up"]
    spoiled = {
        "one bit": up.at[1, 2, 3].set(jnp.nextafter(up[1, 2, 3], jnp.inf)),
        "a zero's sign": up.at[0].multiply(-1.0),
        "dtype": up.astype(jnp.bfloat16),
        "shape": up[:, :-1],
    }
    for value in spoiled.values():
        other = {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"], "up": value}}}
        with pytest.raises(RuntimeError, match=r"1 parameters are not .*\['layers'\]\['mlp'\]\['up'\]"):
            merge_search.check_written(tmp_path / "model", other)
    with pytest.raises(RuntimeError, match="final_norm"):
        merge_search.check_written(tmp_path / "model", {k: v for k, v in params.items() if k != "final_norm"})


KILLER = """
import os, signal, sys
from jaxlab.merging.search.journal import Journal
from jaxlab.tasks import main, merge_search
add, left = Journal.add, [int(sys.argv[2])]
def killed(self, entry, kind, rows):
    found = add(self, entry, kind, rows)
    left[0] -= 1
    if left[0] == 0:
        with open(self.path, "a") as file:
            file.write('{"entry": "torn')
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Journal.add = killed
main(["merge-search", sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("writes", [1, 4, 6, 8, 12])  # the first three are of the models alone
def test_a_killed_search_goes_on_by_point(place, writes, capsys, monkeypatch):
    config = write_config(place, OPERATORS + MORE, "save: none\n")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLER, config, str(writes)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (run,) = (place / "outputs" / "merge-search").iterdir()
    *before, torn = (run / "points.jsonl").read_text().splitlines()
    assert torn == '{"entry": "torn'
    assert main(["merge-search", config]) == 0
    after = (run / "points.jsonl").read_text().splitlines()
    assert after[: len(before)] == before  # nothing is measured twice
    assert len(
        {(r["entry"], r["kind"], r.get("index", r.get("role"))) for r in map(json.loads, after)}
    ) == len(after)
    results = json.loads((run / "results.json").read_text())
    assert main(["merge-search", config, "--overwrite"]) == 0
    assert (run / "points.jsonl").read_text().splitlines() == after
    assert json.loads((run / "results.json").read_text()) == results
    capsys.readouterr()


def test_a_journal_of_another_search_is_refused(place, capsys):
    config = write_config(place, "  task_arithmetic: {lambda_e: [0.0, 0.5]}\n", "save: none\n")
    assert main(["merge-search", config]) == 0
    run, _ = results_of(place)
    (run / "results.json").unlink()
    lines = (run / "points.jsonl").read_text().replace('"lambda_e": 0.5', '"lambda_e": 0.25')
    (run / "points.jsonl").write_text(lines)
    capsys.readouterr()
    assert main(["merge-search", config]) == 2
    assert "holds other points than this search asks for" in capsys.readouterr().err


def test_a_model_with_nan_is_not_searched(place, capsys):
    config, params, _ = load_model(place / "expert")
    up = params["layers"]["mlp"]["up"]
    params = {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"]}}}
    params["layers"]["mlp"]["up"] = up.at[0, 0, 0].set(jnp.nan)
    save_model(place / "expert", config, params, overwrite=True)
    assert main(["merge-search", write_config(place, "  task_arithmetic: {}\n")]) == 2
    error = capsys.readouterr().err
    assert "expert: layers.mlp.up holds NaN or infinities" in error
    assert error.count("\n") == 1


MODELS = {"vlm": "v", "expert": "e", "base": "b", "evaluate": {"text": {"kind": "text"}}}
FREE = {"low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    ("operators", "more", "message"),
    [
        ({"ties": {"density": [0.2, 0.4]}, "task_arithmetic": {}}, {}, r"\(ties 12, task_arithmetic 6\)"),
        ({"ties": {}}, {}, r"operators\.ties\.density: ties needs it"),
        ({"tie": {}}, {}, r"operators\.tie\.operator: no operator 'tie'"),
        ({"ties": {"density": [1.5]}}, {}, r"operators\.ties\.density: must be between 0 and 1"),
        (
            {"task_arithmetic": {"gamma": [0.1]}},
            {},
            r"task_arithmetic\.gamma: task_arithmetic has none",
        ),
        ({"task_arithmetic": {"lamda_v": [0.1]}}, {}, r"has none; did you mean lambda_v"),
        ({"task_arithmetic": {"density": [0.5]}}, {}, r"density: task_arithmetic has none$"),
        ({"fisher": {}}, {}, r"fisher\.operator: fisher takes statistics of data, which a search"),
        ({"dare_linear": {"density": [0.5], "rescale": [0.5]}}, {}, r"rescale: is a list of true and false"),
        ({"task_arithmetic": {"lambda_e": FREE}}, {}, r"lambda_e: method grid takes a list"),
        ({"task_arithmetic": {"lambda_e": FREE}}, {"method": "random"}, r"evaluations: missing"),
        (
            {"task_arithmetic": {"lambda_e": FREE}},
            {"method": "cma_es", "evaluations": 4},
            r"cma_es needs at least two intervals",
        ),
        ({"task_arithmetic": {"method": "gradient"}}, {"evaluations": 4}, r"takes intervals"),
        ({"task_arithmetic": {"layers": "each"}}, {}, r"layers: a grid has too many points"),
        ({"task_arithmetic": {"lambda_e": []}}, {}, r"lambda_e: an empty list"),
        ({"task_arithmetic": {"lambda_e": {"low": 1, "high": 1}}}, {}, r"low must be below high"),
        ({"emr": {}}, {}, r"makes a model for each task"),
        ({"task_arithmetic": {}}, {"choose": ["x"]}, r"choose: no data set 'x'"),
        ({"task_arithmetic": {}}, {"keep_at_least": 0.5}, r"keep: which skill"),
        (
            {"task_arithmetic": {"lambda_e": FREE}},
            {"method": "random", "evaluations": 4, "choose_by": ["neighbours"]},
            r"neighbours need a grid",
        ),
    ],
)
def test_configs_are_refused_in_one_line(operators, more, message):
    with pytest.raises(UserError, match=message):
        build(Config, {**MODELS, "operators": operators, **more})


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="needs the three models"):
        build(Config, {"vlm": "v"})
    unequal = {"ties": {"density": [0.2, 0.4]}, "task_arithmetic": {}}
    assert build(Config, {**MODELS, "operators": unequal, "equal_points": False})
