"""The icl task from a model folder to results.json, and its pictures."""

import dataclasses
import json
import re
import warnings

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxlab.checkpoints import open_model, save_model
from jaxlab.checkpoints.formats.orbax_folder import OrbaxFolder
from jaxlab.config import dump
from jaxlab.data.episodes import EpisodesConfig, EpisodesSource
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.icl import (
    Blocking,
    ChunkStore,
    Faithfulness,
    FlowShares,
    ManyShot,
    make_prompts,
    pack_maps,
    token_texts,
    unpack_maps,
)
from jaxlab.icl.analyses.answers import accuracy
from jaxlab.icl.analyses.base import deviation, mean
from jaxlab.icl.analyses.blocking import _measure
from jaxlab.models import ModelConfig, init_params
from jaxlab.reporting.papers.label_words import plots as icl_plots
from jaxlab.tasks import execute, main
from jaxlab.tasks import icl as analyse

EPISODES = EpisodesConfig(longer_from=(5,), classes=2, shots=2, sequence_length=16)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("icl") / "model"
    tokenizer = EpisodesSource(EPISODES).tokenizer()
    size = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 16}
    model = ModelConfig(vocab_size=tokenizer.get_vocab_size(), **size, tie_embeddings=False)
    save_model(folder, model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(3)), tokenizer)
    data = EPISODES
    return analyse.Config(
        model=str(folder), data=data, examples=8, batch_size=4, seeds=(1, 2), blocking=Blocking(layers=(1, 2))
    )


