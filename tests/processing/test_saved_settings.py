"""Processor files as transformers 5 writes them (tests/golden/families/processors.py) say the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from tests.processing.folders import CASES, GOLDEN, load_processor

SAVED = Path(__file__).parents[1] / "golden" / "families" / "processors"


@pytest.mark.parametrize("name", CASES)
def test_saved_files_say_what_the_cases_say(name, tmp_path):
    case = CASES[name]
    for file, content in json.loads((SAVED / f"{name}.json").read_text()).items():
        (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    tokenizer = Tokenizer.from_file(str(GOLDEN / case["tokenizer"]))
    images = [GOLDEN / image for image in case["images"]]
    if case["opened"]:
        images = [Image.open(image) for image in images]
    batch = load_processor(tmp_path, **case["overrides"])(case["text"], images, tokenizer)
    with np.load(GOLDEN / "batches.npz") as file:
        expected = {k.removeprefix(f"{name}."): file[k] for k in file.files if k.startswith(f"{name}.")}
    assert set(batch) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(batch[key], value, rtol=0, atol=1e-6, err_msg=key)
