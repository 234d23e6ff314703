"""Flows beside PyTorch's eager attention, time against memory, and beside a forward pass of the same model.

    python benchmarks/icl.py --torch-python torch/bin/python --out benchmarks/icl_cpu.json
    python benchmarks/icl.py --model SmolLM2-135M-Instruct-Q4_1.gguf --out icl_model.json

Of GPT-2's shape in float32: flows here with and without recomputing layers, the paper's way in PyTorch as
released and repaired (icl_torch.py). Each is a process of its own, one after the other, round by round, so
that all meet the same machine; figures are medians over the rounds, ratios are of the same round. CPU seconds
are what a busy machine leaves comparable. What `--out` holds of the same code stays and is not measured anew,
so that lengths can be done one by one. Bytes are the growth of the resident set over a process that holds
weights and program. The sums of all of them are compared. With --model: flows and blocking of prompts of that
model, in multiples of a forward pass that gives logits at the last position.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from icl_torch import DEFAULTS, draw, measured
from tqdm import tqdm

from jaxlab.app import environment
from jaxlab.files import write_json

OURS = {"jaxlab": "auto", "jaxlab, recomputing": "layer", "jaxlab, keeping": "elementwise"}
PEERS = {"torch, released": "released", "torch, repaired": "repaired"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    out: Path | None = None
    """Results as JSON, and a plot beside it."""
    torch_python: str = ""
    """A Python with torch; without it there are no peers."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    rounds: int = 3
    repeats: int = 3
    """Calls that are timed in a process."""
    skip: tuple[str, ...] = ("jaxlab, recomputing", "jaxlab, keeping")
    """Names that are left out."""
    model: str = ""
    """Measure this model instead."""
    prompts: int = 8
    tokens: int = 128
    child: str = ""
    """JSON: one measurement in this process (internal)."""


def child(sizes: dict[str, Any]) -> dict[str, Any]:
    """One measurement of GPT-2's shape."""
    import jax
    import jax.numpy as jnp

    from jaxlab.icl import flows
    from jaxlab.models import LearnedPositions, ModelConfig

    weights, tokens, classes = draw(sizes)
    d, count, heads = sizes["width"], sizes["layers"], sizes["heads"]
    config = ModelConfig(
        vocab_size=sizes["vocabulary"],
        width=d,
        num_layers=count,
        num_heads=heads,
        mlp="plain",
        mlp_width=4 * d,
        activation="gelu_tanh",
        norm="layer",
        position=LearnedPositions(),
        max_length=2048,
    )
    ones = lambda *lead: {"scale": jnp.ones((*lead, d)), "bias": jnp.zeros((*lead, d))}
    q, k, v = (jnp.asarray(x).reshape(count, d, heads, -1) for x in np.split(weights["qkv"], 3, axis=-1))
    params = {
        "embedding": {"table": jnp.asarray(weights["tokens"])},
        "position": {"table": jnp.asarray(weights["positions"])},
        "final_norm": ones(),
        "layers": {
            "attention_norm": ones(count),
            "mlp_norm": ones(count),
            "attention": {
                "query": q,
                "key": k,
                "value": v,
                "output": jnp.asarray(weights["out"]).reshape(count, heads, -1, d),
            },
            "mlp": {"up": jnp.asarray(weights["up"]), "down": jnp.asarray(weights["down"])},
        },
    }
    del weights
    targets = {
        "positions": np.full(sizes["batch"], sizes["length"] - 1),
        "label_tokens": [0, 1, 2],
        "labels": np.zeros(sizes["batch"], np.int32),
    }
    run = lambda: jax.block_until_ready(
        flows(params, {"tokens": tokens}, config, classes, targets, remat=sizes["remat"])[0]
    )
    run()  # compiles, which takes memory that is not that of the flows
    found, sums = measured(run, sizes["repeats"])
    return found | {"sums": np.asarray(sums).tolist()}


