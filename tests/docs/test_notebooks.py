"""The notebooks are small and whole; slowly, they run."""

import ast
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_is_one_for_each_system() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"nsa", "skill_injection", "icl_flows"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_its_code_is_python(path: Path) -> None:
    assert path.stat().st_size < 200_000
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any("assert " in ast.unparse(ast.parse(source)) for source in code), "it checks nothing"
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert "/tmp/" not in json.dumps(output)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that is no checkout."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
