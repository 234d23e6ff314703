"""The configs that docs/information_flow.md shows are valid, and the options that it names exist."""

import re
from pathlib import Path

import pytest

from jaxlab import config as configs
from jaxlab.config import schema
from jaxlab.tasks.icl import Config

TEXT = (Path(__file__).parents[2] / "docs" / "information_flow.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_its_configs_are_valid(tmp_path: Path, block: str) -> None:
    (tmp_path / "a.yaml").write_text(block, encoding="utf-8")
    config = configs.load(Config, tmp_path / "a.yaml")
    assert config.data.kind in block


def test_there_are_some_and_every_kind_is_named() -> None:
    assert len(BLOCKS) >= 2
    for kind in schema.variants(schema.fields_of(Config)["data"].type):
        assert f"`{kind}`" in TEXT
    for name in ("label_classes", "label_position", "sink", "forerunners", "too_long", "bad_rows"):
        assert f"`{name}" in TEXT
        assert any(key.rpartition(".")[2] == name for key in schema.leaves(Config)), name
