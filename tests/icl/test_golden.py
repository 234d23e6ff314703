"""Every analysis against outputs of torch in float64, from the formulas (tests/golden/icl/make.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlab.checkpoints import load_model
from jaxlab.icl import compression, cutting, diagnosis, flows, heads
from jaxlab.icl.blocking import blocked_logits, word_loyalty
from jaxlab.icl.label_attention import accumulated, attention_at, attention_by_label, aucroc, label_places
from jaxlab.icl.reweighting import Lesson, learn_anchor_weights, reweighted_logits
from tests.checkpoints import folders

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "icl" / "golden.json").read_text())
TOKENS = np.array(GOLDEN["tokens"], np.int32)
WORDS = np.array(GOLDEN["label_words"], np.int32)
LABELS = np.array(GOLDEN["labels"], np.int32)
NAMES = np.tile(np.array(GOLDEN["label_tokens"], np.int32), (len(TOKENS), 1))
ANCHORS = np.isin(np.arange(TOKENS.shape[1]), GOLDEN["anchors"])
LAST = np.full(len(TOKENS), TOKENS.shape[1] - 1, np.int32)
START = np.full(len(TOKENS), GOLDEN["start"], np.int32)
BATCH = {"tokens": TOKENS}
CLOSE = {"rtol": 2e-4, "atol": 2e-5}

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config, params, _ = load_model(folders.make(tmp_path_factory.mktemp("golden") / "gpt2", "gpt2"))
    return config, params


def of_labels(logits):
    return np.asarray(logits)[..., GOLDEN["label_tokens"]]


def test_attention_of_the_last_token(model):
    config, params = model
    golden, places = GOLDEN["attention"], label_places(WORDS)
    logits, weights = attention_at(params, BATCH, config, LAST, places.at)
    np.testing.assert_allclose(of_labels(logits), GOLDEN["label_logits"], **CLOSE)
    scores = attention_by_label(weights, places, 3)
    np.testing.assert_allclose(scores, golden["scores"], **CLOSE)
    predicted = of_labels(logits).argmax(-1)
    np.testing.assert_array_equal(predicted, golden["predicted"])
    by_layer = aucroc(scores, predicted)
    np.testing.assert_allclose(by_layer, golden["one_vs_rest"], rtol=1e-8)
    np.testing.assert_allclose(accumulated(by_layer), golden["r"], rtol=1e-7)
    np.testing.assert_allclose(aucroc(scores, predicted, "released_code"), golden["one_vs_one"], rtol=1e-8)
    scrambled = aucroc(scores, predicted, "released_code", one_demonstration=True)
    assert np.max(np.abs(scrambled - golden["one_vs_one"])) > 0.05
    assert np.isnan(aucroc(scores, np.zeros_like(predicted))).all()


def test_reweighting_learns_what_torch_learns(model):
    config, params = model
    golden = GOLDEN["reweighting"]
    chosen = np.array(golden["lessons"])
    lesson = Lesson(*(x[chosen] for x in (TOKENS, LAST, WORDS, NAMES, LABELS)))
    beta, losses = learn_anchor_weights(params, config, lesson, (0, 1), epochs=2)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-4)
    # Adam divides by the size of the gradient, so a gradient near 0 has an uncertain sign in float32.
    assert np.mean(np.abs(beta - np.array(golden["beta"])) > 1e-3) < 0.02
    assert np.max(np.abs(beta)) > 0.05
    logits = reweighted_logits(params, BATCH, config, LAST, WORDS, np.array(golden["beta"][0], np.float32))
    np.testing.assert_allclose(of_labels(logits), golden["logits"], **CLOSE)
    assert np.max(np.abs(np.array(golden["logits"]) - GOLDEN["label_logits"])) > 0.01
    nothing = reweighted_logits(params, BATCH, config, LAST, WORDS, np.zeros_like(beta[0]))
    np.testing.assert_allclose(of_labels(nothing), GOLDEN["label_logits"], **CLOSE)


def test_compressed_demonstrations(model):
    config, params = model
    golden = GOLDEN["compression"]
    split = compression.split_prompts(TOKENS, START, LAST)
    assert split.shared
    instead = ANCHORS & ~np.isin(np.arange(len(ANCHORS)), (4, 9, 14))
    instead[[1, 6, 12]] = True
    assert np.flatnonzero(instead[: START[0]]).tolist() == golden["random_places"]
    keep = np.stack([np.ones(len(ANCHORS), bool), ANCHORS, instead])[:, None, : START[0]]
    keep = np.tile(keep, (1, len(TOKENS), 1))
    keep = np.pad(keep, ((0, 0), (0, 0), (0, split.context.shape[1] - keep.shape[2])))
    cache = compression.read_context(params, split.context[:1], split.context_lengths[:1], config)
    at = compression.chosen_places(keep)
    found = compression.compressed_logits(params, cache, at, split.query, split.last, config)
    for logits, name in zip(found, (None, "hidden_anchor", "random"), strict=True):
        expected = GOLDEN["label_logits"] if name is None else golden[name]["logits"]
        np.testing.assert_allclose(of_labels(logits), expected, **CLOSE)
        if name is not None:
            loyal = word_loyalty(np.asarray(logits), np.asarray(found[0]))
            np.testing.assert_allclose(loyal, golden[name]["word_loyalty"], rtol=1e-6)
    keep = np.tile(ANCHORS, (len(TOKENS), 1))
    keep[:, START[0] :] = True
    text, ends = compression.anchor_text(TOKENS, keep, LAST)
    logits, _ = attention_at(params, {"tokens": text}, config, ends, np.zeros((len(text), 1), np.int32))
    np.testing.assert_allclose(of_labels(logits), golden["text_anchor"]["logits"], **CLOSE)
    # The positions of the released code, which follow on what is kept, are others.
    other = compression.compressed_logits(
        params, cache, at[1:2], split.query, split.last, config, offset=False
    )
    assert np.max(np.abs(other[0] - found[1])) > 1e-3


@pytest.mark.slow
def test_rows_of_different_demonstrations(model):
    """Rows with demonstrations of their own, cut at places of their own, are as they are alone."""
    config, params = model
    starts = START - np.arange(len(TOKENS)) % 3
    tokens = TOKENS.copy()
    tokens[1::2, 2] += 1
    split = compression.split_prompts(tokens, starts, LAST)
    assert not split.shared
    there = np.arange(split.context.shape[1]) < starts[:, None]
    keep = (np.arange(split.context.shape[1]) % 2 == 0)[None] & there
    cache = compression.read_context(params, split.context, split.context_lengths, config)
    at = compression.chosen_places(keep)[None]
    together = compression.compressed_logits(params, cache, at, split.query, split.last, config)[0]
    row = compression.split_prompts(tokens[4:5], starts[4:5], LAST[4:5])
    cache = compression.read_context(params, row.context, row.context_lengths, config)
    at = compression.chosen_places(keep[4:5, : row.context.shape[1]])[None]
    alone = compression.compressed_logits(params, cache, at, row.query, row.last, config)[0]
    np.testing.assert_allclose(together[4], alone[0], **CLOSE)


def test_diagnosis(model):
    config, params = model
    places, golden = label_places(WORDS), GOLDEN["diagnosis"]
    queries, keys = diagnosis.queries_and_keys(params, BATCH, config, LAST, places.at, (0, 1, 2))
    keys = diagnosis.keys_by_label(np.asarray(keys), places, 3)
    off = ~np.eye(3, dtype=bool)
    for layer in range(3):
        features = diagnosis.key_features(np.asarray(queries)[:, layer], keys[0, layer])
        predicted = diagnosis.predicted_confusion(features)
        np.testing.assert_allclose(predicted[off], np.array(golden["predicted"][layer])[off], rtol=1e-3)
        assert np.isnan(predicted.diagonal()).all()
    real = diagnosis.real_confusion(np.array(GOLDEN["label_logits"]), LABELS)
    np.testing.assert_allclose(real[off], np.array(golden["real"])[off], rtol=1e-9)
    found = diagnosis.confusion_correlation(predicted, real)
    assert -1.0 <= found["pearson"] <= 1.0
    assert diagnosis.confusion_correlation(real, real)["spearman"] == 1.0


@pytest.mark.slow
def test_cut_edges(model):
    config, params = model
    words, layers = WORDS >= 0, np.array([True, True, False])
    settings = [cutting.cut_of_words(words, LAST, layers, edges) for edges in ("into", "from", "to_last")]
    classes, cut = (np.stack(x) for x in zip(*settings, strict=True))
    found = cutting.cut_logits(params, BATCH, LAST, classes, cut, config)
    for logits, edges in zip(found, ("into", "from", "to_last"), strict=True):
        np.testing.assert_allclose(of_labels(logits), GOLDEN["cutting"][edges], **CLOSE)
    for mode, name in (("paper", "into"), ("released_code", "into_released_code")):
        logits = blocked_logits(params, BATCH, LAST, layers[None], words[None], config, mode)[0]
        np.testing.assert_allclose(of_labels(logits), GOLDEN["cutting"][name], **CLOSE)


@pytest.mark.slow
def test_flows_and_what_cutting_does(model):
    config, params = model
    golden = GOLDEN["flow"]
    classes = (WORDS >= 0).astype(np.int32)
    classes[:, -1] = 2
    sums, counts = flows(
        params, BATCH, config, classes, {"positions": LAST, "label_tokens": NAMES, "labels": LABELS}
    )
    np.testing.assert_allclose(np.asarray(sums).sum(0), golden["whole"], rtol=1e-3, atol=1e-5)
    visible = np.asarray(counts).sum(0) > 0
    cuts = cutting.single_cuts(visible)
    every = np.broadcast_to(classes, (len(cuts), *classes.shape))
    logits = np.asarray(cutting.cut_logits(params, BATCH, LAST, every, cuts, config))
    plain = np.asarray(GOLDEN["label_logits"])
    at = np.tile(np.arange(3), (len(TOKENS), 1))
    loss = lambda x: cutting.label_loss(x, at, LABELS).mean(-1)
    effects = loss(of_labels(logits)) - loss(plain)
    np.testing.assert_allclose(effects, np.array(golden["effects"])[visible], rtol=1e-3, atol=1e-5)
    found = cutting.faithfulness(np.asarray(sums).sum(0)[visible], effects)
    assert found["spearman"] > 0.5


@pytest.mark.slow
def test_scores_of_heads(model):
    config, params = model
    golden = GOLDEN["heads"]
    doubled = np.array(golden["doubled"], np.int32)
    np.testing.assert_allclose(heads.induction_scores(params, doubled, config), golden["induction"], **CLOSE)
    means = np.asarray(heads.head_outputs(params, BATCH, config, LAST)).mean(0)
    other = {"tokens": np.array(golden["shuffled"], np.int32)}
    chosen = np.array([(layer, head) for layer in range(3) for head in range(3)], np.int32)
    patched = heads.patched_logits(params, other["tokens"], config, LAST, means, chosen)
    plain, _ = attention_at(params, other, config, LAST, np.zeros((len(LAST), 1), np.int32))
    effects = heads.indirect_effects(np.asarray(plain), np.asarray(patched), NAMES[0][LABELS])
    np.testing.assert_allclose(effects.reshape(3, 3), golden["indirect_effects"], rtol=2e-3, atol=1e-7)
    assert np.max(np.abs(effects)) > 1e-4
