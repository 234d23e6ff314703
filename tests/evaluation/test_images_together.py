"""Prompts with images that are read together, beside the same prompts read alone, in families whose images
have each their own form."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxlab.checkpoints import open_model
from jaxlab.evaluation import QuestionsConfig, likelihood, prepare_questions
from jaxlab.models import forward
from tests.processing import test_end_to_end
from tests.training import vlm_cases

MARKS = {"mistral3": "[IMG]", "mllama": "<|image|>", "paligemma": ""}
OTHERS = ("mistral3", "mllama", "idefics2")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Programs that run once are compiled in half the time without optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def questions(tmp_path, case):
    """Four about wide images, one about a tall one and one about none; texts of different lengths."""
    make = test_end_to_end.make if case in OTHERS else vlm_cases.make
    tmp_path.joinpath("model").mkdir()
    opened = open_model(make(tmp_path / "model", case))
    rng = np.random.default_rng(0)
    lines = []
    for i, size in enumerate([(40, 24), (40, 24), (24, 40), (40, 24), (40, 24)]):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(tmp_path / f"{i}.png")
        words = " ".join(["w5", "w6", "w7", "w8"][: 1 + i % 3])
        prompt = f"{MARKS.get(case, '<image>')} {words}".strip() if case in OTHERS else words
        lines.append({"prompt": prompt, "image": f"{i}.png", "choices": ["w30 w31", "w9"], "answer": 0})
    lines.append({"prompt": "w5 w6", "choices": ["w30 w31", "w9"], "answer": 0})
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = QuestionsConfig(path=str(path), validation_share=0.0, measure="multiple_choice")
    return opened, prepare_questions(config, opened, "test")


@pytest.mark.parametrize(
    "case",
    [
        "qwen2_vl",
        "paligemma",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("llava", "llava_next", "idefics3", "mistral3", "mllama", "idefics2")
        ),
    ],
)
def test_images_that_are_read_together_are_read_as_they_are_alone(tmp_path, case):
    opened, asked = questions(tmp_path, case)
    params, prompts = opened.read(), [one.batch for one in asked.asked]
    continuations = [one.continuations for one in asked.asked]
    found = {}
    for size in (1, 4):
        found[size] = likelihood.likelihoods(params, opened.config, prompts, continuations, batch_size=size)
    sizes = sorted(len(group.members) for group in likelihood.groups(prompts, 4))
    assert sizes == [1, 1, 4]
    for one, four in zip(found[1], found[4], strict=True):
        np.testing.assert_allclose(four.log_probs, one.log_probs, rtol=1e-4, atol=1e-4)
    # The first and the fourth differ in their image alone: whose image is read shows.
    assert len(prompts[0]["tokens"][0]) == len(prompts[3]["tokens"][0])
    assert np.abs(found[4][0].log_probs - found[4][3].log_probs).max() > 1e-3
    # With their answers, for losses: no token of the question sees the answer.
    batches = asked.batches(4)
    members = [group.members for group in likelihood.groups(prompts, 4)]
    assert [len(batch["tokens"]) for batch in batches] == list(map(len, members))
    for batch, places in zip(batches, members, strict=True):
        logits = jax.jit(forward, static_argnames="config")(params, batch, opened.config)[0]
        log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        for row, place in enumerate(places):
            targets = np.flatnonzero(batch["loss_mask"][row])[: len(continuations[place][0])]
            summed = sum(log_p[row, t - 1, batch["tokens"][row, t]] for t in targets)
            np.testing.assert_allclose(summed, found[1][place].log_probs[0], rtol=1e-4, atol=1e-4)
