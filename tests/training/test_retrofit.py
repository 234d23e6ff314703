"""The task train from a dense model to one with NSA: what it measures first, takes up again and refuses."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlab.app.runs import Run
from jaxlab.checkpoints import load_model, open_model, save_model
from jaxlab.config import build
from jaxlab.errors import ConfigError, UserError
from jaxlab.losses import target_losses
from jaxlab.models import RopeConfig, SlidingAttentionConfig
from jaxlab.retrofit.convert import retrofit
from jaxlab.tasks import train
from jaxlab.training import Setup
from jaxlab.training.state import find_initial
from tests.checkpoints import folders
from tests.models import oracle
from tests.models.tiny import NSA, draw_params, make_config

# The golden Llama, with NSA: whatever its config.json says that is no default of ours.
LLAMA = {
    "vocab_size": 131,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,
    "mlp_width": 44,
    "norm_eps": 1e-6,
    "max_length": 16,
    "attention": {
        "kind": "nsa",
        "block_len": 4,
        "stride": 2,
        "block_size": 4,
        "num_blocks": 3,
        "num_local": 1,
        "window": 3,
        "compress_width": 20,
    },
}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(60)))
    return {"path": str(tmp_path / "text.py"), "sequence_length": 16, "holdout_every": 4}


def make(text, initial, **changes):
    base = {
        "model": LLAMA,
        "data": text,
        "mesh": {"data": 1},
        "init_from": str(initial),
        "steps": 2,
        "batch_size": 2,
        "log_every": 1,
        "eval_every": 2,
        "eval_batches": 1,
        "checkpoint_every": 1,
    }
    return build(train.Config, {**base, **changes})


def shrink(state, batch, **_):
    """A step that takes no time to compile."""
    params = jax.tree.map(lambda x: 0.9 * x, state.params)
    return state._replace(step=state.step + 1, params=params), {"loss": jnp.ones(())}


def without_biases(params):
    """For the oracle, whose NSA has biases."""
    attention = params["layers"]["attention"]
    zeros = {f"{name}_bias": np.zeros_like(attention[name].sum(axis=-3)) for name in ("key", "value")}
    zeros["output_bias"] = np.zeros_like(attention["output"].sum(axis=(1, 2)))
    return {**params, "layers": {**params["layers"], "attention": {**attention, **zeros}}}


def test_a_folder_of_hugging_face_is_retrofitted_measured_and_trained(
    text, tmp_path, capsys, monkeypatch, kept_programs
):
    monkeypatch.setattr(train, "train_step", shrink)
    config = make(text, folders.make(tmp_path / "dense", "llama_tied"))
    (tmp_path / "run").mkdir()
    results = train.run(config, Run(tmp_path / "run", "retrofit"))
    before = results["retrofit"]
    assert f"retrofit of the dense model {tmp_path / 'dense'}: its loss" in capsys.readouterr().out
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["retrofit"]["coverage"] == before["coverage"]

    batch = next(iter(train.make_source(config.data).held_out_batches(2, 1)))
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    dense, params, _ = load_model(tmp_path / "dense")
    made = jax.jit(lambda p: retrofit(p, dense, config.model.nsa)[0])(params)
    trained, ours, _ = load_model(tmp_path / "run" / "model")
    assert trained == config.model
    for name, p, model in (
        ("dense", params, dense),
        ("retrofitted", made, trained),
        ("trained", ours, trained),
    ):
        rows = [oracle.logits(without_biases(p), row, model) for row in np.asarray(batch["tokens"])]
        losses, mask = target_losses(jnp.asarray(np.stack(rows), jnp.float32), batch)
        assert before["loss"][name] == pytest.approx(float(jnp.mean(losses, where=mask)), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.81 * np.asarray(b), rtol=1e-5), ours, made)
    assert before["choice"] == 4 / 16  # the last four queries see four blocks and may read three
    for i in range(2):
        of_layer = {name: values[i] for name, values in before["coverage"].items()}
        assert 0.75 < of_layer["random"] < 1
        assert 0.75 < of_layer["chosen"] <= of_layer["best"] <= 1
        assert of_layer["chosen"] <= of_layer["with_window"] <= 1

    # Taken up at step 1, the run still knows what was measured before it.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    resumed = train.run(config, Run(tmp_path / "run", "retrofit"))
    assert "resuming at step 1" in capsys.readouterr().out
    assert resumed["retrofit"] == before


def test_check_names_the_dense_model(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "estimate_run", lambda *_, **__: {})
    monkeypatch.setattr(train, "read_initial", None)
    folder = folders.make(tmp_path / "dense", "llama_tied")
    assert train.check(make(text, folder))["retrofit_of"] == str(folder)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            {"attention": SlidingAttentionConfig()},
            {},
            "cannot be retrofitted to NSA: attention: the model has sliding",
        ),
        ({}, {"compress_width": 8}, r"attention.compress_width: 8 units .* set at least 12"),
        ({"mlp_width": 9}, {}, r"layers\.mlp\.down is \(1, 9, 12\), the model to train says \(1, 8, 12\)"),
        ({"position": RopeConfig(theta=99.0)}, {}, r"its position is .*theta=99.0.* set model.position"),
        ({"norm_eps": 1e-3}, {}, "its norm_eps is 0.001, of the model to train 1e-05; set model.norm_eps"),
    ],
)
def test_a_dense_model_that_differs_in_more_than_attention_is_refused(text, tmp_path, theirs, ours, message):
    dense = make_config(num_layers=1, **theirs)
    save_model(tmp_path / "base", dense, draw_params(dense))
    nsa = dataclasses.replace(NSA, **{"compress_width": 12, **ours})
    with pytest.raises(UserError, match=message) as raised:
        find_initial(
            open_model(tmp_path / "base"),
            make_config("nsa", num_layers=1, attention=nsa, attention_bias=False),
            train.make_source(make(text, "nowhere").data),
        )
    assert "\n" not in str(raised.value)


def test_a_folder_with_a_tokenizer_reads_text_in_its_words(text, tmp_path):
    folder = folders.make(tmp_path / "dense", "llama_tied")
    tokenizer = Tokenizer(models.WordLevel({"=": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = make(text, folder).model
    with pytest.raises(UserError, match="the model reads words, the data holds bytes"):
        find_initial(open_model(folder), model, train.make_source(make(text, folder).data))
    in_words = train.make_source(make({**text, "tokenizer": str(folder)}, folder).data)
    assert find_initial(open_model(folder), model, in_words).dense is not None


def test_a_model_with_nsa_is_taken_as_it_is(text, tmp_path):
    model = make_config("nsa", num_layers=1)
    save_model(tmp_path / "base", model, draw_params(model))
    initial = find_initial(
        open_model(tmp_path / "base"), model, train.make_source(make(text, "nowhere").data)
    )
    assert initial.dense is None


@pytest.mark.parametrize("gate", [0.0, 0.5, float("nan")])
def test_a_gate_that_is_none_is_refused(text, gate):
    with pytest.raises(ConfigError) as raised:
        make(text, "nowhere", retrofit_gate=gate)
    assert raised.value.key == "retrofit_gate"
    assert np.isnan(gate) or str(gate) in str(raised.value)


def test_a_lost_line_of_metrics_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_held_out", lambda setup: {})
    setup = Setup(*[None] * 8, lambda params, batch: {"loss": 6.0, "targets": 2.0})
    run = Run(tmp_path, "x")
    run.log(step=1, loss=3.0)
    assert train._retrofit(setup, {}, run) == {}
    run.log(step=2, retrofit={"loss": {"dense": 1.0}, "choice": 0.5})
    loss = {"dense": 1.0, "trained": 3.0}
    assert train._retrofit(setup, {}, run) == {"retrofit": {"loss": loss, "choice": 0.5}}
