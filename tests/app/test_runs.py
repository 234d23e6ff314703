"""Run folders from within a program: identity, reuse, locks, files."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.app import provenance, runs
from jaxlab.errors import UserError, UserNote
from jaxlab.files import jsonable, write_atomic
from jaxlab.tasks import execute
from tests.app import fake_task


def test_execute_takes_files_and_objects() -> None:
    by_file = execute("fake", "small.yaml", ["--rate", "2"])
    assert by_file.results == {"loss": 8.0, "started_at": 0, "depth": 2}
    assert by_file.path.name.startswith("small-")
    assert len(by_file.path.name) == len("small-") + 8
    again = execute("fake", "small.yaml", {"rate": 2.0})
    assert again.reused
    assert (again.path, again.results) == (by_file.path, by_file.results)
    by_object = execute("fake", fake_task.Config(steps=3), {"rate": 2}, name="small")
    assert by_object.path == by_file.path
    assert len(fake_task.calls) == 1
    assert runs.read_results(by_file.path) == by_file.results
    assert runs.read_metrics(by_file.path)[-1] == {"step": 2, "loss": 4.0}


def test_what_decides_the_results_decides_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.write_text("first")
    names = {
        execute("fake", "small.yaml").path.name,
        execute("fake", "small.yaml", {"steps": 4}).path.name,
    }
    names.add(execute("fake", "small.yaml", {"note": str(note)}).path.name)
    note.write_text("second")  # the same config, another input
    names.add(execute("fake", "small.yaml", {"note": str(note)}).path.name)
    for code in (("2.0", "c0ffee", ""), ("1.0", "decade", ""), ("1.0", "c0ffee", "facade")):
        monkeypatch.setattr(provenance, "code", lambda code=code: provenance.Code(*code))
        names.add(execute("fake", "small.yaml").path.name)
    assert len(names) == 7


@pytest.mark.usefixtures("changed_code")
def test_changed_code_reuses_nothing_finished() -> None:
    first = execute("fake", "small.yaml")
    second = execute("fake", "small.yaml")
    assert first.path == second.path
    assert not second.reused
    assert len(fake_task.calls) == 2
    assert json.loads((first.path / "env.json").read_text())["dirty"] is True


@pytest.mark.usefixtures("changed_code")
def test_changed_code_takes_its_own_killed_run_up() -> None:
    with pytest.raises(KeyboardInterrupt):
        execute("fake", "small.yaml", {"stop": "killed"})
    (counter,) = Path("outputs/fake").glob("*/counter")
    counter.write_text("2")
    assert execute("fake", "small.yaml", {"stop": "killed"}).results["started_at"] == 2


def test_overwrite_begins_from_nothing() -> None:
    with pytest.raises(KeyboardInterrupt):
        execute("fake", "small.yaml", {"stop": "killed"})
    with pytest.raises(KeyboardInterrupt):
        execute("fake", "small.yaml", {"stop": "killed"}, overwrite=True)
    (folder,) = Path("outputs/fake").iterdir()
    assert [record["step"] for record in runs.read_metrics(folder)] == [0, 1]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.usefixtures("changed_code")
def test_what_a_run_did_not_write_stays(overwrite: bool) -> None:
    """Changed code does a run anew without being asked for it, too."""
    folder = execute("fake", "small.yaml").path
    (folder / "plots" / "mine").mkdir(parents=True)
    for name in ("notes.txt", "plots/mine/a.svg"):
        (folder / name).write_text(name)
    (folder / "link").symlink_to(folder / "notes.txt")
    before = {path.name for path in folder.iterdir()}
    for _ in range(2):
        with pytest.warns(
            UserNote, match=r"kept what this run did not write: link, notes\.txt, plots/mine/a"
        ):
            assert not execute("fake", "small.yaml", overwrite=overwrite).reused
        assert {path.name for path in folder.iterdir()} == before
        assert (folder / "notes.txt").read_text() == "notes.txt"
    listed = json.loads((folder / ".files.json").read_text())
    assert listed["foreign"] == ["link", "notes.txt", "plots/mine/a.svg"]
    assert {"results.json", "config.yaml", "env.json"} <= set(listed["written"])
    (folder / ".files.json").write_text("{")
    with pytest.raises(UserError, match=r"\.files\.json: damaged; remove the folder"):
        execute("fake", "small.yaml", overwrite=overwrite)
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("taken_up", [False, True])
def test_what_is_put_into_an_interrupted_run_stays(taken_up: bool) -> None:
    interrupt = lambda **options: execute("fake", "small.yaml", {"stop": "killed"}, **options)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    (folder,) = Path("outputs/fake").iterdir()
    written = {path.name for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    if taken_up:
        (folder / "counter").write_text("1")
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    kept = pytest.warns(UserNote, match=r"kept what this run did not write: notes\.txt")
    with kept, pytest.raises(KeyboardInterrupt):
        interrupt(overwrite=True)
    assert [record["step"] for record in runs.read_metrics(folder)] == [0, 1]
    assert {path.name for path in folder.iterdir()} == {*written, "notes.txt"}
    listed = json.loads((folder / ".files.json").read_text())
    assert listed["foreign"] == ["notes.txt"]


@pytest.mark.multiprocess
def test_two_processes_do_not_write_one_folder() -> None:
    folder = execute("fake", "small.yaml").path
    (folder / "results.json").unlink()
    code = f"import fcntl, time; f = open({str(folder / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    code += "print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work on this run"):
            execute("fake", "small.yaml")
    finally:
        holder.kill()
        holder.wait()
    assert not execute("fake", "small.yaml").reused  # the lock went with the process


def test_steps_count_on_or_are_given(tmp_path: Path) -> None:
    run = runs.Run(tmp_path, "x")
    run.log(loss=jnp.float32(0.5), finite=np.bool_(True))
    run.log(step=5, loss=float("nan"))
    run.log(values=np.arange(2))
    assert runs.read_metrics(tmp_path) == [
        {"step": 0, "loss": 0.5, "finite": True},
        {"step": 5, "loss": None},
        {"step": 6, "values": [0, 1]},
    ]
    continued = runs.Run(tmp_path, "x")
    continued.rewind(6)
    continued.log(loss=1)
    assert [record["step"] for record in runs.read_metrics(tmp_path)] == [0, 5, 6]


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results\.json; is this the folder of a finished run\?"):
        runs.read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: not the JSON that a run writes"):
        runs.read_results(tmp_path)
    with pytest.raises(UserError, match="fake-command takes no config"):
        execute("fake-command", "small.yaml")


def test_files_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "empty" / "a"
    path.parent.mkdir()
    write_atomic(path, "one")
    with pytest.raises(TypeError):
        write_atomic(path, [1])  # type: ignore[arg-type]
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(TypeError, match="set has no form in JSON"):
        jsonable({"a": {1}})


def git(root: Path, *words: str) -> None:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, *words], cwd=root, check=True, capture_output=True)


def test_the_state_of_the_code(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "jaxlab").mkdir(parents=True)
    (root / "run.py").write_text("run")
    (root / "jaxlab" / "a.py").write_text("a")
    installed = provenance.code_in(root)
    assert (installed.commit, installed.dirty) == ("", False)
    git(root, "init", "-q")
    unborn = provenance.code_in(root)
    assert (unborn.commit, unborn.dirty) == ("", True)
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    clean = provenance.code_in(root)
    assert len(clean.commit) == 40
    assert not clean.dirty
    (root / "README.md").write_text("pages and configs change no result")
    assert provenance.code_in(root) == clean
    (root / "jaxlab" / "a.py").write_text("b")
    changed = provenance.code_in(root)
    assert changed.dirty
    assert changed.commit == clean.commit
    assert provenance.code_in(root) == changed
    (root / "jaxlab" / "new.py").write_text("untracked")
    assert provenance.code_in(root).changes != changed.changes
    (root / "jaxlab" / "new.py").unlink()
    (root / "jaxlab" / "a.py").write_text("a")
    assert provenance.code_in(root) == clean
