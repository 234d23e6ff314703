"""Flows through whole models against a plain decoder whose attention is multiplied by explicit ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.icl import Roles, flow_shares, flows, saliency, saliency_maps
from jaxlab.icl.inputs import check_flag, checked_classes, prepared
from jaxlab.icl.saliency import _checked_options
from jaxlab.models import (
    LearnedPositions,
    ModelConfig,
    NSAConfig,
    SlidingAttentionConfig,
    init_params,
    prepare_batch,
)

MODEL = ModelConfig(
    vocab_size=19,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    mlp="plain",
    mlp_width=24,
    activation="relu",
    norm="rms",
    position=LearnedPositions(),
    max_length=16,
    initializer_range=0.4,
)
TOKENS, BATCH = 11, 3


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    classes = np.zeros((BATCH, TOKENS), np.int32)
    classes[:, [3, 6]], classes[:, TOKENS - 1], classes[1, 4] = 1, 2, -1
    return {
        "batch": {"tokens": rng.integers(0, MODEL.vocab_size, (BATCH, TOKENS)).astype(np.int32)},
        "classes": classes,
        "targets": {
            "positions": np.full(BATCH, TOKENS - 1, np.int32),
            "label_tokens": np.array([5, 2, 11], np.int32),
            "labels": np.array([0, 2, 1], np.int32),
        },
    }


@jax.jit
def plain_maps(params, tokens, right, candidates):
    """A * dL/dA of every layer, head and sequence [L, B, H, T, T]: a decoder written out, no scan, no
    kernels. The loss is of the tokens `right` among those for which `candidates` is true."""
    length = tokens.shape[1]
    mask = np.tri(length, dtype=bool)[None, None]

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + MODEL.norm_eps) * scale[None, None]

    def loss(ones):
        x = params["embedding"]["table"][tokens] + params["position"]["table"][:length][None]
        for layer in range(MODEL.num_layers):
            p = jax.tree.map(lambda w, at=layer: w[at], params["layers"])
            y = norm(x, p["attention_norm"]["scale"])
            q, k, v = (jnp.einsum("btd,dhk->bhtk", y, p["attention"][n]) for n in ("query", "key", "value"))
            k, v = jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)
            scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / 2.0  # the root of the head dimension
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1) * ones[layer]
            heads = jnp.einsum("bhts,bhsk->bhtk", weights, v)
            x = x + jnp.einsum("bhtk,hkd->btd", heads, p["attention"]["output"])
            y = norm(x, p["mlp_norm"]["scale"])
            x = x + jax.nn.relu(y @ p["mlp"]["up"]) @ p["mlp"]["down"]
        logits = norm(x, params["final_norm"]["scale"])[:, -1] @ params["embedding"]["table"].T
        likely = jax.nn.log_softmax(jnp.where(candidates[None], logits, -jnp.inf))
        return -jnp.sum(likely[np.arange(BATCH), right])

    ones = jnp.ones((MODEL.num_layers, BATCH, MODEL.num_heads, length, length), jnp.float32)
    return jax.grad(loss)(ones)


def by_class(maps, classes, num_classes):
    """[B, L, T, T] -> [B, L, K, K] over the edges j < i."""
    one_hot = np.eye(num_classes)[classes] * (classes >= 0)[..., None]
    return np.einsum("blij,bix,bjy->blxy", maps * np.tri(maps.shape[-1], k=-1), one_hot, one_hot)


@pytest.mark.parametrize("loss", ["labels", "vocabulary"])
def test_flows_of_a_model_are_those_of_autodiff(params, prompts, loss):
    targets = prompts["targets"]
    names = targets["label_tokens"]
    candidates = np.isin(np.arange(MODEL.vocab_size), names) if loss == "labels" else np.ones(19, bool)
    maps = plain_maps(params, prompts["batch"]["tokens"], names[targets["labels"]], candidates)
    maps = np.abs(np.asarray(maps).sum(2)).swapaxes(0, 1)
    found = saliency_maps(params, prompts["batch"], MODEL, targets, loss=loss)
    np.testing.assert_allclose(found, maps, rtol=2e-4, atol=1e-6)
    if loss == "vocabulary":
        return
    sums, counts = flows(params, prompts["batch"], MODEL, prompts["classes"], targets)
    np.testing.assert_allclose(sums, by_class(maps, prompts["classes"], 3), rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(counts, by_class(np.ones_like(maps), prompts["classes"], 3))
    # With the loss at q alone nothing that reaches another token in the last layer can matter.
    assert np.all(np.asarray(sums)[:, -1, :2] == 0.0)
    assert np.all(np.asarray(sums)[:, -1, 2, :2] > 0.0)


def test_padding_and_labels_per_prompt_change_nothing(params, prompts):
    sums, counts = flows(params, prompts["batch"], MODEL, prompts["classes"], prompts["targets"])
    pad = lambda x, fill: np.pad(x, ((0, 0), (0, 2)), constant_values=fill)
    tokens = prompts["batch"]["tokens"]
    batch = {"tokens": pad(tokens, 7), "segment_ids": pad(np.ones_like(tokens), 0)}
    names = np.tile(prompts["targets"]["label_tokens"], (BATCH, 1))
    # Prompt 1 names its labels in another order.
    names[1], labels = names[1, ::-1].copy(), np.array([0, 0, 1], np.int32)
    targets = {"positions": prompts["targets"]["positions"], "label_tokens": names, "labels": labels}
    padded_sums, padded_counts = flows(params, batch, MODEL, pad(prompts["classes"], -1), targets)
    np.testing.assert_allclose(padded_sums, sums, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(padded_counts, counts)
    # What tokenizers call it, and everything as lists.
    batch = {"tokens": batch["tokens"].tolist(), "attention_mask": batch["segment_ids"].tolist()}
    lists = {name: value.tolist() for name, value in targets.items()}
    masked, _ = flows(params, batch, MODEL, pad(prompts["classes"], -1).tolist(), lists)
    np.testing.assert_array_equal(masked, padded_sums)


def test_losses_of_several_positions_are_summed(params, prompts):
    """Signed flows are linear in the loss; a row may have fewer positions than another."""
    batch, classes = prompts["batch"], prompts["classes"]
    names = prompts["targets"]["label_tokens"]
    places = np.array([[10, 4], [10, -1], [7, 8]], np.int32)
    labels = np.array([[0, 2], [2, -1], [1, 0]], np.int32)
    run = lambda p, y, **more: np.asarray(
        flows(
            params,
            batch,
            MODEL,
            classes,
            {"positions": p, "label_tokens": names, "labels": y},
            loss="vocabulary",
            signed=True,
            **more,
        )[0]
    )
    both = run(places, labels, per_head=True)
    first, second = (
        run(np.where(alone, places, -1), np.where(alone, labels, -1), per_head=True)
        for alone in ([[True, False]], [[False, True]])
    )
    assert both.shape == (BATCH, MODEL.num_layers, MODEL.num_heads, 3, 3)
    np.testing.assert_array_equal(second[1], 0.0)
    np.testing.assert_allclose(both[1], first[1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(both, first + second, rtol=1e-3, atol=1e-6)
    kept = run(places, labels, per_head=True, remat="layer")
    np.testing.assert_allclose(kept, both, rtol=1e-4, atol=1e-7)


def test_a_batch_in_parts_has_the_same_flows(params, prompts, monkeypatch):
    """What is kept of all of it would be too much: three parts of one sequence each, not one."""
    arguments = (params, prompts["batch"], MODEL, prompts["classes"], prompts["targets"])
    assert _checked_options("labels", "auto", MODEL, prepared(prompts["batch"], MODEL, "")).parts == 1
    whole = flows(*arguments)
    monkeypatch.setattr(saliency, "PART_BYTES", 0)
    monkeypatch.setattr(saliency, "PART_TOKENS", TOKENS)
    assert _checked_options("labels", "auto", MODEL, prepared(prompts["batch"], MODEL, "")).parts == BATCH
    for found, expected in zip(flows(*arguments), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_nan_is_told(params, prompts):
    broken = jax.tree.map(lambda x: x, params)
    broken["layers"]["mlp"]["up"] = broken["layers"]["mlp"]["up"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(UserError, match=r"the weights layers\.mlp\.up hold NaN"):
        flows(broken, prompts["batch"], MODEL, prompts["classes"], prompts["targets"])
    huge = jax.tree.map(lambda x: x, params)
    huge["final_norm"]["scale"] = huge["final_norm"]["scale"] * 3e38
    with pytest.raises(UserError, match="the logits are not finite"):
        flows(huge, prompts["batch"], MODEL, prompts["classes"], prompts["targets"])


def test_under_jit_values_are_believed(params, prompts):
    run = lambda tokens, classes, targets: flows(
        params, {"tokens": tokens}, MODEL, classes, targets, num_classes=3
    )
    inputs = (prompts["batch"]["tokens"], prompts["classes"], prompts["targets"])
    for found, expected in zip(jax.jit(run)(*inputs), run(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [pytest.param("sliding", marks=pytest.mark.slow), "nsa"])
def test_other_kinds_of_attention(prompts, kind):
    """Only what a layer sees is counted, and what cannot matter in the last layer is 0."""
    nsa = NSAConfig(block_len=4, stride=2, block_size=4, num_blocks=3, window=3, compress_width=8)
    attention = nsa if kind == "nsa" else SlidingAttentionConfig(window=4)
    config = dataclasses.replace(MODEL, attention=attention)
    weights = jax.jit(init_params, static_argnums=0)(config, jax.random.key(1))
    sums, counts = flows(weights, prompts["batch"], config, prompts["classes"], prompts["targets"])
    assert np.all(np.asarray(sums)[:, -1, :2] == 0.0)
    assert np.all(np.asarray(sums)[:, 0, 1, 0] > 0.0)
    # NSA's compressed blocks and its window reach every token here; a sliding window does not.
    seen = np.tri(TOKENS) - (np.tri(TOKENS, k=-config.sliding.window) if kind == "sliding" else 0.0)
    seen = np.broadcast_to(seen, (BATCH, MODEL.num_layers, TOKENS, TOKENS))
    np.testing.assert_array_equal(counts, by_class(seen, prompts["classes"], 3))


def test_shares_of_the_edge_sets():
    # Classes: 0 words, 1 and 2 label words, 3 the target, 4 a sink.
    roles = Roles(labels=(1, 2), query=3, sink=4, classes=5)
    sums = np.arange(25, dtype=np.float32).reshape(1, 5, 5)
    counts = np.full((1, 5, 5), 2.0, np.float32)
    counts[0, 0, 0] = 0.0
    means, shares = flow_shares(sums, counts, roles)
    wp = sums[0, 1:3, :4].sum() / 16
    pq = sums[0, 3, 1:3].sum() / 4
    ww = (sums[0, 0, :4].sum() + sums[0, 3, 0] + sums[0, 3, 3]) / 10
    sink = (sums[0, 4].sum() + sums[0, :4, 4].sum()) / 18
    for name, value in (("wp", wp), ("pq", pq), ("ww", ww), ("sink", sink)):
        np.testing.assert_allclose(means[name], [value], rtol=1e-6)
    np.testing.assert_allclose(
        [shares[n][0] for n in ("wp", "pq", "ww")], np.array([wp, pq, ww]) / (wp + pq + ww)
    )
    nothing = flow_shares(np.zeros((2, 5, 5)), np.zeros((2, 5, 5)), roles)
    assert all(np.all(values == 0.0) for part in nothing for values in part.values())


def test_mistakes_are_told_in_one_line(params, prompts):
    batch, classes, targets = prompts["batch"], prompts["classes"], prompts["targets"]
    beyond = {"tokens": np.full_like(batch["tokens"], MODEL.vocab_size)}
    with pytest.raises(
        UserError, match=f"flows: the batch holds token {MODEL.vocab_size}, the embedding has"
    ):
        flows(params, beyond, MODEL, classes, targets)
    with pytest.raises(UserError, match="targets lack labels, positions"):
        flows(params, batch, MODEL, classes, {"label_tokens": targets["label_tokens"]})
    with pytest.raises(UserError, match=r"label_tokens \[C\] or \[3, C\]"):
        flows(params, batch, MODEL, classes, targets | {"label_tokens": np.zeros((2, 3), np.int32)})
    with pytest.raises(UserError, match="classes are"):
        flows(params, batch, MODEL, classes[:, :4], targets)
    with pytest.raises(UserError, match="no token has a class"):
        flows(params, batch, MODEL, np.full_like(classes, -1), targets)
    with pytest.raises(UserError, match="num_classes"):
        jax.jit(lambda c: flows(params, batch, MODEL, c, targets))(classes)


def wrong(prompts, **changes):
    """Arguments of flows with one thing changed."""
    arguments = {
        "batch": prompts["batch"],
        "config": MODEL,
        "classes": prompts["classes"],
        "targets": prompts["targets"],
    }
    targets = {name: changes.pop(name) for name in tuple(changes) if name in prompts["targets"]}
    return arguments | {"targets": prompts["targets"] | targets} | changes


PAD = np.array([[1] * (TOKENS - 1) + [0]] * BATCH, np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": [10, 11, 10]}, r"positions\[1\] = 11 is outside of 0..10"),
        ({"positions": [10, -1, 10]}, r"positions\[1\] = -1 is outside"),
        ({"labels": [0, 3, 1]}, r"labels\[1\] = 3 is outside of 0..2"),
        ({"label_tokens": [5, 19, 2]}, r"label_tokens\[1\] = 19 is outside of 0..18"),
        ({"label_tokens": [5, 2, 5]}, "two labels of sequence 0 are the same token 5"),
        ({"label_tokens": [5], "labels": [0, 0, 0]}, "needs two at least"),
        ({"labels": [0.0, 1.0, 1.0]}, "labels are whole numbers"),
        ({"positions": [[10], [-1], [10]], "labels": [[0], [1], [1]]}, "a position without a label"),
        ({"label_tokens": []}, "label_tokens are empty"),
        ({"positions": [[-1]] * 3, "labels": [[-1]] * 3}, "every position is -1"),
        ({"num_classes": 100_000}, "100000 classes for 11 tokens"),
        ({"num_classes": 2}, r"classes\[0, 10\] = 2 is outside of -1..1"),
        ({"classes": np.full((BATCH, TOKENS), -2)}, "no token has a class"),
        ({"reduction": "abs_of_sums"}, "reduction must be one of abs_of_sum, sum_of_abs, mean_abs"),
        ({"loss": "label"}, "loss must be one of labels, vocabulary"),
        ({"nsa_edges": "tokens"}, "nsa_edges must be one of"),
        ({"batch": {"ids": [[1]]}}, "the batch has no tokens, only ids"),
        ({"batch": {"tokens": [[1, 2], [3]]}}, "tokens of the batch is no array of numbers"),
        ({"batch": {"tokens": [[0.5, 1.0]]}}, "tokens are int"),
    ],
)
def test_values_are_checked_before_anything_is_compiled(prompts, changes, message):
    arguments = wrong(prompts, **changes)
    with pytest.raises(UserError, match=message) as error:
        flows({}, **arguments)
    assert "\n" not in str(error.value)


def test_other_types_are_told_in_one_line(prompts):
    for count in (3.5, True):
        with pytest.raises(UserError, match=f"num_classes is a whole number, not {count}"):
            checked_classes(prompts["classes"], count, prompts["batch"], "flows")
    with pytest.raises(UserError, match="per_head is True or False, not 'no'"):
        check_flag("per_head", "no", "flows")


def test_a_table_of_positions_has_an_end(prompts):
    """More tokens than it has rows are refused: JAX would take the last row again and again."""
    learned = dataclasses.replace(MODEL, position=LearnedPositions(), max_length=TOKENS - 1)
    for call in (lambda: flows({}, **wrong(prompts, config=learned)), lambda: prepare(prompts, learned)):
        with pytest.raises((UserError, ValueError), match=r"a text of 11 tokens, and .* positions for 10"):
            call()
    packed = {"segment_ids": np.where(np.arange(TOKENS) < 4, 1, 2)[None].repeat(BATCH, 0)}
    prepare(prompts, learned, **packed)  # two texts, each short enough
    with pytest.raises(ValueError, match="a text of 12 tokens"):
        prepare(prompts, learned, positions=np.full((BATCH, TOKENS), 11))


def prepare(prompts, config, **more):
    return prepare_batch({**prompts["batch"], **more}, config)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"segment_ids": PAD}, r"positions\[0, 0\] = 10 stands in padding"),
        ({"attention_mask": PAD, "segment_ids": PAD}, "attention_mask and segment_ids both say"),
        ({"attention_mask": PAD[:, None, :, None]}, "attention_mask is"),
        ({"images": np.zeros((1, 1))}, "the model has no vision"),
        ({"segment_ids": PAD[:, :3]}, r"segment_ids are \[\d+, 3\], tokens \[\d+, \d+\]"),
        ({"positions": PAD * 1.0}, "positions are whole numbers, not float64"),
        ({"attention_masks": PAD}, "the model reads no attention_masks of the batch"),
    ],
)
def test_padding_and_images_are_checked(prompts, more, message):
    with pytest.raises(UserError, match=message):
        flows({}, **wrong(prompts, batch=prompts["batch"] | more))
    if more.get("segment_ids") is PAD and len(more) == 1:
        with pytest.raises(UserError, match=r"classes\[0, 10\] = 2 is of padding"):
            flows({}, **wrong(prompts, batch=prompts["batch"] | more, positions=[9, 9, 9]))
