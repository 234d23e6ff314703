"""A merge to a folder beside mergekit 0.1.5, beside merging in memory as before, and beside the copy.

    python benchmarks/merge_engine.py --folder made --out merge_engine.json --mergekit-python env/bin/python

Three Llamas in bf16 are made on the first run (349 million parameters each; --size 1.1b for TinyLlama's
shapes). "copy" reads the three inputs and writes one file of the output's size, with the page cache warm.
Every run is a process of its own, one after the other, round by round, so that all meet the same machine:
ratios are of the same round. "seconds" is the whole command; "work" is without imports and start-up, where
the program tells it. CPU seconds are user and system of the process. Peak memory is the resident set.
mergekit runs in an environment of its own: `pip install mergekit==0.1.5`.
"""

import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import tyro
from tqdm import tqdm

from jaxlab.app import environment
from jaxlab.checkpoints.tensor_folder import Planned, write_folder
from jaxlab.files import write_json

SIZES = {"349m": (1024, 24, 2816, 16, 16), "1.1b": (2048, 22, 5632, 32, 4), "tiny": (64, 2, 128, 4, 4)}
"""Width, layers, width of the MLP, heads, heads of keys and values."""
VOCABULARY = 32000
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "dare_linear": {"lambda": 0.7, "density": 0.5},
    "ties": {"lambda": 0.7, "density": 0.5},
}
WEIGHTS = (0.9, 0.4)
GOALS = {"linear": 1.5, "task_arithmetic": 1.5, "dare_linear": 3.0, "ties": 4.0}
"""Times the copy."""

_COPY = """
import os, sys, time
begin = time.perf_counter()
target, *sources = sys.argv[1:]
buffer = bytearray(1 << 23)
out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.posix_fallocate(out, 0, os.stat(sources[0]).st_size)
for number, source in enumerate(sources):
    at, file = 0, os.open(source, os.O_RDONLY)
    while count := os.preadv(file, [buffer], at):
        if number == 0:
            os.pwrite(out, memoryview(buffer)[:count], at)
        at += count
os.fsync(out)
print("work", time.perf_counter() - begin)
"""
_ENGINE = """
import sys, time
from jaxlab.checkpoints import open_model
from jaxlab.merging import engine, load_recipe, prepare_merge, write_merge
recipe = load_recipe(sys.argv[1])
prepared = prepare_merge(recipe, [open_model(r) for r in recipe.references()])
begin = time.perf_counter()
write_merge(prepared, sys.argv[2], hash_inputs=sys.argv[3])
print("work", time.perf_counter() - begin)
"""
_MEMORY = """
import sys, time
from pathlib import Path
from jaxlab.checkpoints import open_model, save_model
from jaxlab.merging import load_recipe, merge_by_recipe
import jax
recipe = load_recipe(sys.argv[1])
models = [open_model(r) for r in recipe.references()]
begin = time.perf_counter()
params, account = merge_by_recipe(recipe, models)
account.with_hashes(params)
save_model(sys.argv[2], models[0].config, params, form="huggingface", source_files=models[0].source_files)
print("work", time.perf_counter() - begin)
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured, and where."""

    folder: Path
    """Where the models lie, or are made, and where the merges are written; on the disk to be measured."""
    out: Path
    """JSON file to write; the plot beside it."""
    size: Literal["349m", "1.1b", "tiny"] = "349m"
    """Of the models."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which operators."""
    rounds: int = 3
    """Runs of each; ratios are of one round, their median counts."""
    mergekit_python: Path | None = None
    """The interpreter of an environment with mergekit; without it mergekit is left out."""
    in_memory: bool = True
    """Also merge in memory, as `merge_models` does."""


