"""The help of every task that there is: each field has its line."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.app.cli import RunOptions
from jaxlab.app.help import field_docs
from jaxlab.config.schema import KIND, fields_of, groups, kind_of, leaves, variants
from jaxlab.tasks import TASKS, main

ROOT = Path(__file__).parents[2]
NAMES = [name for name in TASKS.names() if not name.startswith("fake")]


def undocumented(cls: type) -> list[str]:
    missing = [
        f"{cls.__name__}.{field.name}"
        for field in fields_of(cls).values()
        if field.name not in field_docs(cls) and not (field.key == KIND and kind_of(cls))
    ]
    for field in fields_of(cls).values():
        for group in groups(field.type):
            missing += undocumented(group)
            if group in variants(field.type).values() and not vars(group)["__doc__"]:
                missing.append(group.__name__)
    return missing


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_task_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = TASKS.find(name)
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    for dotted, field in leaves(task.schema()).items():
        assert (dotted.upper() if field.positional else f"--{dotted} ") in page
    assert undocumented(task.schema()) == []
    if task.takes == "config":
        assert not fields_of(task.schema()).keys() & fields_of(RunOptions).keys()


def test_the_script_hands_over() -> None:
    process = subprocess.run([sys.executable, "run.py", "trane"], capture_output=True, text=True, cwd=ROOT)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: unknown task 'trane'; did you mean train?\n"
