"""The page on interpretability: its examples run as they stand, its table is the one of the code."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab.models import ACTIVATIONS, forward

PAGE = (Path(__file__).parents[2] / "docs" / "interpretability.md").read_text()
RUN = jax.jit(forward, static_argnames="config")
TABLE = "| name | axes | what it is |\n|---|---|---|\n" + "".join(
    f"| `{name}` | [{', '.join(it.axes.split())}] | {it.meaning} |\n" for name, it in ACTIVATIONS.items()
)


@pytest.fixture(scope="module")
def examples():
    """What the examples leave, one after the other in one namespace."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        assert len([line for line in block.splitlines() if line.strip()]) < 10, block
        exec(block, names)
    return names


def test_the_table_is_that_of_the_code():
    assert TABLE in PAGE


def test_the_lens_of_the_last_layer_is_the_prediction(examples):
    logits = RUN(examples["params"], examples["batch"], examples["config"]).logits
    np.testing.assert_allclose(examples["lens"][-1], logits, rtol=1e-4, atol=1e-4)


def test_patching_brings_the_clean_answer_back(examples):
    effects, params, config = np.asarray(examples["effects"]), examples["params"], examples["config"]
    difference = lambda batch: RUN(params, batch, config).logits[0, -1][np.asarray([9, 33])]
    clean, corrupted = (float(np.subtract(*difference(examples[name]))) for name in ("batch", "corrupted"))
    assert abs(clean - corrupted) > 0.1
    assert effects[0, 1] == pytest.approx(clean, abs=1e-4)  # the one token that differs, before any layer
    assert effects[0, 0] == pytest.approx(corrupted, abs=1e-4)  # a token before it has nothing to say
    assert effects.shape == (3, 7)


def test_a_knockout_changes_the_prediction(examples):
    before, after = (np.asarray(examples[name]["attention_pattern"]) for name in ("before", "after"))
    assert not after[:, [0, 2], :, 0].any()
    np.testing.assert_array_equal(after[:, [1, 3]], before[:, [1, 3]])
    assert examples["change"] > 1e-3


def test_attribution_has_a_number_for_each_head(examples):
    assert examples["attribution"].shape == (3, 4)
    assert np.abs(examples["attribution"]).min() > 0
