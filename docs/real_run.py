"""Writes docs/real_run.md and its pictures: a pair of 10 M parameters, and SmolLM2 made sparse, on real text.

    python docs/real_run.py                                # the page, from docs/results/real_run.json
    python docs/real_run.py --collect OUTPUTS              # first takes over what the runs have given so far
    python docs/real_run.py --measure OUTPUTS --cool 20    # before that cools both down and measures them

OUTPUTS is the folder that `run.py train configs/train/real_text_*.yaml --outputs OUTPUTS` wrote to. The pair
is compared at the newest step of which both have a checkpoint: copies of it are trained on for `--cool` steps
in which the learning rate falls to 0, and these models are measured. The runs themselves go on as they were.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from jaxlab.app import read_metrics
from jaxlab.files import write_atomic, write_json
from jaxlab.reporting import RunFolder, plots, read_run
from jaxlab.reporting.plots import style

RESULTS = Path(__file__).parent / "results" / "real_run.json"
PAGE = Path(__file__).parent / "real_run.md"
PICTURES = Path(__file__).parent / "real_run"
NAMES = {"nsa": "NSA", "full": "full attention"}
LENGTHS = (128, 256, 512, 1024)
SIZES = ("block_len", "stride", "block_size", "num_blocks", "window")
POINTS = 300
"""Of a curve that are kept at most."""
SHARES = {
    "best": "best blocks",
    "with_window": "chosen blocks and window",
    "chosen": "chosen blocks",
    "random": "blocks by lot",
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", metavar="OUTPUTS", type=Path)
    parser.add_argument("--collect", metavar="OUTPUTS", type=Path)
    parser.add_argument("--cool", type=int, default=20, help="steps in which the learning rate falls to 0")
    parser.add_argument("--at", type=int, help="the step to compare at, instead of the newest of both")
    parser.add_argument(
        "--retrofit", metavar="RUN", type=Path, help="a run of configs/train/smollm2_nsa.yaml"
    )
    arguments = parser.parse_args(words)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if arguments.measure:
        measure(arguments.measure, arguments.cool, arguments.at)
    if outputs := arguments.measure or arguments.collect:
        kept |= collect(outputs)
    if arguments.retrofit:
        kept["retrofit"] = collect_retrofit(arguments.retrofit)
    if outputs or arguments.retrofit:
        write_json(RESULTS, kept)
    for name, figure in pictures(kept).items():
        PICTURES.mkdir(exist_ok=True)
        with style():
            figure.savefig(PICTURES / f"{name}.svg", format="svg", facecolor="white", metadata={"Date": None})
    write_atomic(PAGE, page(kept))
    return 0


# The runs


def trunk(outputs: Path, name: str) -> Path:
    """The run of the pair that is not a cool-down, the one that has come furthest.

    Raises:
      SystemExit: there is none that has come to a line of metrics.
    """
    found = {}
    for folder in (outputs / "train").glob(f"real_text_{name}-*"):
        steps = [m["step"] for m in read_metrics(folder)]
        if steps and "\ncontinue_from: null" in (folder / "config.yaml").read_text(encoding="utf-8"):
            found[folder] = max(steps)
    if not found:
        raise SystemExit(f"{outputs}: no run of configs/train/real_text_{name}.yaml with metrics")
    return max(found, key=lambda folder: found[folder])


def checkpoints(folder: Path) -> set[int]:
    places = (folder / "checkpoints").glob("*")
    return {int(place.name) for place in places if place.is_dir() and place.name.isdecimal()}


def measure(outputs: Path, cool: int, at: int | None) -> None:
    """Cools both runs down from one step, and measures them."""
    trunks = {name: trunk(outputs, name) for name in NAMES}
    both = set.intersection(*map(checkpoints, trunks.values()))
    if not both or (at is not None and at not in both):
        raise SystemExit(
            f"both have checkpoints of the steps {sorted(both) or 'none'}; keep.every keeps some"
        )
    step = at or max(both)
    for name, folder in trunks.items():
        place = outputs / "cooled" / f"{name}-{step}"
        if not place.exists():
            shutil.copytree(folder / "checkpoints" / str(step), place / "checkpoints" / str(step))
        steps = step + cool
        run(
            "train",
            f"configs/train/real_text_{name}.yaml",
            *("--continue_from", str(place), "--steps", str(steps)),
            *("--optimizer.decay_fraction", str(cool / steps), "--outputs", str(outputs)),
        )
        model = str(cooled(outputs, name, step + cool, place).path)
        there = ("--model", model, "--outputs", str(outputs))
        run("evaluate", "configs/train/real_text_test.yaml", *there)
        lengths = f"data.sequence_length={json.dumps(LENGTHS).replace(' ', '')}"
        run("evaluate", "configs/train/real_text_needle.yaml", *there, "--sweep", lengths)
        run("evaluate", "configs/train/real_text_choices.yaml", *there)


def run(*words: str) -> None:
    print("python run.py", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "run.py", *words], check=True)


def cooled(outputs: Path, name: str, steps: int, place: Path) -> RunFolder:
    """The finished cool-down of a copied checkpoint."""
    for folder in (outputs / "train").glob(f"real_text_{name}-*"):
        if (folder / "results.json").exists():
            found = read_run(folder)
            if found.setting("continue_from") == str(place) and found.setting("steps") == steps:
                return found
    raise SystemExit(f"{place}: its cool-down is not done")


# What is kept


def collect(outputs: Path) -> dict[str, Any]:
    """What the runs have given so far, and the newest measures of cooled ones."""
    kept: dict[str, Any] = {"runs": {name: collect_run(trunk(outputs, name)) for name in NAMES}}
    evaluated = [read_run(p.parent) for p in (outputs / "evaluate").glob("*/results.json")]
    done: dict[int, dict[str, Any]] = {}
    for name in NAMES:
        for folder in (outputs / "train").glob(f"real_text_{name}-*/results.json"):
            found = read_run(folder.parent)
            if found.setting("continue_from") is not None:
                mine = [run for run in evaluated if run.setting("model") == str(found.path)]
                done.setdefault(found.setting("steps"), {})[name] = collect_cooled(found, mine)
    whole = [steps for steps, both in done.items() if set(both) == set(NAMES)]
    if whole:
        kept["cooled"] = done[max(whole)]
    return kept


def collect_run(folder: Path) -> dict[str, Any]:
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    metrics = read_metrics(folder)
    curve = [[m["step"], round(m["loss"], 4)] for m in metrics if "loss" in m]
    sources = next((m["loss_by_source"] for m in reversed(metrics) if "loss_by_source" in m), {})
    return {
        "env": {name: env[name] for name in ("commit", "dirty", "started", "device_kind", "versions")},
        "pieces": 1 + len(env.get("interrupted", [])),
        "curve": curve[:: -(-len(curve) // POINTS) or 1],
        "step": curve[-1][0] if curve else 0,
        "held_out": [[m["step"], round(m["eval_loss"], 4)] for m in metrics if "eval_loss" in m],
        "sources": {name: round(loss, 3) for name, loss in sources.items()},
    }


def collect_cooled(found: RunFolder, evaluated: Sequence[RunFolder]) -> dict[str, Any]:
    texts = [run for run in evaluated if run.setting("data", "kind") == "documents"]
    needles = [run for run in evaluated if run.get("needle")]
    choices = [run for run in evaluated if run.get("accuracy") is not None]
    text = texts[0] if texts else None
    keys = ("depth", "exact_match", "sequences")
    return {
        "steps": found.get("steps"),
        "cool": round(found.setting("optimizer", "decay_fraction") * found.get("steps")),
        "parameters": found.get("parameters"),
        "tokens_per_step": found.setting("batch_size") * found.setting("data", "sequence_length"),
        "length": found.setting("data", "sequence_length"),
        "validation": found.get("validation", "eval_loss"),
        "test": text.get("loss") if text else None,
        "targets": text.get("targets") if text else None,
        "by_position": [
            [(p["first"] + p["last"]) / 2, p["loss"]]
            for p in (text.get("by_position") if text else [])
            if p["loss"] is not None
        ],
        "needle": {
            str(run.get("needle", "length")): [
                {key: at[key] for key in keys} for at in run.get("needle", "depths")
            ]
            for run in sorted(needles, key=lambda run: run.get("needle", "length"))
        },
        "choices": {k: choices[0].get(k) for k in ("accuracy", "accuracy_by_length", "questions")}
        if choices
        else None,
    }


def collect_retrofit(folder: Path) -> dict[str, Any]:
    """What a retrofit has given so far: its measures before the first step, and the loss where it is done."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    metrics = read_metrics(folder)
    done = read_run(folder).get("retrofit") if (folder / "results.json").exists() else None
    found = done or metrics[0]["retrofit"]
    curve = [[m["step"], m["loss"]] for m in metrics if "loss" in m]
    return {
        "env": {name: env[name] for name in ("commit", "dirty", "started", "device_kind")},
        "steps": curve[-1][0] if curve else 0,
        "batch_size": config["batch_size"],
        "attention": {name: config["model"]["attention"][name] for name in SIZES},
        "curve": curve,
        "held_out": [[m["step"], m["eval_loss"]] for m in metrics if "eval_loss" in m],
        **{name: found[name] for name in ("loss", "coverage", "choice", "sequences", "length")},
    }


