"""What is measured inside a model, on models of Hugging Face's families: flows, blocking, activations."""

import numpy as np
import pytest

from jaxlab.checkpoints import load_model
from jaxlab.icl import blocked_logits, flows
from jaxlab.models import activations, forward
from tests.checkpoints import folders

DEFAULT = ("smollm3",)
SLOW = (
    "gpt_neox",
    "opt",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "phi3_longrope",
    "smollm3_window",
    "stablelm_parallel",
    "gpt_oss",
    "deepseek_v3",
    "cohere2",
    "qwen2_moe",
    "granite",
)
LENGTH = 15

pytestmark = pytest.mark.usefixtures("quick")


def prepared(tmp_path, case):
    """The model, a batch, its last places, and classes of its tokens."""
    config, params, _ = load_model(folders.make(tmp_path / case, case))
    tokens = folders.golden(case)["tokens"][:, :LENGTH].astype(np.int32)
    classes = np.zeros(tokens.shape, np.int32)
    classes[:, [3, 6]], classes[:, -1] = 1, 2
    return config, params, {"tokens": tokens}, np.full(2, LENGTH - 1, np.int32), classes


@pytest.mark.parametrize("case", [*DEFAULT, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_blocking_sees_the_model_that_is_run(tmp_path, case):
    config, params, batch, last, classes = prepared(tmp_path, case)
    logits = forward(params, batch, config)[0]
    layers = np.stack([np.zeros(config.num_layers, bool), np.ones(config.num_layers, bool)])
    words = np.stack([np.zeros(classes.shape, bool), classes == 1])
    blocked = blocked_logits(params, batch, last, layers, words, config)
    np.testing.assert_allclose(blocked[0], logits[:, -1], rtol=1e-4, atol=1e-4)
    assert np.abs(blocked[1] - blocked[0]).max() > 1e-2


@pytest.mark.slow  # test_flows_golden.py and test_activations_golden.py hold them by default
@pytest.mark.parametrize("case", [*DEFAULT, *SLOW])
def test_flows_and_activations_are_of_the_model_that_is_run(tmp_path, case):
    config, params, batch, last, classes = prepared(tmp_path, case)
    logits = forward(params, batch, config)[0]
    labels = {"label_tokens": np.array([5, 2, 11], np.int32), "labels": np.array([0, 2], np.int32)}
    sums, counts = flows(params, batch, config, classes, {"positions": last, **labels})
    assert np.isfinite(sums).all()
    assert (np.asarray(sums).sum(axis=(0, 2, 3)) > 0).all()  # of every layer
    edges = sum(min(i, config.sliding.window - 1) if "sliding" in config.kinds else i for i in range(LENGTH))
    sliding = [i for i, kind in enumerate(config.kinds) if kind == "sliding"]
    assert (np.asarray(counts).sum(axis=(2, 3))[:, sliding] == edges).all()

    names = ("residual_pre", "attention_output", "mlp_output", "residual_post", "logits")
    found = activations(params, batch, config, names)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    added = found["residual_pre"] + found["attention_output"] + found["mlp_output"]
    np.testing.assert_allclose(found["residual_post"], added, atol=1e-4)
