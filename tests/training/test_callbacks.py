"""Callbacks of one's own, and what does not make another run of one."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlab.app import read_metrics, run_name
from jaxlab.checkpoints import load_model
from jaxlab.config import build
from jaxlab.errors import UserError
from jaxlab.tasks import execute, train
from jaxlab.training import Callback


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(200)))
    return build(
        train.Config,
        {
            "model": {"width": 8, "num_layers": 1, "num_heads": 2, "mlp_width": 8, "max_length": 8},
            "data": {"path": str(tmp_path / "text.py"), "sequence_length": 8, "holdout_every": 4},
            "mesh": {"data": 1},
            "steps": 5,
            "batch_size": 4,
            "log_every": 2,
            "eval_every": 3,
            "eval_batches": 1,
            "checkpoint_every": 4,
        },
    )


class Watching(Callback):
    """Notes when it is called; after every second step it sets the last norm to `scale`."""

    def __init__(self, scale):
        self.scale, self.seen = scale, []

    @property
    def identity(self):
        return f"{super().identity}({self.scale})"

    def on_train_begin(self, loop):
        self.seen.append(("begin", loop.done))

    def on_step_end(self, loop):
        self.seen.append(("step", loop.done))

    def due(self, loop):
        return loop.done % 2 == 0

    def on_due(self, loop):
        self.seen.append(("due", loop.done))
        loop.run.log(step=loop.done, watched=loop.values["loss"])
        norm = {"scale": np.full((8,), self.scale, np.float32)}
        norm = jax.device_put(norm, loop.setup.shardings.params["final_norm"])
        loop.state = loop.state._replace(params={**loop.state.params, "final_norm": norm})

    def on_train_end(self, loop):
        self.seen.append(("end", loop.done))
        return {"watched": len(self.seen)}

    def close(self):
        self.seen.append(("close", None))


def test_a_callback_of_ones_own(config, tmp_path):
    mine = Watching(3.0)
    result = execute("train", config, outputs=tmp_path, name="mine", callbacks=[mine])
    steps = [(what, n) for n in range(1, 6) for what in ("step", "due") if what == "step" or n % 2 == 0]
    assert mine.seen == [("begin", 0), *steps, ("end", 5), ("close", None)]
    assert result.results["watched"] == 9
    # It is called after what measures, and has its say in what is kept and trained on.
    records = read_metrics(result.path)
    assert [r["watched"] for r in records if "watched" in r] == [
        r["loss"] for r in records if r["step"] in (2, 4) and "loss" in r
    ]
    _, params, _ = load_model(result.path / "model")
    np.testing.assert_allclose(params["final_norm"]["scale"], 3.0, atol=0.01)  # one step after it was set

    # Its identity makes another run; whatever ends it, it is closed.
    class Failing(Callback):
        def on_train_begin(self, loop):
            self.path = loop.run.path
            raise UserError("enough")

    folders = {result.path}
    for scale in (3.0, 2.0):
        watching, failing = Watching(scale), Failing()
        with pytest.raises(UserError, match="enough"):
            execute("train", config, outputs=tmp_path, name="mine", callbacks=[watching, failing])
        assert watching.seen == [("begin", 0), ("close", None)]
        folders.add(failing.path)
    assert len(folders) == 3


def test_other_tasks_take_none(tmp_path):
    with pytest.raises(UserError, match="evaluate takes no callbacks"):
        execute("evaluate", "config.yaml", callbacks=[Callback()], outputs=tmp_path)


def test_how_it_runs_does_not_make_another_run(config):
    name = lambda **changes: run_name("train", dataclasses.replace(config, **changes), "a", {})
    mesh = dataclasses.replace(config.mesh, fsdp=2)
    assert name(mesh=mesh, log_every=1, checkpoint_every=2) == name()
    assert len({name(), name(batch_size=8), name(steps=6), name(seed=1)}) == 4


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_of_another_one(config, tmp_path, capsys):
    whole = execute("train", config, outputs=tmp_path, name="whole")
    first = execute("train", dataclasses.replace(config, steps=4), outputs=tmp_path, name="first")
    goes_on = dataclasses.replace(
        config,
        continue_from=str(first.path),
        model=dataclasses.replace(config.model, compute_dtype="bfloat16"),
    )
    second = execute("train", goes_on, outputs=tmp_path, name="second")
    assert "resuming at step 4 of 5" in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(second.path) if "loss" in r] == [5]
    assert second.results["loss"] == pytest.approx(whole.results["loss"], abs=0.1)
    assert sorted(path.name for path in (first.path / "checkpoints").iterdir()) == ["4"]
    short = dataclasses.replace(goes_on, steps=4)
    with pytest.raises(UserError, match="it is at step 4 already; raise steps, which are 4"):
        execute("train", short, outputs=tmp_path, name="short")
    with pytest.raises(UserError, match="has no checkpoints; give the folder of a train run"):
        execute("train", dataclasses.replace(goes_on, continue_from=str(tmp_path)), outputs=tmp_path)
