"""The task evaluate on models whose answers are known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.app.runs import Run
from jaxlab.checkpoints import save_model
from jaxlab.checkpoints.formats.orbax_folder import OrbaxFolder
from jaxlab.config import build
from jaxlab.data.needle_words import WORDS, needle_tokenizer
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import count_params
from jaxlab.tasks import evaluate
from tests.models.tiny import NSA, draw_params, make_config

MODEL = make_config(vocab_size=256, num_layers=1)
LONG = dataclasses.replace(MODEL, max_length=512)


@pytest.fixture
def make(tmp_path):
    """A function from a model, its parameters and changes of the config to the config."""
    (tmp_path / "text.py").write_bytes(b"abcdefgh" * 60)

    def make(model, params, **changes):
        save_model(tmp_path / "model", model, params, overwrite=True)
        text = {"path": str(tmp_path / "text.py"), "sequence_length": 8, "holdout_every": 2}
        base = {"model": str(tmp_path / "model"), "data": text, "batch_size": 4, "batches": 2}
        return build(evaluate.Config, {**base, **changes})

    return make


def test_a_model_without_knowledge_pays_the_logarithm_of_the_vocabulary(make, tmp_path):
    config = make(MODEL, jax.tree.map(jnp.zeros_like, draw_params(MODEL)), position_buckets=3)
    results = evaluate.run(config, Run(tmp_path, "zero"))
    assert results["loss"] == pytest.approx(math.log(256), rel=1e-6)
    assert results["perplexity"] == pytest.approx(256, rel=1e-5)
    assert results["bits_per_token"] == pytest.approx(8, rel=1e-6)
    assert results["exact_match"] == 0
    assert (results["sequences"], results["targets"]) == (8, 8 * 7)
    assert [(b["first"], b["last"], b["targets"]) for b in results["by_position"]] == [
        (1, 3, 24),
        (4, 5, 16),
        (6, 7, 16),
    ]
    assert results["attended_tokens"] == (8 + 1) / 2
    assert "nsa" not in results


def test_a_model_that_knows_the_next_byte_is_always_right(make, tmp_path):
    """The head alone answers byte b with b + 1."""
    model = make_config(
        vocab_size=256,
        width=256,
        num_layers=1,
        tie_embeddings=False,
        num_heads=1,
        num_kv_heads=1,
        mlp_width=1,
    )
    params = jax.tree.map(jnp.zeros_like, draw_params(model))
    params["embedding"]["table"] = jnp.eye(256)
    params["final_norm"]["scale"] = jnp.full(256, 0.25)
    params["head"]["table"] = jnp.roll(jnp.eye(256), 1, axis=1)  # x of byte b times this is largest at b + 1
    config = make(model, params, position_buckets=100)
    results = evaluate.run(config, Run(tmp_path, "bigram"))
    # The held-out crops start at multiples of 8: they do not hold the step from h to a.
    assert results["exact_match"] == 1
    logit = 0.25 / math.sqrt(1 / 256 + 1e-5)  # what the norm makes of the one
    right = math.log(1 + 255 * math.exp(-logit))
    assert results["loss"] == pytest.approx(right, rel=1e-4)
    assert len(results["by_position"]) == 7  # no more buckets than positions


def test_nsa_tells_what_it_read(make, tmp_path):
    model = make_config("nsa", vocab_size=256, num_layers=1, attention_bias=False)
    params = draw_params(model)
    config = make(model, params, batches=1)
    told = evaluate.run(config, Run(tmp_path, "nsa"))["nsa"]
    assert (told["length"], told["block_size"]) == (8, NSA.block_size)
    assert [(entry["layer"], entry["group"]) for entry in told["layers"]] == [(0, 0), (0, 1)]
    first = next(iter(evaluate.make_source(config.data).held_out_batches(4, 1, "test")))
    chosen = np.asarray(evaluate.measure_batch(params, first, model)[3])  # compiled by the run
    for entry in told["layers"]:
        assert entry["queries"] == list(range(8))
        for t, blocks in zip(entry["queries"], entry["chosen"], strict=True):
            assert blocks == [b for b in chosen[0, entry["group"], t] if b >= 0]
            assert set(blocks) == set(range(t // NSA.block_size + 1))
    assert told["neighbour_overlap"] == [None]  # two blocks in all: nothing to choose


def test_a_dense_model_is_measured_as_if_it_read_less(make, tmp_path):
    dense, sparse, whole = (
        evaluate.run(make(MODEL, draw_params(MODEL), **changes), Run(tmp_path, "sparse"))
        for changes in (
            {},
            {"sparsity": {"kind": "h2o", "block_size": 1, "num_blocks": 3}},
            {"sparsity": {"kind": "h2o", "block_size": 8}},
        )
    )
    assert sparse["attended_tokens"] == (1 + 2 + 6 * 3) / 8
    assert abs(sparse["loss"] - dense["loss"]) > 1e-3
    assert whole["loss"] == pytest.approx(dense["loss"], rel=1e-6)
    # Bytes 1 and 2 are predicted from one and two tokens.
    assert sparse["by_position"][1]["loss"] == pytest.approx(dense["by_position"][1]["loss"], rel=1e-5)


def test_needles_are_counted_by_depth(make, tmp_path):
    model = make_config(vocab_size=len(WORDS), num_layers=1, max_length=40)
    data = {"kind": "needle", "sequence_length": 40, "questions": 4, "depths": 2}
    config = make(model, draw_params(model), data=data)
    save_model(tmp_path / "model", model, draw_params(model), needle_tokenizer(), overwrite=True)
    found = evaluate.run(config, Run(tmp_path, "needle"))["needle"]
    # 36 tokens before the question hold seven facts; the first one stands after a spare word.
    assert found["length"] == 40
    assert [at["distance"] for at in found["depths"]] == [39 - 4, 39 - 34]
    assert [at["sequences"] for at in found["depths"]] == [4, 4]


def test_check_reads_no_parameter(make, monkeypatch):
    config = make(MODEL, draw_params(MODEL))
    monkeypatch.setattr(OrbaxFolder, "read", None)
    report = evaluate.check(config)
    assert report["parameters"] == count_params(draw_params(MODEL))
    assert report["bytes_per_device"]["parameters"] == 4 * report["parameters"]
    assert report["bytes_per_device"]["total"] > 4 * report["parameters"]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (make_config(num_layers=1), {}, "raise model.vocab_size or take other data"),
        (dataclasses.replace(MODEL, max_length=7), {}, "exceed the model's max_length 7"),
        (MODEL, {"batch_size": 99}, "the test split of the data holds no full batch of 99"),
        (LONG, {"data": {"kind": "episodes"}}, "the model reads bytes, the data holds words"),
        (LONG, {"data": {"kind": "digits", "mixture": {"image_words": 1.0}}}, "has no vision"),
        (
            LONG,
            {"data": {"kind": "digits"}, "sparsity": {"kind": "quest"}},
            "quest reads one whole text a row and the data has segments",
        ),
        (
            make_config("nsa", vocab_size=256, num_layers=1),
            {"sparsity": {"kind": "quest"}},
            "quest is for models whose layers all have full attention",
        ),
    ],
)
def test_data_that_is_not_for_the_model_is_refused(make, tmp_path, model, changes, message):
    config = make(model, draw_params(model), **changes)
    for task in (evaluate.check, lambda c: evaluate.run(c, Run(tmp_path, "refused"))):
        with pytest.raises(UserError, match=message):
            task(config)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"model": ""}, "model"), ({"split": "train"}, "split"), ({"batches": 0}, "batches")],
)
def test_impossible_configs_name_the_key(changes, key):
    with pytest.raises(ConfigError) as raised:
        build(evaluate.Config, {"model": "somewhere", **changes})
    assert raised.value.key == key
