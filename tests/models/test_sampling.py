"""How the next token is chosen: each step as transformers does it; what rows and keys have to do with it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import forward, generate
from jaxlab.models.generation import decode_step
from jaxlab.models.sampling import Sampling, process_logits, sample, seen_tokens
from tests.models.tiny import draw_params, make_config

GOLDEN = Path(__file__).parents[1] / "golden" / "sampling"
CASES = json.loads((GOLDEN / "cases.json").read_text())
MADE = np.load(GOLDEN / "logits.npz")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    seen = seen_tokens(MADE["tokens"], None, MADE["logits"].shape[1])
    found = process_logits(jnp.asarray(MADE["logits"]), jnp.asarray(seen), Sampling(**CASES[name]).values)
    rows = slice(3 if name == "top_p_none" else 4)  # which of equals stays is the sort's choice
    np.testing.assert_array_equal(np.isfinite(found)[rows], np.isfinite(MADE[name])[rows])
    np.testing.assert_allclose(found[rows], MADE[name][rows], rtol=1e-6)
    assert name in ("top_k_of_all",) or not np.array_equal(MADE[name], MADE["logits"])


def test_only_the_steps_asked_for_are_in_the_program():
    assert Sampling().values == {}
    assert Sampling(top_k=3, top_p=0.5, min_p=0.1).steps == ()  # nothing is drawn
    assert Sampling(0.5, repetition_penalty=1.1, top_k=3).steps == (
        "repetition_penalty",
        "temperature",
        "top_k",
    )


def test_samples_have_the_softmax_of_the_logits_over_the_temperature():
    logits = jnp.log(jnp.asarray([0.1, 0.2, 0.7], jnp.float32)) * 2
    drawn = sample(jnp.broadcast_to(logits[None], (4000, 3)), jax.random.key(0), Sampling(2.0).values)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.1, 0.2, 0.7], atol=0.03)
    tie = jnp.asarray([[0.0, 1.0, 1.0]], jnp.float32)
    assert sample(tie, jax.random.key(0), {}).tolist() == [1]


def test_a_row_with_a_key_of_its_own_is_drawn_as_if_alone():
    config = make_config()
    params = draw_params(config)
    prompts = [[1, 2, 3, 4], [5, 6]]
    keys = jax.random.split(jax.random.key(3), 2)
    options = {
        "max_new_tokens": 5,
        "temperature": 1.5,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
    }
    batch = {
        "tokens": np.asarray([prompts[0], [*prompts[1], 1, 1]], np.int32),  # padding is not in the prompt
        "segment_ids": np.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32),
    }
    together = generate(params, batch, config, **options, key=keys)
    for row, prompt in enumerate(prompts):
        alone = {"tokens": np.asarray([prompt], np.int32)}
        made = generate(params, alone, config, **options, key=keys[row : row + 1])
        np.testing.assert_array_equal(together[row], made[0])


def test_the_penalty_counts_the_prompt_and_what_was_made():
    config = make_config()
    params = draw_params(config)
    run = jax.jit(lambda tokens: forward(params, {"tokens": tokens}, config).logits)
    made, text = [], [1, 2, 3, 4]
    for _ in range(6):
        logits = np.asarray(run(np.asarray([text + [0] * (10 - len(text))], np.int32)))[0, len(text) - 1]
        said = np.isin(np.arange(13), text)
        made.append(int(np.where(said, np.where(logits < 0, logits * 3, logits / 3), logits).argmax()))
        text.append(made[-1])
    batch = {"tokens": np.asarray([[1, 2, 3, 4]], np.int32)}
    found = generate(params, batch, config, max_new_tokens=6, repetition_penalty=3.0)[0]
    assert found.tolist() == made
    assert generate(params, batch, config, max_new_tokens=6)[0].tolist() != made


def test_other_values_take_the_same_program():
    config = make_config()
    params = draw_params(config)
    batch = {"tokens": np.asarray([[1, 2, 3, 4]], np.int32)}
    key = jax.random.key(0)
    run = lambda t, k: generate(params, batch, config, max_new_tokens=3, temperature=t, top_k=k, key=key)
    run(0.5, 4)
    compiled = decode_step._cache_size()
    run(0.9, 7)
    assert decode_step._cache_size() == compiled


@pytest.mark.parametrize("temperature", [1e-40, 1e-7, -0.5, float("inf"), float("nan")])
def test_temperatures_by_which_logits_leave_float32_are_refused(temperature):
    """At 1e-40 the text was empty, with exit 0."""
    with pytest.raises(ValueError, match="temperature must be 0, or finite and at least 1e-06"):
        Sampling(temperature)
    assert Sampling(1e-6).steps == ("temperature",)
