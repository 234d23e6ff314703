"""Configs and the shipped model are found from any folder; the user's own files go first."""

import sys
from pathlib import Path

import pytest

from jaxlab import files
from jaxlab.app.program import program
from jaxlab.config import load
from jaxlab.tasks import main
from jaxlab.tasks.train import Config

ROOT = Path(__file__).parents[1]
NAME = "configs/quickstart/nsa_full.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files._say_shipped.cache_clear()


def test_the_shipped_file_stands_in_and_that_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert files.shipped(NAME).samefile(ROOT / NAME)
    assert files.shipped("jaxlab/assets/icl_model").samefile(ROOT / "jaxlab/assets/icl_model")
    files.shipped(NAME)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["configs/", "jaxlab/assets/"]


def test_ones_own_file_goes_first(capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(NAME)
    own.parent.mkdir(parents=True)
    own.write_text((ROOT / NAME).read_text().replace("steps: ", "steps: 1"))
    assert load(Config, NAME).steps != load(Config, ROOT / NAME).steps
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name", ["configs/none.yaml", "configs/../run.py", "a/configs/x.yaml", "jaxlab/errors.py", "x"]
)
def test_nothing_else_is_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.shipped(name) == Path(name)
    assert capsys.readouterr().err == ""


def test_a_wheel_has_the_configs_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "site-packages" / "jaxlab" / "configs"
    inside.mkdir(parents=True)
    (inside / "a.yaml").write_text("steps: 1")
    monkeypatch.setitem(files._SHIPPED, "configs", (inside, tmp_path / "site-packages" / "configs"))
    assert files.shipped("configs/a.yaml") == inside / "a.yaml"


def test_models_that_configs_name_are_found_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["icl", "configs/quickstart/icl_analysis.yaml", "--check"]) == 0
    assert main(["train", "configs/quickstart/digits_vlm.yaml", "--check"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: configs/quickstart/digits_base.yaml: not trained yet in outputs; run: ")
    assert said.endswith(" train configs/quickstart/digits_base.yaml")


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("run.py", "python run.py"),
        ("/a/b/run.py", "python run.py"),
        ("/usr/bin/jaxlab", "jaxlab"),
        ("/usr/lib/jaxlab/__main__.py", "python -m jaxlab"),
        ("/usr/bin/pytest", "python run.py"),
    ],
)
def test_messages_name_the_program_as_it_was_called(
    called: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert program() == name
    assert main(["train"]) == 2
    assert f": {name} train CONFIG.yaml" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} TASK ")


def test_an_installed_package_knows_no_run_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlab.__file__", str(tmp_path / "jaxlab" / "__init__.py"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py"])
    assert program() == "jaxlab"
