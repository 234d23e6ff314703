"""First step and later steps of the quickstart's models in training: seconds to trace, to compile and to run.

    JAX_PLATFORMS=cpu python benchmarks/model_steps.py --out steps.json
    ... --against ../before:../before/venv/bin/python --out steps.json

With `--against TREE:PYTHON` another checkout is measured beside this one: a process for each, in turn, so
that both see the same load. Times are medians over the processes, in wall seconds and in CPU seconds; the
second are what a busy machine leaves comparable. The programs are compared too: the count and the hash of the
instructions of the optimized HLO (operation and shape, whatever their order), and the loss after the last
step.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from jaxlab.app.provenance import environment
from jaxlab.files import write_json

CONFIGS = ("nsa_sparse", "nsa_full", "icl_model", "digits_vlm")
CHILD = r"""
import hashlib, json, re, statistics, sys, time
import jax, jax.numpy as jnp, numpy as np, optax, yaml
from jaxlab.config import build
from jaxlab.models import ModelConfig, init_params
from jaxlab.training.step import State, train_step
raw, steps = yaml.safe_load(open(sys.argv[1])), int(sys.argv[2])
length = raw["data"].get(raw["data"]["kind"], {}).get("sequence_length", 32)
config, rows = build(ModelConfig, raw["model"]), raw["batch_size"]
rng = np.random.default_rng(0)
batch = {"tokens": jnp.asarray(rng.integers(5, config.vocab_size, (rows, length)), jnp.int32)}
if config.vision.num_layers:
    v = config.vision
    batch["tokens"] = batch["tokens"].at[:, :v.num_patches].set(v.image_token)
    images = rng.standard_normal((rows, 1, v.image_size, v.image_size, v.channels))
    batch["images"] = jnp.asarray(images, jnp.float32)
optimizer = optax.adamw(1e-3)
params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
found, clocks = {}, {"wall": time.perf_counter, "cpu": time.process_time}
def timed(part, function):
    before = {name: clock() for name, clock in clocks.items()}
    result = function()
    for name, clock in clocks.items():
        found.setdefault(f"{part}_{name}", []).append(clock() - before[name])
    return result
step = jax.jit(lambda state, batch: train_step(state, batch, config, optimizer))
lowered = timed("trace", lambda: step.lower(state, batch))
compiled = timed("compile", lowered.compile)
for _ in range(steps):
    state, metrics = timed("step", lambda: jax.block_until_ready(compiled(state, batch)))
instructions = re.findall(r" = (\S+) ([\w-]+)\(", compiled.as_text())
found = {name: statistics.median(values) for name, values in found.items()}
found |= {"loss": float(metrics["loss"]), "hlo_instructions": len(instructions)}
found["hlo"] = hashlib.sha256(repr(sorted(instructions)).encode()).hexdigest()[:16]
print(json.dumps(found))
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    out: Path | None = None
    """Results as JSON."""
    against: str = ""
    """TREE:PYTHON of another checkout."""
    repeats: int = 5
    """Processes for each model and tree."""
    steps: int = 8
    """Steps in a process."""
    configs: tuple[str, ...] = CONFIGS
    """Names in the folder."""
    folder: Path = Path(__file__).parents[1] / "configs" / "quickstart"
    """Where both checkouts read the configs."""


def measure(tree: Path, python: str, config: Path, steps: int) -> dict[str, Any]:
    """One process in a checkout."""
    command = [python, "-c", CHILD, str(config), str(steps)]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    trees = {"this": (Path(__file__).parents[1], sys.executable)}
    if arguments.against:
        tree, _, python = arguments.against.rpartition(":")
        trees = {"other": (Path(tree), python), **trees}
    results: dict[str, Any] = {}
    for name in arguments.configs:
        config = (arguments.folder / f"{name}.yaml").resolve()
        runs: dict[str, list[dict[str, Any]]] = {which: [] for which in trees}
        for _ in range(arguments.repeats):
            for which, (tree_path, python) in trees.items():
                runs[which].append(measure(tree_path, python, config, arguments.steps))
        results[name] = {which: _medians(found) for which, found in runs.items()}
        print(name, json.dumps(results[name]), flush=True)
    if arguments.out:
        write_json(arguments.out, {"environment": environment(), "models": results})


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    number = lambda name: statistics.median(run[name] for run in runs)
    return {name: runs[0][name] if isinstance(runs[0][name], str) else number(name) for name in runs[0]}


if __name__ == "__main__":
    main()
