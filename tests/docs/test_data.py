"""The configs of docs/data.md are configs, and its Python runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from jaxlab.config import load
from jaxlab.data import DocumentsConfig
from jaxlab.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configs_are_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    config = load(TASKS.find("train").schema(), tmp_path / "config.yaml")
    assert isinstance(config.data, DocumentsConfig)


@pytest.mark.slow
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLAB_DATA_CACHE", str(tmp_path))
    [code] = blocks("python")
    names: dict = {}
    exec(code, names)
    np.testing.assert_array_equal(names["batch"]["tokens"][4:], names["mine"]["tokens"])
    np.testing.assert_array_equal(names["reader"].read(17)["tokens"], names["batch"]["tokens"])
    names["reader"].close()
