"""The task train, end to end on a few bytes: what it leaves behind, where it may begin, what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.app.runs import Run
from jaxlab.checkpoints import load_model, open_model, save_model
from jaxlab.config import build
from jaxlab.data.digits_words import digits_tokenizer
from jaxlab.errors import ConfigError, UserError
from jaxlab.losses import target_losses
from jaxlab.models import RopeConfig, abstract_params, count_params
from jaxlab.models.sharding import MeshConfig, make_mesh
from jaxlab.tasks import execute, train
from jaxlab.training.optimizer import make_optimizer
from jaxlab.training.state import find_initial, init_state, read_initial, state_shardings
from tests.models.tiny import draw_params, make_config, make_params, run_model

MODEL = {"width": 8, "num_layers": 1, "num_heads": 2, "mlp_width": 8, "max_length": 8}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 3)
    return folder


def make(text, **changes):
    base = {
        "model": MODEL,
        "data": {"path": str(text), "sequence_length": 8, "holdout_every": 4},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
        "mesh": {"data": 1},
        "steps": 5,
        "batch_size": 4,
        "log_every": 2,
        "eval_every": 3,
        "eval_batches": 2,
    }
    return build(train.Config, {**base, **changes})


def test_a_run_leaves_metrics_results_and_a_model_that_reads_back(text, tmp_path):
    config = make(text)
    result = execute("train", config, outputs=tmp_path / "outputs", name="tiny")
    assert result.path.parent.name == "train"
    records = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "loss" in r, "eval_loss" in r) for r in records] == [
        (2, True, False),
        (3, False, True),
        (4, True, False),
        (5, True, False),
        (5, False, True),
    ]
    for record in (records[2], result.results):
        assert record["tokens_per_second"] > 0
        assert 0 < record["mfu"] < 1
    assert records[0]["learning_rate"] == pytest.approx(0.01)
    assert records[3]["learning_rate"] == pytest.approx(0.001)

    model, params, tokenizer = load_model(result.path / result.results["model"])
    assert (model, tokenizer) == (config.model, None)
    assert result.results["parameters"] == count_params(params)
    assert result.results["tokens_per_step"] == 32
    # The held-out loss of the parameters on disk is the one that the run measured.
    source = train.make_source(config.data)
    sums = np.zeros(2)
    for batch in source.held_out_batches(4, 2, "test"):
        logits, batch = run_model(params, batch, model)[0], jax.tree.map(jnp.asarray, batch)
        losses, mask = target_losses(logits, batch)
        sums += [np.sum(losses, where=np.asarray(mask)), np.sum(mask)]
    assert result.results["test"]["eval_loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_check_counts_without_making_a_parameter(text, monkeypatch):
    monkeypatch.setattr(train, "init_state", None)
    estimate = {"mfu": 0.5, "device": "H100"}
    config = make(text, mesh={"data": 2, "fsdp": 2}, accumulation=1, estimate=estimate)
    report = train.check(config)
    parameters = count_params(abstract_params(config.model))
    assert report["parameters"] == parameters
    assert report["devices"] == {"data": 2, "fsdp": 2, "model": 1, "context": 1, "expert": 1}
    sizes = report["bytes_per_device"]
    assert (
        sizes["parameters"] == 4 * parameters // 2
    )  # every tensor of this model has an axis that FSDP splits
    assert sizes["optimizer"] == 2 * sizes["parameters"] + 2 * 4  # two moments, two counters
    assert sizes["total"] > sizes["parameters"] + sizes["optimizer"]
    assert sizes["temporary"] > 0
    # Gradients are summed over both axes that split examples; parts of weights are gathered over one alone.
    rows = {(row["kind"], row["axes"]): row for row in report["collectives_per_step"]}
    assert rows["all-gather", "fsdp"]["bytes"] >= 2 * parameters
    assert ("all-gather", "data") not in rows
    assert sum(row["bytes"] for (kind, _), row in rows.items() if kind == "all-reduce") >= 4 * parameters // 2
    assert report["collective_bytes_per_step"] == sum(row["bytes"] for row in rows.values())
    expected = report["expected"]
    assert (expected["peak_flops"], expected["mfu"]) == (4 * 989e12, 0.5)  # of the stated device
    assert expected["seconds_per_step"] == report["flops_per_step"] / (0.5 * expected["peak_flops"])
    assert expected["seconds"] == config.steps * expected["seconds_per_step"]
    lines = train.check_table(report).splitlines()
    assert any(line.split()[:3] == ["all-gather", "over", "fsdp"] for line in lines)


def test_a_utilisation_above_one_is_refused(text):
    with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
        make(text, estimate={"mfu": 1.5})


def test_a_mesh_of_more_devices_than_there_are(text):
    with pytest.raises(UserError, match=r"needs 256 devices, .* are here; --check compiles for up to 4096"):
        train.check(make(text, mesh={"data": 256}, batch_size=256, accumulation=1))


def initial_state(folder, model, text):
    config = make(text)
    optimizer = make_optimizer(config.optimizer, model, 5)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2))
    initial = find_initial(open_model(folder), model, train.make_source(config.data))
    shardings, loaded = state_shardings(model, optimizer, mesh), read_initial(initial, model, mesh)
    return init_state(model, optimizer, 7, shardings, loaded, dense=initial.dense)


def test_a_vision_language_model_starts_from_a_language_model(text, tmp_path):
    vlm = make_config("vision", num_layers=1)
    base = draw_params(vlm.language)
    save_model(tmp_path / "base", vlm.language, base)
    state = initial_state(tmp_path / "base", vlm, text)
    fresh = make_params(vlm, jax.random.key(7))
    for name, tree in state.params.items():
        expected = fresh if name in ("vision", "projector") else base
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), tree, expected[name]
        )
    up = state.params["layers"]["mlp"]["up"]
    assert up.sharding.shard_shape(up.shape) == (1, 6, 8)
    assert int(state.step) == 0


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({}, {"mlp_width": 9}, r"layers\.mlp\.down is \(1, 8, 12\), the model to train says \(1, 9, 12\)"),
        ({}, {"tie_embeddings": False}, r"lacks head\.table"),
        ({"mlp_bias": True}, {}, r"has an unexpected layers\.mlp\.down_bias"),
        ({"activation": "relu"}, {}, "its activation is relu, of the model to train silu"),
        (
            {"position": RopeConfig(dim=2)},
            {},
            "its position is rotary over 2 .* the model to train rotary over 4",
        ),
    ],
)
def test_an_initial_model_that_does_not_fit_is_refused_in_one_line(text, tmp_path, theirs, ours, message):
    model = make_config(num_layers=1, **theirs)
    save_model(tmp_path / "base", model, draw_params(model))
    with pytest.raises(UserError, match=message) as raised:
        find_initial(
            open_model(tmp_path / "base"),
            make_config(num_layers=1, **ours),
            train.make_source(make(text).data),
        )
    assert "\n" not in str(raised.value)


def test_an_initial_model_of_other_words_is_refused(text, tmp_path):
    model = make_config(num_layers=1)
    save_model(tmp_path / "base", model, draw_params(model), digits_tokenizer())
    with pytest.raises(UserError, match="the model reads words, the data holds bytes"):
        find_initial(open_model(tmp_path / "base"), model, train.make_source(make(text).data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 4}, "batch_size": 6}, "a part of 6 sequences cannot be split over 4 devices"),
        ({"mesh": {"data": 4}, "accumulation": 2}, "a part of 2 sequences cannot be split over 4 devices"),
        ({"model": MODEL | {"vocab_size": 100}}, "raise model.vocab_size"),
        ({"batch_size": 64}, "holds no full batch of 64; lower batch_size, lower data.holdout_every"),
        ({"init_from": "nowhere"}, "nowhere: no such model"),
        ({"model": MODEL | {"width": 10**9}}, r"optimizer would take .*e\+.. bytes, more than any machine"),
        (
            {"model": MODEL | {"mlp_width": 2 * 10**9, "num_layers": 10**4}},
            "more than any machine has; lower the model's sizes",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_made(text, changes, message):
    with pytest.raises(UserError, match=message):
        train.prepare(make(text, **changes))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"accumulation": 3}, "accumulation"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"model": MODEL | {"vocab_size": 10**10}}, "model.vocab_size"),
        ({"model": MODEL | {"num_layers": 10**8}}, "model.num_layers"),
        ({"data": {"kind": "needle", "sequence_length": 10**9}}, "data.sequence_length"),
        ({"data": {"kind": "episodes", "shots": 10**9}}, "data.shots"),
        ({"steps": 2**31}, "steps"),
        ({"spikes": {"sigmas": 0}}, "spikes.sigmas"),
        ({"spikes": {"window": 1}}, "spikes.window"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate"),
        ({"optimizer": {"weight_decay": float("inf")}}, "optimizer.weight_decay"),
        ({"model": MODEL | {"max_length": 7}}, "model.max_length"),
        ({"model": MODEL | {"sparsity": {"kind": "h2o"}}}, "model.sparsity"),
        ({"optimizer": {"language_scale": 0.5}}, "optimizer.language_scale"),
        ({"data": {"kind": "digits", "mixture": {"image_words": 1.0}}}, "model"),
    ],
)
def test_impossible_configs_name_the_key(text, changes, key):
    with pytest.raises(ConfigError) as raised:
        make(text, **changes)
    assert raised.value.key == key


def test_a_loss_that_is_not_finite_ends_the_run(text, tmp_path, monkeypatch):
    def diverge(state, batch, **_):
        return state._replace(step=state.step + 1), {"loss": 1 / (3 - state.step).astype(jnp.float32)}

    monkeypatch.setattr(train, "train_step", diverge)
    with pytest.raises(UserError, match=r"the loss is inf at step 4; .*lower optimizer.learning_rate"):
        train.run(dataclasses.replace(make(text), steps=6), Run(tmp_path, "diverging"))


def test_check_of_a_batch_that_no_memory_holds_builds_none(text):
    config = make(text, data={"kind": "needle"}, model=MODEL | {"vocab_size": 512, "max_length": 4096})
    config = dataclasses.replace(config, batch_size=1 << 18)
    report = train.check(config)
    assert report["bytes_per_device"]["total"] > 1 << 40
    expected = report["expected"]
    assert expected["seconds_per_step"] == report["flops_per_step"] / (0.4 * expected["peak_flops"])
    with pytest.raises(UserError, match="more than an int32 counts; lower batch_size"):
        train.check(dataclasses.replace(config, batch_size=1 << 24))
