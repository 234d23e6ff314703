"""A training step on this machine, beside PyTorch's: wall and processor seconds, in turn, so that all see the
same load.

    JAX_PLATFORMS=cpu python benchmarks/train.py --torch-python torch/bin/python --out train_cpu.json

The model is a Llama: by default 6 layers of width 256, 4.2 M parameters, fp32, 8 texts of 512 tokens, AdamW.
Ours is a step of the task `train`, with each of the `--attention` kinds; torch's is transformers' Llama with
torch's AdamW in a process of its own. Figures are medians over the rounds after the first one, and ratios of
the medians; on a busy machine the ratios of processor seconds are what can be compared. With several
`--lengths` the texts of a step are fewer as they are longer, so that tokens per second can be compared.
"""

import functools
import json
import os
import resource
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxlab.app.provenance import environment
from jaxlab.files import write_json
from jaxlab.models import FullAttentionConfig, ModelConfig, NSAConfig, count_params, init_params
from jaxlab.training import OptimizerConfig, State, make_optimizer, train_step

TORCH = Path(__file__).with_name("train_torch.py")


@dataclass(frozen=True)
class Options:
    attention: tuple[str, ...] = ("auto", "xla", "chunked")
    """Implementations of full attention, and nsa."""
    torch_python: str | None = None
    """A Python that has torch and transformers."""
    tokens: int = 4096
    """Of a step; at least one text."""
    lengths: tuple[int, ...] = (512,)
    """Of the texts, in tokens; one after the other."""
    width: int = 256
    mlp_width: int = 512
    layers: int = 6
    heads: int = 4
    vocabulary: int = 512
    threads: int = 2
    """Cores that both may use, and threads of torch. These wait for each other busily, so on a machine that
    others use too, torch's processor seconds are only its work with one."""
    rounds: int = 5
    out: str | None = None


def rows_of(options: Options, length: int) -> int:
    return max(1, options.tokens // length)


def model_of(options: Options, length: int, attention: str) -> ModelConfig:
    kinds = {"nsa": NSAConfig()}
    return ModelConfig(
        vocab_size=options.vocabulary,
        width=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
        mlp_width=options.mlp_width,
        max_length=length,
        tie_embeddings=False,
        attention=kinds.get(attention) or FullAttentionConfig(implementation=attention),
    )


class Ours:
    """Steps of one kind of attention."""

    def __init__(self, options: Options, length: int, attention: str) -> None:
        model = model_of(options, length, attention)
        optimizer = make_optimizer(OptimizerConfig(), model, 1000)
        params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        self.parameters = count_params(params)
        self.state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        shape = (rows_of(options, length), length)
        tokens = np.random.default_rng(0).integers(0, options.vocabulary, shape).astype(np.int32)
        self.batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.ones(shape, bool)}
        step = functools.partial(train_step, config=model, optimizer=optimizer)
        self.update = jax.jit(step, donate_argnums=0)

    def step(self) -> dict[str, float]:
        clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        self.state, metrics = self.update(self.state, self.batch)
        jax.block_until_ready(self.state)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"wall": time.perf_counter() - clock, "cpu": cpu, "loss": float(metrics["loss"])}


class Torch:
    """The steps of the other process."""

    def __init__(self, options: Options, length: int) -> None:
        sizes = {**asdict(options), "rows": rows_of(options, length), "length": length}
        command = [options.torch_python or "", str(TORCH), json.dumps(sizes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told = self._read()
        self.parameters = self.told["parameters"]

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args[:2])} ended: {self.process.wait()}")
        return json.loads(line)


def measure(options: Options, length: int) -> dict[str, dict[str, float]]:
    runners: dict[str, Any] = {name: Ours(options, length, name) for name in options.attention}
    if options.torch_python:
        runners["torch"] = Torch(options, length)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for number in range(options.rounds + 1):  # the first one compiles
        for name, runner in runners.items():
            taken = runner.step()
            print(f"{length}, {name}: {taken['wall']:.2f} s, {taken['cpu']:.2f} processor s", flush=True)
            if number:
                found[name].append(taken)
    results = {}
    for name, steps in found.items():
        wall, cpu = (statistics.median(step[clock] for step in steps) for clock in ("wall", "cpu"))
        results[name] = {
            "parameters": runners[name].parameters,
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "tokens_per_second": rows_of(options, length) * length / wall,
        }
    if "torch" in results:
        runners["torch"].close()
        for of in results.values():
            for clock in ("wall_seconds", "cpu_seconds"):
                of[f"{clock}_over_torch"] = of[clock] / results["torch"][clock]
    return results


def main(options: Options) -> None:
    # Before the first computation, whose thread pool has the size of this; the other process inherits it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    results = {str(length): measure(options, length) for length in options.lengths}
    print(json.dumps(results, indent=2))
    if options.out:
        told = {name: value for name, value in asdict(options).items() if name not in ("out", "torch_python")}
        write_json(Path(options.out), {"options": told, **environment(), "results": results})


if __name__ == "__main__":
    main(tyro.cli(Options))
