"""One run on 1, 8 and 1 CPU devices, and the same run on one alone; a program of its own, since the number
of devices is fixed once.

Usage: python -m tests.training.on_new_meshes FOLDER
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from jaxlab.app import run_name
from jaxlab.app.runs import Run
from jaxlab.checkpoints import load_model
from jaxlab.config import build
from jaxlab.models import MeshConfig
from jaxlab.tasks import train
from jaxlab.training import Callback, make_optimizer, state_shardings


class Cut(Callback):
    """Ends the process' part after a checkpoint, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, loop):
        if loop.done > self.step:
            loop.checkpoints.wait()
            raise KeyboardInterrupt


def main(folder):
    folder.mkdir(exist_ok=True)
    (folder / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(300)))
    config = build(
        train.Config,
        {
            "model": {
                "width": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 16,
                "max_length": 16,
            },
            "data": {"path": str(folder / "text.py"), "sequence_length": 16, "holdout_every": 4},
            "optimizer": {
                "warmup_steps": 2, "learning_rate": 0.01, "eps": 1e-4, "muon": {}, "ema": {"decay": 0.9},
                "groups": [{"pattern": "embedding", "learning_rate": 0.002}],
            },
            "loss": {"z_loss": 1e-4},
            "mesh": {"data": 1},
            "steps": 12, "batch_size": 8, "log_every": 1, "eval_every": 6, "eval_batches": 1,
            "checkpoint_every": 4,
        },
    )  # fmt: skip
    mesh = MeshConfig(data=2, fsdp=2, model=2)
    parts = [(MeshConfig(data=1), 4), (mesh, 8), (MeshConfig(data=1), None)]
    names = set()
    for here, until in parts:
        one = dataclasses.replace(config, mesh=here)
        names.add(run_name("train", one, "run", train.inputs(one)))
        try:
            train.run(one, Run(folder / "moved", "moved"), [] if until is None else [Cut(until)])
        except KeyboardInterrupt:
            assert until is not None
    assert len(names) == 1, names
    (folder / "alone").mkdir()
    train.run(config, Run(folder / "alone", "alone"))
    losses = [read_losses(folder / name) for name in ("moved", "alone")]
    assert [step for step, _ in losses[0]] == list(range(1, 13)), losses[0]
    np.testing.assert_allclose([x for _, x in losses[0]], [x for _, x in losses[1]], rtol=1e-4)
    params = [load_model(folder / name / "model")[1] for name in ("moved", "alone")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *params)

    # Momentum, Adam's moments and the average are split as their parameters are.
    made = train.make_mesh(mesh)
    optimizer = make_optimizer(config.optimizer, config.model, config.steps)
    shardings = state_shardings(config.model, optimizer, made)
    shapes = jax.eval_shape(optimizer.init, train.abstract_state(config.model, optimizer).params)
    whole = sum(x.size for x in jax.tree.leaves(shapes))
    shards = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))), shapes, shardings.optimizer)
    assert (
        sum(jax.tree.leaves(shards)) < 0.45 * whole
    )  # 2 ways along the width, 2 along heads and hidden units


def read_losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


if __name__ == "__main__":
    Path(sys.argv[1], "moved").mkdir(parents=True)
    main(Path(sys.argv[1]))
    print("the same")
