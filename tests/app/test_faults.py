"""Folders that cannot be written, files that are damaged, and files that are no files: one line each."""

import collections
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxlab.app import runs
from jaxlab.errors import UserError, UserNote
from jaxlab.files import remove_torn, write_atomic
from jaxlab.tasks import main
from tests.app import fake_task

RUN = ["fake", "small.yaml"]


def folder_of_a_run() -> Path:
    (folder,) = (path for path in Path("outputs/fake").iterdir())
    return folder


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said: one line."""
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def interrupted() -> Path:
    """The folder of a run that has begun."""
    assert main([*RUN, "--stop", "killed"]) == 130
    return folder_of_a_run()


@pytest.mark.parametrize("name", [".lock", "config.yaml", "env.json", "metrics.jsonl", "results.json"])
def test_a_folder_where_a_file_should_be(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted()
    (folder / name).unlink(missing_ok=True)
    (folder / name / "mine").mkdir(parents=True)
    capsys.readouterr()
    assert main([*RUN, "--stop", "killed"]) == 2
    assert name in error_line(capsys)
    assert (folder / name / "mine").is_dir()


def test_damaged_metrics_lose_their_damaged_lines_alone() -> None:
    folder = interrupted()
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"\xff\x00{\n" + whole + b'{"loss": 1}\n[1]\n')
    (folder / "counter").write_text("2")
    with pytest.warns(UserNote, match=r"metrics\.jsonl: damaged in line 1; 3 lines are lost"):
        assert main([*RUN, "--stop", "killed"]) == 0
    assert [record["step"] for record in runs.read_metrics(folder)] == [0, 1, 2]


@pytest.mark.parametrize("text", ["{", "[]", '{"started": 1}', "\x00"])
def test_a_damaged_env_is_written_anew(text: str) -> None:
    folder = interrupted()
    (folder / "env.json").write_text(text)
    (folder / "counter").write_text("2")
    with pytest.warns(UserNote, match=r"env\.json: damaged; it is written anew"):
        assert main([*RUN, "--stop", "killed"]) == 0
    assert json.loads((folder / "env.json").read_text())["interrupted"] == []


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_damaged_results_are_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(RUN) == 0
    (folder_of_a_run() / "results.json").write_text(text)
    assert main(RUN) == 2
    assert "results.json: not the JSON that a run writes; remove the folder or use --over" in error_line(
        capsys
    )
    assert main([*RUN, "--overwrite"]) == 0


def test_a_run_that_fails_before_it_wrote_anything_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: object, run: object) -> dict[str, object]:
        raise UserError("no such data")

    whole = fake_task.run
    monkeypatch.setattr(fake_task, "run", refuse)
    assert main(RUN) == 2
    assert not list(Path("outputs/fake").iterdir())
    monkeypatch.setattr(fake_task, "run", whole)
    folder = interrupted()  # one that wrote something stays
    monkeypatch.setattr(fake_task, "run", refuse)
    assert main([*RUN, "--stop", "killed"]) == 2
    assert (folder / "metrics.jsonl").exists()


def test_seconds_cover_the_starts_before() -> None:
    folder = interrupted()
    env = json.loads((folder / "env.json").read_text())
    env["seconds_before"] = 100.0
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "counter").write_text("2")
    assert main([*RUN, "--stop", "killed"]) == 0
    assert 100 <= json.loads((folder / "env.json").read_text())["seconds"] < 200


def test_leftovers_of_killed_writes_go(capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted()
    (folder / ".results.json.abcdefgh").write_text("{")
    (folder / ".metrics.jsonl.12345678").write_text("{")
    (folder / ".results.json.of-mine").mkdir()
    (folder / "counter").write_text("2")
    assert main([*RUN, "--stop", "killed"]) == 0
    assert sorted(path.name for path in folder.glob(".*")) == [
        ".files.json",
        ".lock",
        ".results.json.of-mine",
    ]


def test_only_what_was_written_aside_is_removed(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    for name in (".a.12345678", ".a.123", ".ab.12345678", "a"):
        (tmp_path / "torn" / name).write_text("")
    remove_torn(tmp_path / "torn" / "a")
    assert sorted(os.listdir(tmp_path / "torn")) == [".a.123", ".ab.12345678", "a"]


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/proc/self/mem", "/"])
def test_what_is_no_config_is_one_line(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", path]) == 2
    error_line(capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, or a skip where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_line(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_disk / "filler").write_bytes(b"x" * 40960)
    (small_disk / "a").write_text("old")
    with pytest.raises(UserError, match="a: cannot be written: No space left on device; make room there"):
        write_atomic(small_disk / "a", b"x" * 65536)
    assert (small_disk / "a").read_text() == "old"
    assert sorted(os.listdir(small_disk)) == ["a", "filler"]
    log = runs.Run(small_disk, "x")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        collections.deque((log.log(loss=1.0, text="x" * 100) for _ in range(1000)), maxlen=0)
    assert runs.read_metrics(small_disk)  # the whole lines
    assert main([*RUN, "--outputs", str(small_disk / "out"), "--steps", "2000"]) == 2
    assert "No space left on device" in error_line(capsys)


def test_a_finished_run_is_read_where_nothing_can_be_written(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*RUN, "--outputs", str(small_disk)]
    assert main(words) == 0
    assert subprocess.run(["mount", "-o", "remount,ro", small_disk], check=False).returncode == 0
    capsys.readouterr()
    assert main(words) == 0
    assert "already done" in capsys.readouterr().out
    (folder,) = (small_disk / "fake").iterdir()
    assert main(["report", str(folder), "--out", "page.html"]) == 0
    capsys.readouterr()
    assert main([*words, "--overwrite"]) == 2
    assert "Read-only file system" in error_line(capsys)
    assert main([*words, "--steps", "4"]) == 2
    assert "Read-only file system" in error_line(capsys)
    assert main(["report", str(folder), "--out", str(small_disk / "page.html")]) == 2
    assert "Read-only file system" in error_line(capsys)


def test_a_pipe_is_a_config(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('steps: 2\\n')"])
    assert main(["fake", str(pipe)]) == 0
    assert writer.wait() == 0
    shutil.rmtree("outputs")
