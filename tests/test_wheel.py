"""The wheel, installed in an empty environment and called from a folder that is no checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command without the checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel alone, and borrows the packages that it needs from this one.

    They are borrowed through a line in a .pth file, which does not read the .pth files of this environment:
    its own, editable jaxlab stays out.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(purelib.stdout.strip(), "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_it_is_the_wheel_that_runs_and_it_is_typed(installed: Path, tmp_path: Path) -> None:
    code = "import jaxlab, kernels_pallas; print(jaxlab.__path__[0]); print(kernels_pallas.__path__[0])"
    for line in run(installed / "python", "-c", code, cwd=tmp_path).stdout.splitlines():
        assert Path(line).is_relative_to(installed.parent)
        assert Path(line, "py.typed").is_file()


@pytest.mark.slow
def test_help_and_a_shipped_config(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "jaxlab", "--help", cwd=tmp_path).stdout.startswith("usage: jaxlab TASK ")
    few = ["--steps", "2", "--eval_batches", "1"]
    done = run(installed / "jaxlab", "train", "configs/quickstart/digits_base.yaml", *few, cwd=tmp_path)
    assert "configs/ is not in this folder: what is shipped is taken, from " in done.stderr
    (folder,) = (tmp_path / "outputs" / "train").iterdir()
    assert folder.name.startswith("digits_base-")
    facts = json.loads((folder / "env.json").read_text())
    assert facts["command"] == f"jaxlab train configs/quickstart/digits_base.yaml {' '.join(few)}"
    assert (facts["commit"], facts["dirty"]) == ("", False)


@pytest.mark.slow
def test_quickstart_from_a_module(installed: Path, tmp_path: Path) -> None:
    run(installed / "python", "-m", "jaxlab", "quickstart", "--smoke", cwd=tmp_path)
    page = (tmp_path / "outputs" / "quickstart" / "report.html").read_text()
    assert page.count("<section") == 4
