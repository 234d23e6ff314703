"""Adding a family is one file, a vision-language model too: the one that docs/families.md shows."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlab.checkpoints import families, open_model
from jaxlab.models import prepare_batch
from tests.checkpoints import folders
from tests.checkpoints.test_vlm_families import batch_of
from tests.models.tiny import run_model
from tests.processing.folders import GOLDEN, write_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
NAMES = (
    (r"^vision_tower\.vision_model\.", "eye."),
    (r"^multi_modal_projector\.linear_1\.", "bridge.0."),
    (r"^multi_modal_projector\.linear_2\.", "bridge.2."),
    (r"^language_model\.", "mouth."),
)


def forget():
    sys.modules.pop("jaxlab.checkpoints.families.toy", None)
    for cached in (families.all_families, families.rows_of, families.ignored):
        cached.cache_clear()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder of the golden case llava under the names of a family that one further module makes known."""
    (source,) = (b for b in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if 'name="toy"' in b)
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(source)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    forget()
    told = folders.config("llava")
    keys = ("text_config", "vision_config", "tie_word_embeddings")
    told = {key: told[key] for key in keys} | {"model_type": "toy", "image_token_id": 77}
    path = folders.write(
        tmp_path / "model", told, folders.laid_out(folders.weights("llava"), {"rename": NAMES})
    )
    write_tokenizer(path, {77: "<image>", 78: "<see>", 79: "</see>"})
    pixels = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    (path / "preprocessor_config.json").write_text(json.dumps(pixels))
    (path / "processor_config.json").write_text(json.dumps({"image_seq_length": 16}))
    yield path
    monkeypatch.undo()
    forget()


def test_one_module_reads_runs_and_writes_a_vision_language_model(toy, tmp_path):
    opened = open_model(toy)
    assert opened.config.family == "toy+llama"
    params, golden = opened.read(), folders.golden("llava")
    logits = run_model(params, prepare_batch(batch_of(golden), opened.config), opened.config)[0]
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()
    seen = []
    for image in ("wide.png", "gray.png"):
        batch = opened.processor("w5 <image> w6", [GOLDEN / image], opened.tokenizer)
        assert batch["tokens"][0].tolist() == [5, 78, *[77] * 16, 79, 6]
        seen.append(run_model(params, prepare_batch(batch, opened.config), opened.config)[0])
    assert np.isfinite(seen[0]).all()
    assert np.abs(seen[0] - seen[1])[:, 2:].max() > 1e-2  # the image matters
    folders.save(tmp_path / "out", opened.config, params)
    found, expected = folders.read_all(tmp_path / "out"), folders.read_all(toy)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
    assert open_model(tmp_path / "out").config == opened.config


def test_without_the_module_the_family_is_not_known():
    assert "toy" not in families.all_families()
