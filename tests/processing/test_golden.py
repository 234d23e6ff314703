"""Batches against those of transformers' processors (tests/golden/processors/make.py)."""

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from tests.processing.folders import CASES, GOLDEN, load_processor, write_folder


@pytest.fixture(scope="module")
def batches():
    with np.load(GOLDEN / "batches.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_batches_are_those_of_transformers(name, tmp_path, batches):
    case = CASES[name]
    tokenizer = Tokenizer.from_file(str(GOLDEN / case["tokenizer"]))
    images = [GOLDEN / image for image in case["images"]]
    if case["opened"]:
        images = [Image.open(image) for image in images]
    processor = load_processor(write_folder(tmp_path, name), **case["overrides"])
    batch = processor(case["text"], images, tokenizer)
    expected = {k.removeprefix(f"{name}."): v for k, v in batches.items() if k.startswith(f"{name}.")}
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert batch[key].dtype == (np.float32 if key == "images" else np.int32)
        # Pillow resizes both, and the steps after it are the same ones in float32.
        np.testing.assert_allclose(batch[key], value, rtol=0, atol=1e-6, err_msg=key)