# The page


def pictures(kept: Mapping[str, Any]) -> dict[str, Figure]:
    found = {}
    if runs := kept.get("runs"):
        curves = {
            key: {NAMES[name]: [curve(run[key])] for name, run in runs.items()}
            for key in ("curve", "held_out")
        }
        found["loss"] = plots.loss_figure(curves["curve"], curves["held_out"])
    if both := kept.get("cooled"):
        positions = {
            NAMES[name]: [tuple(point) for point in one["by_position"]]
            for name, one in both.items()
            if one["by_position"]
        }
        if positions:
            found["position"] = plots.position_figure(positions, "nats per token")
        panels = [needle_panel(NAMES[name], one["needle"]) for name, one in both.items() if one["needle"]]
        if panels:
            found["needle"] = plots.heat_maps(panels, 2, "depth of the fact", "length (tokens)")
    if retrofit := kept.get("retrofit"):
        lines = {said: retrofit["coverage"][name] for name, said in SHARES.items()}
        found["coverage"] = plots.layer_figure(lines, "share of attention")
    return found


def curve(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Steps and values."""
    return [point[0] for point in points], [point[1] for point in points]


def needle_panel(title: str, needle: Mapping[str, Any]) -> dict[str, Any]:
    """Found facts, a row for each depth, a column for each length."""
    depths = max(map(len, needle.values()))
    return {
        "title": title,
        "rows": [round(i / max(depths - 1, 1), 2) for i in range(depths)],
        "columns": [int(length) for length in needle],
        "values": [[at[i]["exact_match"] for at in needle.values()] for i in range(depths)],
    }


def page(kept: Mapping[str, Any]) -> str:
    lines = [
        "# Real runs: a pair of 10 M parameters, and SmolLM2 made sparse",
        "",
        "<!-- Written by `python docs/real_run.py` from docs/results/real_run.json; not by hand. -->",
        "",
        "One model with Native Sparse Attention and one with full attention, otherwise equal: parameters (to",
        "0.1 %), texts and their order, optimizer, schedule, seed. They read Python's standard library, the",
        "packages beside it and their documentation (50 MB; `docs/real_text.py` takes any installation), in",
        "a tokenizer of 4,096 tokens made of these texts, 1,024 tokens at a time. A quarter of the rows are",
        "texts with facts in them that are asked for at the end, for the needle.",
        "",
        "The runs are stopped and go on as a machine has time for them; this page is what they have come to.",
        "",
    ]
    if runs := kept.get("runs"):
        lines += run_lines(runs, kept.get("cooled"))
    if both := kept.get("cooled"):
        lines += cooled_lines(both)
    if retrofit := kept.get("retrofit"):
        lines += retrofit_lines(retrofit)
    return "\n".join([*lines, *HOW]) + "\n"


def run_lines(runs: Mapping[str, Any], both: Mapping[str, Any] | None) -> list[str]:
    rows = []
    for name, run in runs.items():
        last = run["held_out"][-1] if run["held_out"] else [None, None]
        sources = ", ".join(f"{source} {loss:.2f}" for source, loss in run["sources"].items())
        told = "–" if last[0] is None else f"{last[1]:.3f} (step {last[0]:,})"
        rows.append(f"| {NAMES[name]} | {run['step']:,} | {told} | {sources} |")
    env = next(iter(runs.values()))["env"]
    size = next(iter(both.values()))["tokens_per_step"] if both else None
    return [
        "## Losses so far",
        "",
        f"Nats per token, of 3 bytes on the mean. {'' if size is None else f'A step reads {size:,} tokens. '}"
        f"Learning rate: warm-up, then constant (WSD). Begun {env['started'][:10]} at commit "
        f"{env['commit'][:10]}, one {env['device_kind']} core each, shared with other work.",
        "",
        "| attention | steps | validation loss | training loss by source |",
        "|---|---|---|---|",
        *rows,
        "",
        "![Loss by step](real_run/loss.svg)",
        "",
    ]


def cooled_lines(both: Mapping[str, Any]) -> list[str]:
    one = next(iter(both.values()))
    tokens = one["steps"] * one["tokens_per_step"]
    lines = [
        "## Compared after equal steps",
        "",
        f"Both cooled down (the learning rate falls to 0 over the last {one['cool']} steps), after "
        f"{one['steps']:,} steps: {tokens:,} tokens, {tokens / one['parameters']:.2f} for each parameter. A "
        "model of this size would want about 20.",
        "",
        "| attention | parameters | test loss | needles found at 1,024 tokens, worst / mean depth | "
        "choices right |",
        "|---|---|---|---|---|",
    ]
    for name, found in both.items():
        needle = [at["exact_match"] for at in found["needle"].get(str(found["length"]), [])]
        told = f"{100 * min(needle):.0f} / {100 * sum(needle) / len(needle):.0f} %" if needle else "–"
        choices = found["choices"]
        right = f"{100 * choices['accuracy_by_length']:.0f} % of {choices['questions']}" if choices else "–"
        loss = "–" if found["test"] is None else f"{found['test']:.4f}"
        lines.append(f"| {NAMES[name]} | {found['parameters']:,} | {loss} | {told} | {right} |")
    lines += [
        "",
        "Test files are no training files. Of the needles one fact stands in a held-out text, at one of ten",
        "depths; its key was not trained on, and a model that knows the 32 values alone finds 3 %. Of the",
        "choices one of four stretches of about 100 letters goes on with a text: 25 % by chance.",
        "What this says of claims N1 and N2 stands in [claims.md](claims.md).",
        "",
    ]
    if any(found["by_position"] for found in both.values()):
        lines += ["![Test loss by position in a text](real_run/position.svg)", ""]
    if any(found["needle"] for found in both.values()):
        lines += ["![Facts found, by depth and length, percent](real_run/needle.svg)", ""]
    return lines


def retrofit_lines(found: Mapping[str, Any]) -> list[str]:
    loss, a = found["loss"], found["attention"]
    lines = [
        "## SmolLM2-135M-Instruct made sparse",
        "",
        "Keys and values of the dense model begin the three branches ([retrofit.md](retrofit.md)): "
        f"{a['num_blocks']} blocks of {a['block_size']} are read and a window of {a['window']}, at "
        f"{found['length']:,} tokens, where {100 * found['choice']:.0f} % of the queries see more than they "
        f"may read. So far {found['steps']} steps of {found['batch_size']} x {found['length']:,} tokens of the "
        "same text followed. The file is dequantised (Q4_1): these are not figures of the original weights.",
        "",
        "| loss of one held-out batch, nats per token | |",
        "|---|---|",
        f"| dense | {loss['dense']:.4f} |",
        f"| NSA, made of it | {loss['retrofitted']:.4f} |",
        *([f"| NSA after {found['steps']} steps | {loss['trained']:.4f} |"] if "trained" in loss else []),
        "",
        "The dense model was not trained on: that the last line may lie below the first says nothing for",
        "NSA.",
        *([trained_so_far(found["curve"])] if found["curve"] else []),
        "",
        "![What the blocks hold of the dense attention, by layer](real_run/coverage.svg)",
        "",
    ]
    return lines


def trained_so_far(curve: Sequence[Sequence[float]]) -> str:
    told = ", ".join(f"{loss:.3f}" for _, loss in curve)
    return f"Training loss of step {curve[0][0]} to {curve[-1][0]}: {told}."


HOW = [
    "## How to do it, and to go on",
    "",
    "```",
    "python docs/real_text.py                                       # the corpus: outputs/real_text",
    "python run.py train configs/train/real_text_nsa.yaml           # SIGTERM stops it, the same goes on",
    "python run.py train configs/train/real_text_full.yaml",
    "python docs/real_run.py --measure outputs --cool 20            # compare, measure, this page",
    "python run.py train configs/train/smollm2_nsa.yaml",
    "python docs/real_run.py --retrofit outputs/train/smollm2_nsa-1a2b3c4d",
    "python docs/claims.py",
    "```",
    "",
    "The runs keep a checkpoint every 1,000 steps, and the pair is compared at the newest step of which both",
    "have one; `--keep.every 50` keeps more of them.",
]


if __name__ == "__main__":
    sys.exit(main())