def of_model(arguments: Arguments) -> dict[str, Any]:
    """Flows and blocking of one model, in forward passes."""
    import jax

    from jaxlab import load_model
    from jaxlab.icl import blocked_logits, flows
    from jaxlab.icl.saliency import target_logits

    config, params, _ = load_model(arguments.model)
    rng = np.random.default_rng(0)
    shape = (arguments.prompts, arguments.tokens)
    batch = {"tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32)}
    classes = np.zeros(shape, np.int32)
    classes[:, 10::30], classes[:, -1] = 1, 2
    last = np.full(shape[0], shape[1] - 1, np.int32)
    targets = {"positions": last, "label_tokens": [5, 7, 9], "labels": np.zeros(shape[0], np.int32)}
    forward = jax.jit(target_logits, static_argnums=2)
    layers = np.zeros((3, config.num_layers), bool)
    layers[1:, :5] = True
    words = np.repeat((classes == 1)[None], 3, axis=0)
    calls = {
        "forward": lambda: forward(params, batch, config, last),
        "flows": lambda: flows(params, batch, config, classes, targets)[0],
        "flows, recomputing": lambda: flows(params, batch, config, classes, targets, remat="layer")[0],
        "flows, keeping": lambda: flows(params, batch, config, classes, targets, remat="elementwise")[0],
        "blocking, 1 setting": lambda: blocked_logits(params, batch, last, layers[:1], words[:1], config),
        "blocking, 3 settings": lambda: blocked_logits(params, batch, last, layers, words, config),
    }
    calls = {name: call for name, call in calls.items() if name not in arguments.skip}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in tqdm(range(arguments.rounds), unit="round"):
        for name, call in calls.items():
            taken[name].append(measured(lambda call=call: jax.block_until_ready(call()), 1)[0])
    found: dict[str, Any] = {}
    for name, rows in taken.items():
        found[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for key in ("seconds", "cpu_seconds"):
            pairs = zip(rows, taken["forward"], strict=True)
            found[name][f"{key}_in_forwards"] = statistics.median(row[key] / base[key] for row, base in pairs)
    few, many = taken.get("blocking, 1 setting"), taken.get("blocking, 3 settings")
    if few is not None and many is not None:
        found["blocking, one more setting"] = {
            f"{key}_in_forwards": statistics.median(
                (three[key] - one[key]) / 2 / base[key]
                for one, three, base in zip(few, many, taken["forward"], strict=True)
            )
            for key in ("seconds", "cpu_seconds")
        }
    return {"model": Path(arguments.model).name, "prompts": shape[0], "tokens": shape[1], "measured": found}


def process(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_shape(arguments: Arguments) -> dict[str, Any]:
    """GPT-2's shape at each length, beside the peers."""
    here = Path(__file__)
    names = [name for name in (*OURS, *PEERS) if name not in arguments.skip]
    names = [name for name in names if name in OURS or arguments.torch_python]
    rows: dict[str, list[dict[str, Any]]] = {}
    results = _measured_before(arguments.out)
    lengths = [n for n in arguments.lengths if any(str(n) not in results.get(name, {}) for name in names)]
    with tqdm(total=len(names) * len(lengths) * arguments.rounds, unit="process") as progress:
        for _ in range(arguments.rounds):
            for length in lengths:
                for name in names:
                    sizes = {"length": length, "repeats": arguments.repeats}
                    if name in OURS:
                        sizes = DEFAULTS | sizes | {"remat": OURS[name]}
                        command = [sys.executable, str(here), "--child", json.dumps(sizes)]
                    else:
                        sizes["kind"] = PEERS[name]
                        script = str(here.with_name("icl_torch.py"))
                        command = [arguments.torch_python, script, json.dumps(sizes)]
                    rows.setdefault(f"{name}/{length}", []).append(process(command))
                    progress.update()
    for name, found in _medians(rows, names, lengths).items():
        of_name = results.get(name, {}) | found
        results[name] = dict(sorted(of_name.items(), key=lambda item: int(item[0])))
    return {"shape": DEFAULTS, "results": results}


def _measured_before(out: Path | None) -> dict[str, dict[str, Any]]:
    """What the file holds of this state of the code."""
    if out is None or not out.exists():
        return {}
    found, now = json.loads(out.read_text()), environment()
    same = all(found["environment"][name] == now[name] for name in ("commit", "changes"))
    results: dict[str, dict[str, Any]] = found["results"] if same else {}
    return results


def _medians(
    rows: dict[str, list[dict[str, Any]]], names: list[str], lengths: list[int]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for length in lengths:
        base = rows.get(f"torch, repaired/{length}")
        for name in names:
            mine = rows[f"{name}/{length}"]
            keys = ("seconds", "cpu_seconds", "bytes")
            one: dict[str, float] = {key: statistics.median(row[key] for row in mine) for key in keys}
            one["rounds"] = len(mine)
            if base is not None:
                for key in keys:
                    ratios = [row[key] / other[key] for row, other in zip(mine, base, strict=True)]
                    one[f"{key}_over_repaired"] = statistics.median(ratios)
                expected, sums = (np.asarray(x[0]["sums"]) for x in (base, mine))
                one["largest_difference"] = float(np.abs(sums - expected).max() / np.abs(expected).max())
            found[name][str(length)] = one
    return found


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Seconds against memory, a line for each program, a point for each length."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, rows in results["results"].items():
        memory = [max(row["bytes"], 1) / 2**20 for row in rows.values()]
        axes.plot(memory, [row["cpu_seconds"] for row in rows.values()], "o-", label=name)
        for length, x, row in zip(rows, memory, rows.values(), strict=True):
            axes.annotate(
                length, (x, row["cpu_seconds"]), fontsize=7, xytext=(3, -8), textcoords="offset points"
            )
    axes.set(xscale="log", yscale="log", xlabel="MiB beyond weights", ylabel="CPU seconds a prompt")
    axes.set_title("Flows of GPT-2's shape, float32, by tokens of the prompt")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    found = of_model(arguments) if arguments.model else of_shape(arguments)
    found["environment"] = environment()
    print(json.dumps({key: value for key, value in found.items() if key != "environment"}, indent=1))
    if arguments.out is not None:
        write_json(arguments.out, found)
        if "results" in found:
            draw_plot(found, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