def test_results_and_pictures(config, tmp_path):
    done = execute("icl", config, outputs=tmp_path)
    results = json.loads((done.path / "results.json").read_text())
    assert results["examples"] == 16
    assert results["chance"] == 0.5
    assert 0.0 <= results["accuracy"] <= 1.0
    shares = np.array([results["flows"]["share"][name] for name in ("wp", "pq", "ww")])
    np.testing.assert_allclose(shares.sum(0), 1.0, rtol=1e-6)
    assert results["flows"]["mean"]["wp"][-1] == 0.0
    assert results["flows"]["edges_per_prompt"]["pq"] == [4.0, 4.0]
    table = results["blocking"]["table"]
    assert len(table) == 8
    rows = {(row["words"], row["where"], row["layers"]): row for row in table}
    # Blocked in the last layer alone, other words than q do not matter.
    assert rows["label", "last", 1]["label_loyalty"] == rows["label", "last", 1]["word_loyalty"] == 1.0
    assert rows["label", "first", 2] == rows["label", "last", 2] | {"where": "first"}
    prompt = results["figure1"]
    assert len(prompt["tokens"]) == results["tokens"] == EPISODES.prompt_length - 1
    assert prompt["tokens"][prompt["query"]] == ":"
    assert len(prompt["labels"]) == 4
    assert prompt["answer"] in [prompt["tokens"][at] for at in prompt["labels"]]
    maps = unpack_maps(prompt["maps"])
    whole = np.load(done.path / "records" / "figure1.npz")["maps_1"][0]
    assert maps.shape == whole.shape
    lower = np.tril(whole, k=-1)
    strong = lower > 0.01 * lower.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(maps[strong], lower[strong], rtol=0.04)
    for draw in (icl_plots.flow_shares_figure, icl_plots.blocking_figure, icl_plots.prompt_figure):
        draw(results).savefig(tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").stat().st_size > 5000


def test_results_stay_small(monkeypatch):
    """Two models whose maps and pairs of classes alone would take more."""
    monkeypatch.setattr(analyse, "MOST_BYTES", 20_000)
    rng = np.random.default_rng(0)
    maps = [np.tril(rng.random((2, 100, 100))).astype(np.float32) for _ in range(2)]
    models = [
        {
            "flows": {"pairs": rng.random((2, 20, 20)).tolist(), "share": [1.0]},
            "figure1": {"maps": pack_maps(x)},
        }
        for x in maps
    ]
    results = {**models[0], "after": models[1]}
    with pytest.warns(UserNote, match=r"0.02 MB without flows.pairs, the weakest flows of figure1; records/"):
        analyse._made_to_fit(results, models)
    assert len(json.dumps(results, indent=2)) < 20_000
    assert results["flows"] == {"share": [1.0]} == results["after"]["flows"]
    for one, whole in zip((results, results["after"]), maps, strict=True):
        found = unpack_maps(one["figure1"]["maps"])
        assert 0.0 < one["figure1"]["maps"]["least"] < 0.9
        strong = np.tril(whole, -1) > 0.95 * whole.max()
        np.testing.assert_allclose(found[strong], whole[strong], rtol=0.02)
    with warnings.catch_warnings(action="error"):
        assert analyse._made_to_fit({"flows": {"pairs": [1.0]}}, []) == {"flows": {"pairs": [1.0]}}


def test_lessons_of_episodes_are_not_asked(config):
    source = make_prompts(EPISODES, open_model(config.model), split="validation")
    lessons = source.lessons(1, per_class=4)
    (asked,) = source.batches(1, 8, 8)
    assert not (lessons.batch["tokens"] == asked.batch["tokens"]).all(1).any()


def test_check_reads_no_parameters(config, monkeypatch):
    monkeypatch.setattr(OrbaxFolder, "read", None)
    found = analyse.check(config)
    assert found["prompts"] == 16
    assert found["parameter_bytes_per_device"] == 4 * (2 * 76 * 16 + 2 * (4 * 256 + 3 * 256 + 2 * 16) + 16)
    assert 0 < found["temporary_bytes_per_device"] < 1 << 24


def test_mistakes(config):
    with pytest.raises(ConfigError, match="model"):
        analyse.Config()
    with pytest.raises(ConfigError, match="seeds"):
        dataclasses.replace(config, seeds=(1, 1))
    with pytest.raises(ConfigError, match="layers"):
        Blocking(layers=(0,))
    with pytest.raises(UserError, match="the model has 2 layers, not 3"):
        analyse.check(dataclasses.replace(config, blocking=Blocking(layers=(1, 3))))
    with pytest.raises(UserError, match="the model has 2 layers, not 5"):  # asked for, it is not replaced
        analyse.check(dataclasses.replace(config, blocking=Blocking(layers=(5,))))
    with pytest.warns(UserNote, match="the model has 2 layers, so 1 in place of 5, the default"):
        analyse.check(dataclasses.replace(config, analyses=("blocking",), blocking=Blocking()))
    with pytest.raises(UserError, match="vocabulary"):
        analyse.check(dataclasses.replace(config, blocking=Blocking(layers=(1,), top_words=77)))


def test_prompts_are_cut_after_the_last_position(config):
    source = make_prompts(config.data, open_model(config.model))
    batches = list(source.batches(5, 6, 4))
    assert [len(prompts.labels) for prompts in batches] == [4, 2]
    first = batches[0]
    assert first.batch["tokens"].shape == first.classes.shape == (4, source.length)
    assert np.all(first.positions == source.length - 1)
    assert np.all(first.classes[:, -1] == source.roles.query)
    again = source.batches(5, 4, 4)[0]
    np.testing.assert_array_equal(first.batch["tokens"], again.batch["tokens"])
    assert token_texts(np.array([104, 105, 10]), None) == ["h", "i", "\\x0a"]


def byte_tokenizer():
    return None


def other_tokenizer():
    """As many tokens as the episodes have, each another word."""
    words = {f"w{token}": token for token in EpisodesSource(EPISODES).tokenizer().get_vocab().values()}
    return Tokenizer(models.WordLevel(words, unk_token="w0"))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_tokenizer, "reads bytes, the data holds words"),
        (other_tokenizer, "is token .* of the model"),
    ],
)
def test_a_model_of_other_tokens_is_refused_before_it_is_read(config, tmp_path, tokenizer, message, capsys):
    model = open_model(config.model).config
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(3))
    save_model(tmp_path / "other", model, params, tokenizer())
    (tmp_path / "icl.yaml").write_text(dump(dataclasses.replace(config, model=str(tmp_path / "other"))))
    for option in ([], ["--check"]):
        words = ["icl", str(tmp_path / "icl.yaml"), "--outputs", str(tmp_path / "outputs"), *option]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("outputs/icl/*/results.json"))


def test_a_stopped_run_goes_on_where_it_was(config, tmp_path, monkeypatch):
    """Stopped in the second analysis, and again in the third; what is measured is not measured again."""
    whole = execute("icl", config, outputs=tmp_path / "whole").results
    measured, limit = [], 0

    def watched(cls):
        plain = cls.measure

        def measure(self, study, chunk, rng):
            if len(measured) == limit:
                raise KeyboardInterrupt
            measured.append(self.name)
            return plain(self, study, chunk, rng)

        monkeypatch.setattr(cls, "measure", measure)

    for cls in (FlowShares, Blocking):
        watched(cls)
    for stop in (1, 5):
        limit = stop
        with pytest.raises(KeyboardInterrupt):
            execute("icl", config, outputs=tmp_path / "stopped")
    limit = 100
    done = execute("icl", config, outputs=tmp_path / "stopped")
    assert measured == ["flows"] * 4 + ["blocking"] * 4
    for results in (whole, done.results):
        del results["seconds"]
    assert done.results == whole
    assert sorted(file.name for file in (done.path / "records").iterdir()) == [
        f"{name}.npz" for name in ("answers", "blocking", "figure1", "flows")
    ]