def make(folder: Path, size: str) -> None:
    """A base and two models near it."""
    width, layers, inner, heads, kv = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes = {"lm_head.weight": (VOCABULARY, width), "model.embed_tokens.weight": (VOCABULARY, width)}
    for i in range(layers):
        start, narrow = f"model.layers.{i}.", width // heads * kv
        shapes |= {f"{start}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        shapes |= {f"{start}mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        shapes |= {f"{start}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{start}self_attn.{n}_proj.weight": (width, width) for n in "qo"}
        shapes |= {f"{start}self_attn.{n}_proj.weight": (narrow, width) for n in "kv"}
    shapes["model.norm.weight"] = (width,)

    def values(name: str, shape: tuple[int, ...], model: int) -> np.ndarray:
        draw = lambda *key: np.random.default_rng([*key, zlib.crc32(name.encode())]).standard_normal(
            shape, dtype=np.float32
        )
        return (0.02 * draw(0) + (0.002 * draw(model) if model else 0)).astype(ml_dtypes.bfloat16)

    for model, name in enumerate(("base", "one", "two")):
        planned = [
            Planned(n, np.dtype(ml_dtypes.bfloat16), s, lambda n=n, s=s, m=model: values(n, s, m))
            for n, s in shapes.items()
        ]
        write_folder(folder / name, planned, config=config)


def recipes(folder: Path, method: str) -> tuple[Path, Path]:
    """The same merge for us, as published, and for mergekit."""
    numbers = dict(METHODS[method])
    density = {"density": numbers.pop("density")} if "density" in numbers else {}
    base = {} if method == "linear" else {"base": str(folder / "base")}
    models = [(str(folder / n), w) for n, w in zip(("one", "two"), WEIGHTS, strict=True)]
    ours = {"kind": "merge", "operator": method, **base, **numbers}
    ours["models"] = [{"model": m, "weight": w, **density} for m, w in models]
    theirs: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    theirs["models"] = [{"model": m, "parameters": {"weight": w, **density}} for m, w in models]
    if base:
        theirs |= {"base_model": base["base"], "parameters": numbers}
    paths = folder / f"{method}.ours.yaml", folder / f"{method}.mergekit.yaml"
    for path, text in zip(paths, (ours, theirs), strict=True):
        path.write_text(json.dumps(text, indent=1))  # JSON is YAML
    return paths


def commands(arguments: Arguments, method: str, out: Path) -> Iterator[tuple[str, list[str]]]:
    folder, python = arguments.folder, sys.executable
    ours, theirs = recipes(folder, method)
    inputs = [folder / n / "model.safetensors" for n in ("base", "one", "two")]
    yield "copy", [python, "-c", _COPY, str(out), *map(str, inputs)]
    command = [python, "run.py", "merge", str(ours), "--out", str(out)]
    yield "jaxlab", command
    yield "jaxlab, inputs hashed in full", [*command, "--hash-inputs", "full"]
    yield "jaxlab, work", [python, "-c", _ENGINE, str(ours), str(out), "sampled"]
    if arguments.in_memory:
        yield "jaxlab in memory", [python, "-c", _MEMORY, str(ours), str(out)]
    if arguments.mergekit_python is not None:
        yaml = arguments.mergekit_python.parent / "mergekit-yaml"
        yield "mergekit", [str(arguments.mergekit_python), str(yaml), str(theirs), str(out)]


def measured(command: list[str], out: Path) -> dict[str, Any]:
    """One run of a command, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    said, _ = process.communicate()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        return {"failed": (said.strip().splitlines() or ["?"])[-1]}
    work = [float(line.split()[1]) for line in said.splitlines() if line.startswith("work ")]
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "work": work[0] if work else None,
        "load": os.getloadavg()[0],
    }


def peak_of(command: list[str], out: Path) -> int | None:
    """Peak resident bytes of a command: of children the system only tells the largest of all, so that each is
    run by a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    code = "import resource, subprocess, sys\n"
    code += "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)\n"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False, env=environment
    )
    return int(done.stdout) if done.returncode == 0 else None


def summary(runs: dict[str, list[dict[str, Any]]], peaks: dict[str, int | None]) -> dict[str, Any]:
    """Medians, and how many times the copy of its round each run took."""
    result: dict[str, Any] = {}
    for name, found in runs.items():
        failed = [run["failed"] for run in found if "failed" in run]
        if failed:
            result[name] = {"failed": failed[0]}
            continue
        median = lambda key, found=found: statistics.median(run[key] for run in found)
        line = {"seconds": median("seconds"), "cpu_seconds": median("cpu_seconds"), "peak_bytes": peaks[name]}
        if found[0]["work"] is not None:
            line["work"] = median("work")
            pairs = zip(found, runs["copy"], strict=True)
            line["work_in_copies"] = statistics.median(run["work"] / copy["work"] for run, copy in pairs)
        pairs = zip(found, runs["copy"], strict=True)
        line["seconds_in_copies"] = statistics.median(run["seconds"] / copy["work"] for run, copy in pairs)
        result[name] = line
    if "seconds" in result.get("mergekit", {}):
        for name, line in result.items():
            if "seconds" in line and name != "mergekit":
                line["times_faster_than_mergekit"] = result["mergekit"]["seconds"] / line["seconds"]
                line["times_less_cpu_than_mergekit"] = result["mergekit"]["cpu_seconds"] / line["cpu_seconds"]
    return result


def plot(results: dict[str, Any], path: Path) -> None:
    """Seconds and CPU seconds of every run, by operator."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    height = 0.8 / len(names)
    for axis, (key, title) in zip(
        axes,
        {
            "seconds": "seconds, the whole command",
            "cpu_seconds": "CPU seconds",
            "peak_bytes": "peak, GB",
        }.items(),
        strict=True,
    ):
        for place, name in enumerate(names):
            values = [found.get(name, {}).get(key) or 0 for found in results.values()]
            values = [value / 1e9 if key == "peak_bytes" else value for value in values]
            axis.barh(np.arange(len(results)) + place * height, values, height, label=name)
        axis.set_yticks(
            np.arange(len(results)) + 0.4, list(results) if axis is axes[0] else [""] * len(results)
        )
        axis.set_title(title)
        axis.set_xscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Arguments) -> None:
    if not (arguments.folder / "two").exists():
        make(arguments.folder, arguments.size)
    out, results = arguments.folder / "merged", {}
    for method in arguments.methods:
        found = dict(commands(arguments, method, out))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
        measured(found["copy"], out)  # warms the page cache
        with tqdm(total=arguments.rounds * len(found), desc=method, unit="run") as bar:
            for _ in range(arguments.rounds):
                for name, command in found.items():
                    runs[name].append(measured(command, out))
                    bar.update()
        peaks = {name: peak_of(command, out) for name, command in found.items()}
        results[method] = summary(runs, peaks)
        for name, line in results[method].items():
            print(method, name, {key: round(v, 2) if isinstance(v, float) else v for key, v in line.items()})
    shutil.rmtree(out, ignore_errors=True)
    versions = {}
    if arguments.mergekit_python is not None:
        code = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
        said = subprocess.run(
            [str(arguments.mergekit_python), "-c", code], capture_output=True, text=True, check=True
        )
        versions = dict(zip(("mergekit", "torch"), said.stdout.split(), strict=True))
    record = {"size": arguments.size, "goals_in_copies": GOALS, "results": results, "versions": versions}
    write_json(arguments.out, {**record, "env": environment()})
    plot(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
