"""What is watched while training: evaluations, samples, memory, sources, trackers, traces."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from jaxlab.app import read_metrics
from jaxlab.app.runs import Run
from jaxlab.checkpoints import load_model, open_model
from jaxlab.config import build
from jaxlab.data.text import TextSource
from jaxlab.errors import ConfigError, UserError
from jaxlab.evaluation import measure_held_out
from jaxlab.models import generate
from jaxlab.processing import TextStream
from jaxlab.tasks import train

MODEL = {"width": 8, "num_layers": 1, "num_heads": 2, "mlp_width": 8, "max_length": 24}
ONE = {"max_new_tokens": 1}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(200)))
    lines = [{"prompt": f"x{i}", "choices": [" = ", " + "], "answer": 0} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def make(text, **changes):
    base = {
        "model": MODEL,
        "data": {"path": str(text / "text.py"), "sequence_length": 8, "holdout_every": 4},
        "optimizer": {"warmup_steps": 1, "ema": {"decay": 0.5, "export": True}},
        "mesh": {"data": 1},
        "steps": 4,
        "batch_size": 4,
        "log_every": 2,
        "eval_every": 2,
        "eval_batches": 1,
    }
    return build(train.Config, {**base, **changes})


def run_in(folder, config):
    folder.mkdir(exist_ok=True)
    return train.run(config, Run(folder, folder.name)), read_metrics(folder)


@pytest.fixture
def two_sources(monkeypatch):
    """The text counts as two sources, row by row in turn; the second is read from step 2 on."""
    batch = TextSource.batch

    def numbered(self, seed, step, size, rows=None):
        made = batch(self, seed, step, size, rows)
        ids = np.arange(len(made["tokens"]), dtype=np.int32) % 2 if step else np.zeros(size, np.int32)
        return {**made, "source_ids": ids}

    monkeypatch.setattr(TextSource, "batch", numbered)
    monkeypatch.setattr(TextSource, "source_names", ("first", "second"))


class Told:
    """A fake of the package wandb: it notes what it is told."""

    def __init__(self):
        self.inits, self.logged, self.axes, self.finished = [], [], [], 0

    def module(self):
        def init(**options):
            self.inits.append(options)
            return types.SimpleNamespace(log=self.log, finish=self.finish, define_metric=self.define_metric)

        return types.SimpleNamespace(init=init, __spec__=types.SimpleNamespace())

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, metrics):
        self.logged.append((metrics["step"], metrics))

    def finish(self):
        self.finished += 1


@pytest.mark.slow
def test_everything_that_is_watched(text, tmp_path, monkeypatch, two_sources):
    told = Told()
    monkeypatch.setitem(sys.modules, "wandb", told.module())
    questions = {"kind": "questions", "path": str(text / "q.jsonl"), "measure": "multiple_choice"}
    held_out = {"path": str(text / "text.py"), "sequence_length": 16, "holdout_every": 4}
    config = make(
        text,
        evaluations=[
            {"name": "longer", "data": held_out, "batches": 1, "position_buckets": 3},
            {"name": "choices", "data": questions, "every": 4},
        ],
        samples={"prompts": ["x1 = ", "ö"], "max_new_tokens": 5},
        tensorboard=True,
        wandb={"project": "tests", "mode": "offline"},
        profile=[2, 3],
    )
    results, records = run_in(tmp_path / "run", config)

    # The evaluations are those of the task evaluate, of the average that is kept.
    model, params, _ = load_model(tmp_path / "run" / "model")
    source = train.make_source(config.evaluations[0].data)
    again = measure_held_out(
        params, model, source, split="validation", batch_size=4, batches=1, position_buckets=3
    )
    assert results["evaluations"]["longer"]["loss"] == pytest.approx(again["loss"], rel=1e-5)
    assert len(results["evaluations"]["longer"]["by_position"]) == 3
    assert results["evaluations"]["choices"]["questions"] == 2
    measured = [(r["step"], *r["evaluations"]) for r in records if "evaluations" in r]
    assert measured == [(2, "longer"), (4, "longer"), (4, "choices")]
    assert all("ema_eval_loss" in r for r in records if "eval_loss" in r)
    assert results["validation"]["ema_eval_loss"] != results["validation"]["eval_loss"]

    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(n, p) for n in (2, 4) for p in ("x1 = ", "ö")]
    new = generate(params, {"tokens": np.asarray([list(b"x1 = ")], np.int32)}, model, max_new_tokens=5)
    stream = TextStream(None)
    assert samples[2]["text"] == "".join(map(stream.add, new[0].tolist()))

    logged = [r for r in records if "loss" in r]
    assert [set(r["loss_by_source"]) for r in logged] == [{"first", "second"}] * 2
    assert all(0 < value < 7 for r in logged for value in r["loss_by_source"].values())
    assert all(r["host_peak_bytes"] >= r["host_bytes"] > 1 << 20 for r in logged)
    assert results["host_peak_bytes"] == max(r["host_peak_bytes"] for r in logged)

    assert told.inits[0]["project"] == "tests"
    assert (told.inits[0]["mode"], told.finished) == ("offline", 1)
    assert [step for step, metrics in told.logged if "loss" in metrics] == [2, 4]
    assert any("evaluations/longer/loss" in metrics for _, metrics in told.logged)
    assert read_events(tmp_path / "run" / "tensorboard") >= {
        (r["step"], np.float32(r["loss"]).item()) for r in logged
    }
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def read_events(folder):
    """The (step, value) of `loss` in event files, by the format's own messages."""
    from tensorboardX.proto.event_pb2 import Event

    found = set()
    for path in folder.iterdir():
        raw = path.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            event, raw = Event.FromString(raw[12 : 12 + size]), raw[16 + size :]
            found |= {
                (event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"
            }
    return found


def test_a_package_that_is_missing_is_one_line(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for changes, extra in (({"tensorboard": True}, "tensorboard"), ({"wandb": {}}, "wandb")):
        with pytest.raises(UserError, match=rf"is not there; pip install 'jaxlab\[{extra}\]'"):
            train.check(make(text, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"samples": {"prompts": ["x" * 24], **ONE}},
            r"samples\.prompts\.0: 24 tokens and 1 new",
        ),
        ({"samples": {"prompts": ["ok", ""], **ONE}}, r"samples\.prompts\.1: 0 tokens"),
        (
            {
                "samples": {"prompts": ["ok"], **ONE},
                "model": MODEL | {"attention": {"kind": "nsa", "selector": "auxiliary"}, "max_length": 64},
            },
            "auxiliary selector keeps no cache",
        ),
        (
            {"evaluations": [{"name": "long", "data": {"sequence_length": 32}}]},
            "sequences of 32 tokens exceed",
        ),
        ({"evaluations": [{"name": "digits", "data": {"kind": "digits"}}]}, "evaluations: digits: .*words"),
        (
            {"evaluations": [{"name": "q", "data": {"kind": "questions", "path": "none.jsonl"}}]},
            r"none\.jsonl",
        ),
        (
            {"export": "hf", "model": MODEL | {"attention": {"kind": "nsa"}, "max_length": 64}},
            "no family of Hugging Face can describe",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_made(text, changes, message):
    with pytest.raises(UserError, match=message):
        train.check(make(text, **changes))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"profile": [3]}, "profile"),
        ({"profile": [3, 2]}, "profile"),
        ({"profile": [3, 4], "steps": 2}, "profile"),
        ({"export": "hf", "lora": {"rank": 2}, "init_from": "x"}, "export"),
        ({"evaluations": [{"name": "a"}, {"name": "a"}]}, "evaluations"),
        ({"evaluations": [{"name": "test"}]}, "evaluations"),
        ({"evaluations": [{"name": "a/b"}]}, "evaluations.0.name"),
        ({"samples": {"prompts": []}}, "samples.prompts"),
        ({"keep": {"last": 0}}, "keep.last"),
        ({"optimizer": {"ema": {"decay": 1.0}}}, "optimizer.ema.decay"),
        ({"optimizer": {"muon": {"momentum": 1.0}}}, "optimizer.muon.momentum"),
        ({"optimizer": {"groups": [{"pattern": ""}]}}, "optimizer.groups.0.pattern"),
    ],
)
def test_impossible_configs_name_the_key(text, changes, key):
    with pytest.raises(ConfigError) as raised:
        make(text, **changes)
    assert raised.value.key == key


@pytest.mark.slow
def test_the_end_is_a_folder_of_hugging_face(text, tmp_path):
    results, _ = run_in(tmp_path / "run", make(text, export="hf", tensorboard=False))
    opened = open_model(tmp_path / "run" / results["hf"])
    _, params, _ = load_model(tmp_path / "run" / results["model"])
    assert opened.form == "huggingface"
    jax.tree.map(np.testing.assert_array_equal, opened.read(), params)
