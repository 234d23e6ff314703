"""A merge to a folder beside mergekit 0.1.5 and beside the copy: every method of mergekit, and TIES trimmed
globally.

    python benchmarks/merge_engine.py --folder made --out merge_engine.json --mergekit-python env/bin/python

Three Llamas in bf16 are made on the first run (349 million parameters each; --size 1.1b for TinyLlama's
shapes). "copy" reads the three inputs and writes one file of the output's size, with the page cache warm.
"jaxlab" is `run.py merge` on a recipe of ours, as published; "jaxlab, mergekit's file" the same on the file
that mergekit gets, in its arithmetic. Every run is a process of its own, one after the other, round by round,
so that all meet the same machine: ratios are of the same round. "seconds" is the whole command; "work" is
without imports and start-up, where the program tells it. CPU seconds are user and system of the process and
say most on a machine that is not idle; "load" tells whether it was. Peak memory is the resident set. Methods
that OUT already holds are kept; "commits" tells of which code each is. mergekit runs in an environment of its
own: `pip install mergekit==0.1.5`.
"""

import compileall
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
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
WEIGHTS = (0.9, 0.4)


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge as mergekit's files have it."""

    parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the whole."""
    of_models: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of every model."""
    base: bool = True
    models: int = 2
    weighted: bool = True
    goal: float | None = None
    """Times the copy."""


METHODS = {
    "linear": Method(base=False, goal=1.5),
    "task_arithmetic": Method({"lambda": 0.7}, goal=1.5),
    "dare_linear": Method({"lambda": 0.7}, {"density": 0.5}, goal=3.0),
    "ties": Method({"lambda": 0.7}, {"density": 0.5}, goal=4.0),
    "breadcrumbs": Method({"lambda": 0.7}, {"density": 0.5, "gamma": 0.01}, goal=4.0),
    "breadcrumbs_ties": Method({"lambda": 0.7}, {"density": 0.5, "gamma": 0.01}),
    "dare_ties": Method({"lambda": 0.7}, {"density": 0.5}),
    "della_linear": Method({"lambda": 0.7}, {"density": 0.5, "epsilon": 0.1}),
    "della": Method({"lambda": 0.7}, {"density": 0.5, "epsilon": 0.1}),
    "sce": Method({"select_topk": 0.2}, weighted=False),
    "ram": Method(weighted=False),
    "ramplus_tl": Method(weighted=False),
    "model_stock": Method(weighted=False),
    "slerp": Method({"t": 0.3}, models=1, weighted=False),
    "nuslerp": Method(base=False),
    "multislerp": Method(),
    "karcher": Method(base=False, weighted=False),
    "nearswap": Method({"t": 0.001}, models=1, weighted=False),
    "arcee_fusion": Method(models=1, weighted=False),
    "passthrough": Method({}, {"scale": 0.5}, base=False, models=1, weighted=False),
    "ties_global": Method({"lambda": 0.7}, {"density": 0.5}, goal=4.0),
}
"""All of mergekit's, and one that it does not have."""
NOT_MERGEKITS = ("ties_global",)

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
    mergekit_rounds: int = 1
    """In so many of them mergekit runs, too, which takes minutes."""
    mergekit_python: Path | None = None
    """The interpreter of an environment with mergekit; without it mergekit is left out."""


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
    how = METHODS[method]
    base = {"base": str(folder / "base")} if how.base else {}
    names = ("one", "two")[: how.models]
    models = [
        (str(folder / n), ({"weight": w} if how.weighted else {}) | how.of_models)
        for n, w in zip(names, WEIGHTS, strict=False)
    ]
    ours = {"kind": "merge", "operator": method, **base, **how.parameters}
    if method == "slerp":  # its two models are symmetric
        ours |= {"base": None, "models": [{"model": base["base"]}, {"model": models[0][0]}]}
    else:
        ours["models"] = [{"model": m, **numbers} for m, numbers in models]
    theirs: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16", "parameters": how.parameters}
    theirs["models"] = [{"model": m, "parameters": numbers} for m, numbers in models]
    if base:
        theirs["base_model"] = base["base"]
    paths = folder / f"{method}.ours.yaml", folder / f"{method}.mergekit.yaml"
    for path, text in zip(paths, (ours, theirs), strict=True):
        path.write_text(json.dumps(text, indent=1))  # JSON is YAML
    return paths


def commands(arguments: Arguments, method: str, out: Path) -> Iterator[tuple[str, list[str]]]:
    folder, python = arguments.folder, sys.executable
    ours, theirs = recipes(folder, method)
    inputs = [folder / n / "model.safetensors" for n in ("base", "one", "two")]
    yield "copy", [python, "-c", _COPY, str(out), *map(str, inputs)]
    yield "jaxlab", [python, "run.py", "merge", str(ours), "--out", str(out)]
    yield "jaxlab, work", [python, "-c", _ENGINE, str(ours), str(out), "sampled"]
    if method in NOT_MERGEKITS:
        return
    yield "jaxlab, mergekit's file", [python, "run.py", "merge", str(theirs), "--out", str(out)]
    if arguments.mergekit_python is not None:
        yaml = arguments.mergekit_python.parent / "mergekit-yaml"
        yield "mergekit", [str(arguments.mergekit_python), str(yaml), str(theirs), str(out)]


