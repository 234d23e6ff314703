"""Several recipes in one pass: each with the bits of its own merge, their inputs read once."""

import json

import numpy as np
import pytest

from jaxlab.checkpoints import open_model
from jaxlab.checkpoints.resume import JOURNAL
from jaxlab.checkpoints.tensor_folder import Planned, open_folder, write_folder
from jaxlab.merging import (
    MergePlan,
    Merging,
    PlannedTensor,
    TensorSource,
    engine,
    prepare_merge,
    write_merge,
)
from jaxlab.merging.layout import layout
from jaxlab.merging.streams import Files
from jaxlab.merging.sweep import load_recipes
from jaxlab.tasks import main
from tests.merging.test_engine import files_of, llama
from tests.merging.test_killed_merge import killed


@pytest.fixture
def desk(tmp_path):
    lines = ["kind: inject", "operator: ties", "density: 0.5", "lambda_e: 0.5", "embeddings: merge"]
    for seed, (role, name) in enumerate({"base": "base", "vlm": "one", "expert": "two"}.items()):
        llama(tmp_path / name, seed, shard_bytes=1500 if role == "vlm" else 1 << 40)
        lines.append(f"{role}: {tmp_path / name}")
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_sweep_has_the_bits_of_its_merges(desk, monkeypatch, capsys):
    """Chunks, whole tensors and rows that are copied, of points that have their files in common."""
    text = (desk / "recipe.yaml").read_text().replace("operator: ties\ndensity: 0.5\n", "operator: slerp\n")
    (desk / "slerp.yaml").write_text(text)
    words = ["merge", str(desk / "recipe.yaml"), str(desk / "slerp.yaml"), "--out", str(desk / "all")]
    read = []
    real = Files.read
    monkeypatch.setattr(Files, "read", lambda *a: (read.append(len(a[2])), real(*a))[1])
    assert main([*words, "--verify"]) == 0
    together, read[:] = sum(read), []
    out = capsys.readouterr().out
    assert out.count("verified: all") == 2
    for path in words[1:3]:
        assert main(["merge", path, "--out", str(desk / "single"), "--overwrite"]) == 0
        name = path.rpartition("/")[2].removesuffix(".yaml")
        assert files_of(desk / "all" / name) == files_of(desk / "single")
        assert (desk / "all" / name / "config.json").exists()
    # What the two share is read once where both are streams or both whole: here the cuts and the rest.
    assert together <= sum(read)
    # Done before: nothing is read again, and what is there is verified.
    read.clear()
    assert main([*words, "--verify"]) == 0
    assert not read
    assert capsys.readouterr().out.count("done before") == 2
    # Damaged since: told in one line.
    path = max((desk / "all" / "slerp").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert main([*words, "--verify"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "slerp: 1 tensors differ from the account" in line
    assert "--overwrite makes it anew" in line
    # Not of the same plan: refused, in one line, and nothing is begun.
    (desk / "slerp.yaml").write_text(text.replace("lambda_e: 0.5", "lambda_e: 0.1"))
    assert main(words) == 2
    assert not [path for path in (desk / "all").iterdir() if path.name.startswith(".")]


def test_points_of_a_sweep_read_once(desk, monkeypatch):
    words = ["merge", str(desk / "recipe.yaml"), "--out", str(desk / "all"), "--hash-inputs", "none"]
    read, cuts = [], []
    real, real_cuts = Files.read, engine.cuts_of
    monkeypatch.setattr(Files, "read", lambda *a: (read.append(len(a[2])), real(*a))[1])
    monkeypatch.setattr(engine, "cuts_of", lambda step: (cuts.append(step.name), real_cuts(step))[1])
    assert main([*words, "--sweep", "lambda_e=[0.2, 0.7, 1.0]"]) == 0
    size = sum(t.nbytes for name in ("base", "one", "two") for t in open_folder(desk / name).values())
    assert sum(read) == 2 * size  # once for the cuts, of one density, and once to merge
    assert len(cuts) == len(set(cuts))
    for value in ("0.2", "0.7", "1.0"):
        text = (desk / "recipe.yaml").read_text().replace("lambda_e: 0.5", f"lambda_e: {value}")
        (desk / "one.yaml").write_text(text)
        assert main(["merge", str(desk / "one.yaml"), "--out", str(desk / "single"), "--overwrite"]) == 0
        assert files_of(desk / "all" / f"lambda_e={value}") == files_of(desk / "single")


def test_a_killed_sweep_is_taken_up(desk, monkeypatch):
    tensors = len(open_model(desk / "one").stored)
    words = ["--sweep", "lambda_e=[0.2,0.7]"]
    assert killed(desk, tensors, "all", words)
    partials = [desk / "all" / f".lambda_e={value}.partial" for value in ("0.2", "0.7")]
    finished = [set(_names(path / JOURNAL)) for path in partials]
    assert all(0 < len(names) < tensors for names in finished)
    done, real = [], engine._do
    monkeypatch.setattr(
        engine, "_do", lambda jobs, budget: (done.extend(job.tensor.name for job in jobs), real(jobs, budget))
    )
    assert main(["merge", str(desk / "recipe.yaml"), "--out", str(desk / "all"), *words]) == 0
    assert len(done) == 2 * tensors - sum(map(len, finished))
    for value in ("0.2", "0.7"):
        recipe = load_recipes([desk / "recipe.yaml"], [f"lambda_e=[{value}]"])[f"lambda_e={value}"]
        write_merge(prepare_merge(recipe, [open_model(r) for r in recipe.references()]), desk / f"s{value}")
        assert files_of(desk / "all" / f"lambda_e={value}") == files_of(desk / f"s{value}")
    # Between two folders that were put in place: the one is kept, the other made.
    import shutil

    shutil.rmtree(desk / "all" / "lambda_e=0.7")
    done.clear()
    assert main(["merge", str(desk / "recipe.yaml"), "--out", str(desk / "all"), *words]) == 0
    assert len(done) == tensors


def _names(journal):
    return [json.loads(line)["name"] for line in journal.read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.yaml", "sub/a.yaml"], "two recipes are called a"),
        (["a.yaml", "b.yaml", "--sweep", "lambda_e=[1]"], "--sweep takes one recipe, not 2"),
        (["a.yaml", "--sweep", "lambda_e=1"], "expected key=[a,b]"),
        (["a.yaml", "--sweep", "lambda_e=[1]", "--sweep", "lambda_e=[2]"], "lambda_e is given twice"),
        (["a.yaml", "--sweep", "lambda=[1]"], "has it fixed"),
        (["a.yaml", "--sweep", "models.3.weight=[1]"], "the recipe has no models.3.weight"),
        (["a.yaml", "--sweep", "lambda_e=[0.1, x]"], "must be a number"),
        ([], "RECIPES missing: name it"),
    ],
)
def test_mistakes_in_a_sweep(desk, monkeypatch, capsys, words, message):
    monkeypatch.chdir(desk)
    (desk / "sub").mkdir()
    for name in ("a.yaml", "b.yaml", "sub/a.yaml"):
        (desk / name).write_text((desk / "recipe.yaml").read_text())
    assert main(["merge", *words, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (desk / "out").exists()


def test_no_room_for_all(desk, capsys, monkeypatch):
    """Each has room alone, all of them have none."""
    size = sum(t.nbytes for t in open_folder(desk / "one").values())
    free = type("Usage", (), {"free": 2 * size, "total": 9 * size, "used": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    words = ["merge", str(desk / "recipe.yaml"), "--out", str(desk / "all"), "--check", "--sweep"]
    assert main([*words, "lambda_e=[1, 2]"]) == 0
    assert main([*words, "lambda_e=[1, 2, 3]"]) == 2
    assert "has" in capsys.readouterr().err
    assert not (desk / "all").exists()


def test_statistics_in_chunks(tmp_path):
    """Of an operator that works element by element, of the tensor's shape."""
    from jaxlab.checkpoints import resumable_folder
    from jaxlab.merging import execute, merge_tensors

    rng, shape = np.random.default_rng(0), (40, 30)
    tensors = {n: rng.standard_normal(shape).astype(np.float32) for n in ("base", "one", "two")}
    statistics = {"w": [rng.random(shape).astype(np.float32) for _ in range(2)]}
    for name, x in tensors.items():
        planned = [Planned("w", x.dtype, x.shape, lambda x=x: x)]
        write_folder(tmp_path / name, planned, config={"model_type": "none"})
    sources = TensorSource(1, "w"), TensorSource(2, "w")
    step = Merging("fisher", "paper", sources, TensorSource(0, "w"), weights=(0.9, 0.4))
    plan = MergePlan((PlannedTensor("w", "float32", shape, (), "", "", merging=step),))
    inputs = [open_folder(tmp_path / name).tensors for name in ("base", "one", "two")]
    with resumable_folder(tmp_path / "out", layout(plan, inputs), digest="x") as folder:
        execute(plan, inputs, folder, chunk=256, statistics=statistics)
        folder.complete(config={}, copy_from=None, texts={})
    want = merge_tensors(
        "fisher",
        [tensors["one"], tensors["two"]],
        base=tensors["base"],
        statistics=statistics["w"],
        weight=[0.9, 0.4],
    )
    np.testing.assert_array_equal(open_folder(tmp_path / "out")["w"].read(), np.asarray(want))
