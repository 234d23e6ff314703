"""Compressed caches of any family: the query reads what it would read if it did not see the rest."""

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import load_model
from jaxlab.errors import UserError
from jaxlab.icl.compression import (
    check_compression,
    chosen_places,
    compressed_logits,
    random_instead,
    read_context,
    split_prompts,
)
from jaxlab.models import ModelConfig, NSAConfig, Patch, RopeConfig, forward, init_params
from tests.checkpoints import folders

LENGTH, START = 15, 10
KEPT = np.array([0, 3, 4, 8])

pytestmark = pytest.mark.usefixtures("quick")


def check(params, config, tokens):
    """Against the whole prompt, in which the query's scores for what is not kept are minus infinity."""
    last = np.full(len(tokens), LENGTH - 1, np.int32)
    split = split_prompts(tokens, np.full(len(tokens), START), last)
    keep = np.zeros((1, len(tokens), split.context.shape[1]), bool)
    keep[..., KEPT] = True
    cache = read_context(params, split.context, split.context_lengths, config)
    found = compressed_logits(params, cache, chosen_places(keep), split.query, split.last, config)[0]
    unseen = np.setdiff1d(np.arange(START), KEPT)
    hide = Patch("attention_scores", value=-1e30, positions=np.arange(START, LENGTH), sources=unseen)
    expected = forward(params, {"tokens": tokens}, config, patches=(hide,)).logits[:, -1]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
    plain = forward(params, {"tokens": tokens}, config).logits[:, -1]
    assert np.max(np.abs(np.asarray(plain) - np.asarray(expected))) > 1e-2
    return np.asarray(found)


def test_rotary_positions_stay_those_of_the_prompt():
    config = ModelConfig(
        vocab_size=23,
        width=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=16,
        position=RopeConfig(),
        initializer_range=0.5,
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 23, (3, LENGTH)).astype(np.int32)
    found = check(params, config, tokens)
    # A row's demonstrations are its own: what another row holds does not matter.
    changed = tokens.copy()
    changed[1:] = (changed[1:] + 1) % 23
    np.testing.assert_allclose(check(params, config, changed)[0], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama3", "gemma2", "gpt_oss", "deepseek_v3", "gptj", "phi3", "qwen3_moe"])
def test_families(tmp_path, case):
    config, params, _ = load_model(folders.make(tmp_path / case, case))
    if "sliding" in config.kinds and config.sliding.window < LENGTH:
        with pytest.raises(UserError, match="longer than the model's window"):
            check_compression(config, LENGTH)
        return
    check(params, config, folders.golden(case)["tokens"][:2, :LENGTH].astype(np.int32))


def test_other_caches_are_refused():
    nsa = NSAConfig(block_len=4, stride=2, block_size=4, num_blocks=3, window=3)
    with pytest.raises(UserError, match="sparse attention has other caches"):
        check_compression(ModelConfig(vocab_size=23, attention=nsa), LENGTH)


def test_random_words_stand_for_label_words():
    rng = np.random.default_rng(0)
    anchors = np.zeros((40, 12), bool)
    anchors[:, [3, 8]] = True
    spans = np.repeat([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]], 40, axis=0)
    others = ~anchors
    others[:, [0, 5]] = False
    anywhere = random_instead(rng, anchors, others)
    inside = random_instead(rng, anchors, others, spans)
    for chosen in (anywhere, inside):
        assert (chosen.sum(1) == 2).all()
        assert np.all(chosen <= others)
        assert (chosen[0] != chosen[1:]).any()
    assert all((inside & (spans == span)).sum(1).tolist() == [1] * 40 for span in (0, 1))
    assert not all((anywhere & (spans == span)).sum(1).tolist() == [1] * 40 for span in (0, 1))
    few = np.zeros_like(others)
    few[:, 1] = True
    assert (random_instead(rng, anchors, few).sum(1) == 1).all()