def test_a_damaged_record_is_one_line(config, tmp_path):
    store = ChunkStore(tmp_path)
    store.write("flows", 1, 0, {"sums": np.ones(3)})
    (tmp_path / "flows-1-0.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UserError, match=r"flows-1-0\.npz: damaged .*remove it"):
        store.read("flows", 1, 0)


def test_a_model_without_any_prediction_is_one_line(config, tmp_path):
    opened = open_model(config.model)
    params = opened.read()
    params["final_norm"] = jax.tree.map(lambda x: x * np.nan, params["final_norm"])
    save_model(tmp_path / "nan", opened.config, params, opened.tokenizer)
    broken = dataclasses.replace(config, model=str(tmp_path / "nan"), analyses=("blocking",))
    with (
        pytest.warns(UserNote, match="final_norm"),
        pytest.raises(UserError, match="no prompt has a prediction, the logits of all 16 hold NaN"),
    ):
        execute("icl", broken, outputs=tmp_path)


def test_one_prompt_with_nan_is_left_out(config, tmp_path, quick):
    """A token whose row of the embedding is NaN stands in one prompt: all others are as without it."""
    opened = open_model(config.model)
    params = opened.read()
    chunks = make_prompts(config.data, opened).batches(1, 8, config.batch_size)
    tokens = np.concatenate([chunk.batch["tokens"] for chunk in chunks])
    # In the first chunk: that alone is read by three of the analyses.
    once = [t for t in np.unique(tokens[:4]) if (tokens == t).any(1).sum() == 1]
    at = int(np.flatnonzero((tokens == once[0]).any(1))[0])
    found = {}
    for name in ("sound", "broken"):
        if name == "broken":
            table = params["embedding"]["table"].at[once[0]].set(np.nan)
            params = {**params, "embedding": {"table": table}}
        save_model(tmp_path / name, opened.config, params, opened.tokenizer)
        asked = dataclasses.replace(
            config,
            model=str(tmp_path / name),
            analyses=("flows", "faithfulness", "heads", "many_shot"),
            many_shot=ManyShot(shots=(2,)),
            faithfulness=Faithfulness(layers=(1,)),
            seeds=(1,),
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserNote)
            found[name] = execute("icl", asked, outputs=tmp_path)
    notes = [str(note.message) for note in told]
    for name in ("flows", "faithfulness", "heads", "many_shot"):
        assert f"{name}: 1 prompts are left out, their flows hold NaN or infinity" in notes
        assert [found[one].results[name]["left_out"] for one in found] == [0, 1]
    assert found["broken"].results["heads"]["prompts"] == 3
    assert np.isfinite(found["broken"].results["heads"]["scores"]["function_vector"]).all()
    assert np.isfinite(found["broken"].results["faithfulness"]["of_means"]["spearman"])
    sums = {}
    for name, run in found.items():
        with np.load(run.path / "records" / "flows.npz") as file:
            sums[name] = file["sums_1"]
    assert np.isnan(sums["broken"][at]).all()
    others = np.arange(8) != at
    np.testing.assert_array_equal(sums["broken"][others], sums["sound"][others])


def test_prompts_without_a_prediction_count_nowhere():
    """Statistics are over the other prompts and seeds; what no prompt defines is NaN, in JSON null."""
    predicted, label = np.array([1, -1, 0]), np.array([1, 1, 1])
    assert accuracy(predicted, label) == 0.5
    assert np.isnan(accuracy(predicted[1:2], label[1:2]))
    seed = {
        "predicted": np.array([[1, 0, -1], [-1, 1, -1], [0, 0, -1]]),
        "label": label,
        "word_loyalty": np.array([[1.0, 0.5, np.nan], [np.nan, np.nan, np.nan], [1.0, 0.0, np.nan]]),
    }
    found = {name: _measure(seed, name) for name in ("accuracy", "label_loyalty", "word_loyalty")}
    np.testing.assert_array_equal(found["accuracy"], [0.5, 1 / 3, np.nan])
    np.testing.assert_array_equal(found["label_loyalty"], [1.0, 0.5, np.nan])
    np.testing.assert_array_equal(found["word_loyalty"], [1.0, 0.25, np.nan])
    by_seed = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(mean(by_seed), [2.0, np.nan])
    np.testing.assert_allclose(deviation(by_seed), [np.sqrt(2.0), np.nan])


def test_check_counts_the_dtype_that_is_loaded(config):
    whole, half = (
        analyse.check(dataclasses.replace(config, dtype=dtype, analyses=("blocking",)))
        for dtype in (None, "bfloat16")
    )
    assert whole["parameter_dtypes"] == ["float32"]
    assert half["parameter_dtypes"] == ["bfloat16"]
    assert half["parameter_bytes_per_device"] * 2 == whole["parameter_bytes_per_device"]
    assert whole["fits"] is True
    assert whole["device_bytes"] > 1 << 30


def test_check_says_when_the_device_is_too_small(config, monkeypatch):
    monkeypatch.setattr(analyse, "_device_memory", lambda: 1000)
    with pytest.warns(UserNote, match=r"are needed on a device and it has .*; lower batch_size"):
        assert analyse.check(config)["fits"] is False
