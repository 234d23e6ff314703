"""Flows through the families' own parts (no positions, latents, sinks, factors) against plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoints import load_model
from jaxlab.icl import flows, saliency_maps
from jaxlab.models import Patch, activations, forward
from tests.checkpoints import folders

LENGTH = 12
CASES = (
    "gpt_oss",
    "deepseek_v3",
    "cohere2",
    "granite",
    "exaone4",
    "qwen2_moe",
    "olmoe",
    "glm4_moe",
    "deepseek_v2",
    "ministral",
    "seed_oss",
    "cohere",
)

pytestmark = pytest.mark.usefixtures("quick")


@functools.partial(jax.jit, static_argnames="config")
def gradients(params, batch, targets, change, config):
    """dL/dA of every layer and head, of attention weights A + change."""

    def loss(change):
        patch = Patch("attention_pattern", value=change, mode="add")
        logits = forward(params, batch, config, patches=(patch,)).logits[:, -1, targets["label_tokens"]]
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), targets["labels"][:, None], axis=1)
        return -jnp.sum(right)

    return jax.grad(loss)(change)


@pytest.mark.slow  # by default test_flows_golden.py holds sinks, windows and latents against transformers
@pytest.mark.parametrize("case", CASES)
def test_flows_are_those_of_autodiff_and_the_stream_adds_up(tmp_path, case):
    config, params, _ = load_model(folders.make(tmp_path / case, case))
    batch = {"tokens": folders.golden(case)["tokens"][:, :LENGTH].astype(np.int32)}
    targets = {
        "positions": np.full(2, LENGTH - 1, np.int32),
        "label_tokens": np.array([5, 2, 11], np.int32),
        "labels": np.array([0, 2], np.int32),
    }
    names = ("residual_pre", "attention_output", "mlp_output", "residual_post", "attention_pattern")
    found = activations(params, batch, config, names)
    added = found["residual_pre"] + found["attention_output"] + found["mlp_output"]
    np.testing.assert_allclose(found["residual_post"], added, rtol=1e-4, atol=1e-5)
    pattern = found["attention_pattern"]
    total = np.asarray(pattern).sum(-1)
    np.testing.assert_allclose(np.minimum(total, 1.0) if config.attention_sinks else 1.0, total, atol=1e-5)
    assert (total.mean() < 0.95) == config.attention_sinks
    flow = pattern * gradients(params, batch, targets, jnp.zeros_like(pattern), config)
    expected = np.abs(np.asarray(flow).sum(2)).swapaxes(0, 1)
    maps = saliency_maps(params, batch, config, targets)
    np.testing.assert_allclose(maps, expected, rtol=2e-3, atol=2e-6)
    assert np.any(np.tril(expected, -1) > 1e-4)
    classes = np.zeros((2, LENGTH), np.int32)
    classes[:, [3, 6]], classes[:, -1] = 1, 2
    sums, counts = flows(params, batch, config, classes, targets)
    one_hot = np.eye(3)[classes]
    by_class = np.einsum("blij,bix,bjy->blxy", np.tril(expected, -1), one_hot, one_hot)
    np.testing.assert_allclose(sums, by_class, rtol=2e-3, atol=1e-5)
    assert np.all(np.asarray(counts).sum((2, 3)) > 0)
