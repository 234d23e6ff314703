"""A merge that is killed, refused or runs out of room: taken up again, or nothing is left of it."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.checkpoints import open_model, resume
from jaxlab.checkpoints.output_folder import MARKER, write_aside
from jaxlab.checkpoints.resume import JOURNAL, STATE
from jaxlab.errors import UserError
from jaxlab.merging import engine, load_recipe, prepare_merge, write_merge
from jaxlab.tasks import main
from tests.merging.test_engine import files_of, llama

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys

left = int(sys.argv[1])

def counted(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

for name in ("pwrite", "fsync", "rename", "unlink"):
    setattr(os, name, counted(getattr(os, name)))

from jaxlab.tasks import main

sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def desk(tmp_path):
    """Three models and a recipe."""
    lines = ["kind: inject", "operator: dare_linear", "density: 0.5", "lambda_e: 0.5", "embeddings: merge"]
    for seed, (role, name) in enumerate({"base": "base", "vlm": "one", "expert": "two"}.items()):
        llama(tmp_path / name, seed, shard_bytes=1500 if role == "vlm" else 1 << 40)
        lines.append(f"{role}: {tmp_path / name}")
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path


def merged(desk, out, **options):
    recipe = load_recipe(desk / "recipe.yaml")
    prepared = prepare_merge(recipe, [open_model(r) for r in recipe.references()])
    return write_merge(prepared, desk / out, **options)


def killed(desk, after, out="out", more=()):
    """Runs the merge until the so manyth call that changes a file, and kills it there."""
    words = [str(after), "merge", str(desk / "recipe.yaml"), "--out", str(desk / out), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", KILLED, *words], env=environment, cwd=desk, capture_output=True, check=False
    )
    assert found.returncode in (0, -signal.SIGKILL), found.stderr.decode()
    return found.returncode == -signal.SIGKILL


def count_tensors(monkeypatch):
    done = []
    real = engine._do

    def counted(jobs, budget):
        done.extend(job.tensor.name for job in jobs)
        return real(jobs, budget)

    monkeypatch.setattr(engine, "_do", counted)
    return done


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_merge_is_taken_up(desk, monkeypatch, kills):
    merged(desk, "want")
    want, tensors = files_of(desk / "want"), len(open_model(desk / "one").stored)
    rng = random.Random(kills)
    for attempt in range(kills):
        out = f"out{attempt}"
        after = rng.randrange(2 * tensors // 3, tensors) if attempt < 2 else rng.randrange(1, tensors + 12)
        assert killed(desk, after, out), "it was done before"
        if not (desk / out).exists():
            partial = desk / f".{out}.partial"
            finished = (partial / JOURNAL).read_text().count("\n") if (partial / JOURNAL).exists() else 0
            with monkeypatch.context() as patch:
                done = count_tensors(patch)
                merged(desk, out)
            assert len(done) == tensors - finished
            assert attempt >= 2 or 0 < finished < tensors
        assert files_of(desk / out) == want
    left = {path.name for path in desk.iterdir() if path.name.startswith(".")}
    assert left == set()


def spoil(partial, name):
    """Another last byte of a tensor of an unfinished folder."""
    for file in partial.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        if name in header:
            raw[start + header[name]["data_offsets"][1] - 1] ^= 0xFF
            file.write_bytes(raw)
            return
    raise AssertionError(name)


def test_what_is_taken_up_is_read_again(desk, monkeypatch):
    """A tensor whose bytes are not what the journal says, as after a power failure, is done again."""
    merged(desk, "want")
    assert killed(desk, 18)
    partial = desk / ".out.partial"
    records = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    assert len(records) > 3
    spoil(partial, records[1]["name"])
    with open(partial / JOURNAL, "a") as journal:
        journal.write('{"name": "torn')
    done = count_tensors(monkeypatch)
    merged(desk, "out")
    assert len(done) == len(open_model(desk / "one").stored) - len(records) + 1
    assert records[1]["name"] in done
    assert files_of(desk / "out") == files_of(desk / "want")


def test_another_plan_removes_what_was_left(desk):
    assert killed(desk, 14)
    (desk / "recipe.yaml").write_text(
        (desk / "recipe.yaml").read_text().replace("lambda_e: 0.5", "lambda_e: 0.6")
    )
    merged(desk, "out")
    merged(desk, "want")
    assert files_of(desk / "out") == files_of(desk / "want")
    assert not (desk / ".out.partial").exists()
    # What is not ours stays, and is in the way.
    for name, prepare in {
        "a folder": lambda path: (path.mkdir(), (path / "photo.jpg").write_text("mine")),
        "a link": lambda path: path.symlink_to(desk / "one"),
    }.items():
        prepare(desk / ".next.partial")
        with pytest.raises(UserError, match="in the way, and not left by this tool"):
            merged(desk, "next")
        assert os.path.lexists(desk / ".next.partial"), name
        if name == "a folder":
            (desk / ".next.partial" / "photo.jpg").unlink()
            (desk / ".next.partial").rmdir()
    assert (desk / "one" / "config.json").exists()


def test_two_at_once(desk):
    import fcntl

    (desk / ".out.partial").mkdir()
    with open(desk / ".out.partial" / STATE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            merged(desk, "out")
    merged(desk, "out")


def test_an_interrupt_keeps_what_is_done(desk):
    def interrupt(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(desk, "out", progress=interrupt, threads=1)
    assert (desk / ".out.partial" / JOURNAL).read_text().count("\n") == 1

    # A failure that is not an interrupt leaves nothing.
    def fail(count):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        merged(desk, "out", progress=fail, threads=1)
    assert not (desk / ".out.partial").exists()


def test_no_room_is_said_before_anything_is_read(desk, capsys, monkeypatch):
    words = ["merge", str(desk / "recipe.yaml"), "--out", str(desk / "out")]
    monkeypatch.setattr(engine, "_do", lambda *_: pytest.fail("a tensor was read"))
    before = sorted(desk.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "limit on the size of files" in capsys.readouterr().err
    free = type("Usage", (), {"free": 10, "total": 10, "used": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    assert main(words) == 2
    assert "the disk has 10 bytes left" in capsys.readouterr().err
    monkeypatch.undo()
    for out, message in {
        str(desk / ("x" * 255)): "a name of 255 bytes",
        str(desk / "recipe.yaml" / "out"): "cannot be written: Not a directory",
        str(desk / "one"): "is an input",
    }.items():
        assert main([*words[:2], "--out", out]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(desk.iterdir()) == before


def test_orphans_of_other_writers_are_removed(tmp_path):
    """A folder that a killed writer left beside its place goes with the next one; others stay."""
    script = "import os, signal, sys\nfrom jaxlab.checkpoints.output_folder import write_aside\n"
    script += "with write_aside(sys.argv[1]) as folder:\n    (folder / 'a').write_text('x')\n"
    script += "    os.kill(os.getpid(), signal.SIGKILL)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment, check=False)
    (orphan,) = tmp_path.iterdir()
    assert orphan.name.startswith(".out-")
    (tmp_path / ".out-mine").mkdir()
    (tmp_path / ".out-mine" / MARKER).write_text("not ours")
    (tmp_path / ".out-notes").write_text("mine")
    with write_aside(tmp_path / "out") as folder:
        # One that is being written by somebody who lives is left alone.
        with write_aside(tmp_path / "out") as other:
            (other / "b").write_text("y")
            assert folder.exists()
            (folder / "a").write_text("x")
        assert (tmp_path / "out" / "b").exists()
        (tmp_path / "out" / "b").unlink()
        (tmp_path / "out" / MARKER).unlink()
        (tmp_path / "out").rmdir()
    assert (tmp_path / "out" / "a").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out-mine", ".out-notes", "out"]


def test_a_disk_that_fails_while_more_is_computed_ends_the_merge(desk, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(resume, "_SYNC", 1)
    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(UserError, match="out: cannot be written: Input/output error"):
        merged(desk, "out")
    assert not (desk / "out").exists()
    assert not (desk / ".out.partial").exists()
