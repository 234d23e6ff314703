"""Fake tasks, and code that counts as committed, so that finished runs may be reused."""

from pathlib import Path

import pytest

from jaxlab.app import provenance
from jaxlab.app.registry import Task
from jaxlab.tasks import TASKS
from tests.app import fake_command, fake_task


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for task in (
        Task("fake", fake_task.__name__, "log a falling loss"),
        Task("fake-command", fake_command.__name__, "do as told", "arguments"),
    ):
        monkeypatch.setitem(TASKS._by_name, task.name, task)
    monkeypatch.setattr(provenance, "code", lambda: provenance.Code("1.0", "c0ffee", ""))
    fake_task.calls.clear()
    fake_command.calls.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text("# A small one.\nsteps: 3\n")


@pytest.fixture
def changed_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "code", lambda: provenance.Code("1.0", "c0ffee", "facade"))