def measured(command: list[str], out: Path) -> dict[str, Any]:
    """One run of a command, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)  # tells of this process alone, not of the largest so far
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        said.seek(0)
        lines = said.read().strip().splitlines()
    if process.returncode:
        return {"failed": (lines or ["?"])[-1]}
    work = [float(line.split()[1]) for line in lines if line.startswith("work ")]
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "work": work[0] if work else None,
        "load": os.getloadavg()[0],
    }


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and how many times the copy of its round each run took."""
    result: dict[str, Any] = {}
    for name, found in runs.items():
        failed = [run["failed"] for run in found if "failed" in run]
        if failed:
            result[name] = {"failed": failed[0]}
            continue
        median = lambda key, found=found: statistics.median(run[key] for run in found)
        line = {key: median(key) for key in ("seconds", "cpu_seconds", "peak_bytes", "load")}
        line["rounds"] = len(found)
        if found[0]["work"] is not None:
            line["work"] = median("work")
            pairs = zip(found, runs["copy"], strict=False)
            line["work_in_copies"] = statistics.median(run["work"] / copy["work"] for run, copy in pairs)
        pairs = zip(found, runs["copy"], strict=False)
        line["seconds_in_copies"] = statistics.median(run["seconds"] / copy["work"] for run, copy in pairs)
        result[name] = line
    if "seconds" in result.get("mergekit", {}):
        for name, line in result.items():
            if "seconds" in line and name != "mergekit":
                line["times_faster_than_mergekit"] = result["mergekit"]["seconds"] / line["seconds"]
                line["times_less_cpu_than_mergekit"] = result["mergekit"]["cpu_seconds"] / line["cpu_seconds"]
    return result


def plot(results: dict[str, Any], path: Path) -> None:
    """What every run took, by method: in copies, in CPU seconds and in memory."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 1.5 + 0.45 * len(results)), layout="constrained")
    names = ["jaxlab", "jaxlab, work", "jaxlab, mergekit's file", "mergekit", "copy"]
    places = np.arange(len(results))
    height = 0.8 / len(names)
    titles = {
        "seconds_in_copies": "seconds / those of the copy (ticks: the goal)",
        "cpu_seconds": "CPU seconds",
        "peak_bytes": "peak, GB",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for place, name in enumerate(names):
            values = []
            for found in results.values():
                run = found.get(name, {})
                own = run.get("work_in_copies" if key == "seconds_in_copies" else key, run.get(key)) or 0
                values.append(own / 1e9 if key == "peak_bytes" else own)
            axis.barh(places + place * height, values, height, label=name)
        axis.set_yticks(places + 0.4, list(results) if axis is axes[0] else [""] * len(results))
        axis.invert_yaxis()
        axis.set_title(title)
        axis.set_xscale("log")
    for place, method in enumerate(results):
        goal = METHODS[method].goal
        if goal is not None:
            axes[0].plot([goal, goal], [place - 0.1, place + 0.8], color="black")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=110)


def main(arguments: Arguments) -> None:
    if not (arguments.folder / "two").exists():
        make(arguments.folder, arguments.size)
    out = arguments.folder / "merged"
    for package in ("jaxlab", "kernels_pallas"):  # as pip does where it installs them, and mergekit
        compileall.compile_dir(package, quiet=1)
    versions = {}
    if arguments.mergekit_python is not None:
        code = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
        said = subprocess.run(
            [str(arguments.mergekit_python), "-c", code], capture_output=True, text=True, check=True
        )
        versions = dict(zip(("mergekit", "torch"), said.stdout.split(), strict=True))
    goals = {name: method.goal for name, method in METHODS.items() if method.goal is not None}
    record: dict[str, Any] = {"size": arguments.size, "goals_in_copies": goals, "results": {}}
    if arguments.out.exists():
        record = json.loads(arguments.out.read_text())
        if record["size"] != arguments.size:
            raise SystemExit(f"{arguments.out} holds a measurement of size {record['size']}")
    for method in arguments.methods:
        if method in record["results"]:
            continue
        found = dict(commands(arguments, method, out))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
        measured(found["copy"], out)  # warms the page cache
        rounds = {name: arguments.rounds for name in found}
        if "mergekit" in found:
            rounds["mergekit"] = min(arguments.mergekit_rounds, arguments.rounds)
        with tqdm(total=sum(rounds.values()), desc=method, unit="run") as bar:
            for number in range(arguments.rounds):
                for name, command in found.items():
                    if number < rounds[name]:
                        runs[name].append(measured(command, out))
                        bar.update()
        record["results"][method] = summary(runs)
        for name, line in record["results"][method].items():
            print(method, name, {key: round(v, 2) if isinstance(v, float) else v for key, v in line.items()})
        record["results"] = {name: record["results"][name] for name in METHODS if name in record["results"]}
        record["commits"] = record.get("commits", {}) | {method: environment()["commit"]}
        write_json(arguments.out, {**record, "versions": versions, "env": environment()})
        plot(record["results"], arguments.out.with_suffix(".png"))
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
