"""Every file under configs/ loads with the task that its header names, and the header says what to expect."""

import re
import shlex
from pathlib import Path

import pytest

from jaxlab import config as configs
from jaxlab.merging import load_recipe
from jaxlab.tasks import TASKS, main
from tests.config.headers import KEYS, read_header

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file())


def test_there_are_configs_and_nothing_else() -> None:
    assert FILES
    assert {path.suffix for path in FILES} == {".yaml"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_header_says_what_to_expect(path: Path) -> None:
    header = read_header(ROOT / path)
    assert len(header["what"].split()) >= 3
    for key in KEYS:
        assert header.get(key), f"{path} lacks a line `# {key}: ...`"
    assert re.search(r"\d+ *(s|min|h)\b|second|minute|hour", header["time"]), header["time"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_command_of_the_header_is_valid(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    program, script, task_name, *words = shlex.split(read_header(ROOT / path)["command"])
    assert (program, script) == ("python", "run.py")
    assert words[0] == str(path), "the command runs another file"
    task = TASKS.find(task_name)
    if task.takes == "config":
        assert main([task_name, *words, "--print-config"]) == 0, capsys.readouterr().err
        config = configs.load(task.schema(), path)
        assert configs.build(task.schema(), configs.to_dict(config)) == config
    else:
        configs.load(task.schema(), None, words)
        load_recipe(path)


def test_a_header_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# What it\n# is.\n# paper: A,\n#   table 1\n# time: 3 min\na: 1\n# expected: not here\n")
    assert read_header(path) == {"what": "What it is.", "paper": "A, table 1", "time": "3 min"}
