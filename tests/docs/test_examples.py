"""The examples in docs/ run; the benchmarks fit what they import."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.docs.scripts import load

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


SHARED = {"shapes"}  # what several benchmarks import: no command of its own


@pytest.mark.parametrize("name", sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - SHARED))
def test_benchmarks_can_be_imported(name):
    assert callable(load(name, ROOT / "benchmarks").main)


def test_native_sparse_attention_in_foreign_models():
    out = load("nsa_in_nnx", EXAMPLES).main(length=70)
    assert out.shape == (2, 70, 64)
    gradient = load("nsa_in_a_function", EXAMPLES).main(length=70)
    assert gradient.shape == (64, 8, 16)
    for x in (out, gradient):
        assert np.isfinite(x).all()
        assert (np.asarray(x) != 0).any()


def test_the_page_on_foreign_models_shows_the_examples():
    page = (ROOT / "docs" / "nsa_in_your_model.md").read_text()
    for name, first, last in (
        ("nsa_in_nnx", "        tokens = nsa.NewTokens", "        return self.output(out)"),
        ("nsa_in_a_function", "    q = jnp.einsum", "    return jnp.einsum"),
    ):
        example = (ROOT / "docs" / "examples" / f"{name}.py").read_text()
        start = example.index(first)
        assert example[start : example.index(last, start)] in page


def test_information_flow():
    means = load("information_flow", EXAMPLES).main()
    assert means.shape == (3, 3, 3)
    assert np.isfinite(means).all()
    assert (
        means[-1, 1, 0] == 0.0
    )  # the loss is at the last token: nothing flows into labels in the last layer
    assert means[0, 1, 0] > 0.0


@pytest.mark.slow
def test_inject_expert():
    merged = load("inject_expert", EXAMPLES).main()
    assert "vision" in merged


@pytest.mark.slow
def test_train_and_generate(tmp_path, monkeypatch):
    """With one layer and short texts: what is tested is that it runs."""
    module = load("train_and_generate", EXAMPLES)
    whole = module.load

    def smaller(*args):
        config = whole(*args)
        data = dataclasses.replace(config.data, sequence_length=64)
        return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, num_layers=1))

    monkeypatch.setattr(module, "load", smaller)
    assert module.main(outputs=str(tmp_path), steps=2).startswith("def main(")
