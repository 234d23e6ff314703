"""A run that is killed with SIGKILL and taken up again ends in bitwise the same parameters and metrics."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab.app.interrupts import Terminated
from jaxlab.app.runs import Run
from jaxlab.checkpoints import load_model
from jaxlab.config import dump, load
from jaxlab.tasks import train

STEPS, KILLED_AT = 7, 5
PROGRAM = """
import os, signal, sys
from pathlib import Path
from jaxlab.config import load
from jaxlab.data.text import TextSource
from jaxlab.app.runs import Run
from jaxlab.tasks import train

batch = TextSource.batch
def until_killed(self, seed, step, size, rows=None):
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, seed, step, size, rows)
TextSource.batch = until_killed
train.run(load(train.Config, sys.argv[1]), Run(Path(sys.argv[2]), "killed"))
"""


def steps_and_losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


@pytest.mark.multiprocess
def test_kill_and_resume(tmp_path, capsys, kept_programs):
    (tmp_path / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(200)))
    (tmp_path / "config.yaml").write_text(f"""
model: {{width: 8, num_layers: 1, num_heads: 2, mlp_width: 8, max_length: 8}}
data: {{path: {tmp_path / "text.py"}, sequence_length: 8, holdout_every: 4}}
mesh: {{data: 1, fsdp: 2}}
optimizer: {{warmup_steps: 2}}
steps: {STEPS}
batch_size: 4
log_every: 1
eval_every: 2
eval_batches: 1
checkpoint_every: 2
""")
    config = load(train.Config, tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text(dump(config))
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "config.yaml", tmp_path / "killed", str(KILLED_AT)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -9, process.stderr
    assert not (tmp_path / "killed" / "model").exists()
    logged = steps_and_losses(tmp_path / "killed")
    assert logged[-1][0] == KILLED_AT

    results = train.run(config, Run(tmp_path / "killed", "killed"))
    # Step 4 is the newest checkpoint, unless the kill came before all of it was on disk.
    resumed = int(capsys.readouterr().out.partition("resuming at step ")[2].partition(" ")[0])
    assert resumed in (2, 4)
    whole = train.run(config, Run(tmp_path / "whole", "whole"))
    assert "resuming" not in capsys.readouterr().out

    _, killed_params, _ = load_model(tmp_path / "killed" / "model")
    _, whole_params, _ = load_model(tmp_path / "whole" / "model")
    jax.tree.map(np.testing.assert_array_equal, killed_params, whole_params)
    assert results["test"] == whole["test"]
    # Every step is logged once, those before the kill by the first process; only speeds may differ.
    found = steps_and_losses(tmp_path / "killed")
    assert found == steps_and_losses(tmp_path / "whole")
    assert [step for step, loss, _ in found if loss is not None] == list(range(1, STEPS + 1))
    assert [step for step, _, held_out in found if held_out is not None] == [2, 4, 6, 7]
    assert found[: len(logged)] == logged

    # After SIGTERM a step is saved that no checkpoint was due at, and the run goes on there. The signal comes
    # while step 4 is logged, too late for it.
    log = Run.log

    def terminated(self, *, step=None, **metrics):
        log(self, step=step, **metrics)
        if step == KILLED_AT - 1 and "loss" in metrics:
            signal.raise_signal(signal.SIGTERM)

    (tmp_path / "stopped").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", terminated)
        with pytest.raises(Terminated, match=f"step {KILLED_AT} of {STEPS} is saved"):
            train.run(config, Run(tmp_path / "stopped", "stopped"))
    train.run(config, Run(tmp_path / "stopped", "stopped"))
    assert f"resuming at step {KILLED_AT} of {STEPS}" in capsys.readouterr().out
    _, stopped_params, _ = load_model(tmp_path / "stopped" / "model")
    jax.tree.map(np.testing.assert_array_equal, stopped_params, whole_params)
    assert steps_and_losses(tmp_path / "stopped") == steps_and_losses(tmp_path / "whole")
