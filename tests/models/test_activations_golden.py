"""Named activations are transformers' hidden states and attentions (tests/golden/activations)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab import load_model
from jaxlab.models import activations
from tests.checkpoints import folders

GOLDEN = Path(__file__).parents[1] / "golden" / "activations"
DEFAULT = (
    *("gpt2", "gptj", "mistral", "gemma2", "gemma3_text", "qwen3_moe"),
    *("llava", "gemma3", "qwen2_vl", "qwen3_vl"),
)
"""One of each kind of layer and of position; the others are slow."""
CASES = [
    case if case in DEFAULT else pytest.param(case, marks=pytest.mark.slow)
    for case in sorted(path.stem for path in GOLDEN.glob("*.npz"))
]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Programs that run once are compiled in half the time without optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def batch_of(case, length):
    golden = folders.golden(case)
    if "prompt.pixel_values" not in golden:
        return {"tokens": golden["tokens"][:1, :length].astype(np.int32)}
    more = {key.removeprefix("prompt."): x for key, x in golden.items() if key.startswith("prompt.")}
    return {"tokens": golden["prompt"], "images": more.pop("pixel_values"), **more}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_attentions_are_those_of_transformers(tmp_path, case):
    """Between two of the first layers the stream is not the same where DeepStack adds to images."""
    config, params, _ = load_model(folders.make(tmp_path / case, case))
    with np.load(GOLDEN / f"{case}.npz") as file:
        hidden, attentions = file["hidden_states"], file["attentions"]
    names = ("embedding", "residual_pre", "residual_post", "attention_pattern", "final_hidden")
    batch = batch_of(case, hidden.shape[2])
    found = activations(params, batch, config, names)
    close(found["embedding"], hidden[0])
    close(found["residual_post"][:-1], hidden[1:-1])
    close(found["final_hidden"], hidden[-1])
    close(found["attention_pattern"], attentions)
    added = np.asarray(found["residual_pre"][1:] - found["residual_post"][:-1])
    deep = len(getattr(config.vision, "deep_layers", ()))
    is_image = np.asarray(batch["tokens"]) == (config.image_token if config.has_vision else -1)
    assert not added[deep:].any()
    assert not added[:deep, ~is_image].any()
    assert all((layer[is_image] != 0).all(-1).all() for layer in added[:deep])


def test_the_layers_of_a_case_differ_enough_to_tell_them_apart():
    """A layer too early or too late would not pass."""
    for case in DEFAULT:
        with np.load(GOLDEN / f"{case}.npz") as file:
            hidden, attentions = file["hidden_states"], file["attentions"]
        for x in (hidden, attentions):
            with pytest.raises(AssertionError):
                close(x[1:], x[:-1])
