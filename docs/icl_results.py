"""Writes docs/icl_results.md and its pictures from docs/results/icl: what `run.py icl` saw on real data.

python docs/icl_results.py                          # the page, from committed results
python docs/icl_results.py --collect RUN [RUN ...]  # first takes over results of runs, without their maps
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxlab.files import write_atomic, write_json
from jaxlab.reporting import RunFolder, icl_verdicts, read_run
from jaxlab.reporting.papers.label_words import analysis_plots, plots
from jaxlab.reporting.plots import style

FOLDER = Path(__file__).parent / "results" / "icl"
PAGE = Path(__file__).parent / "icl_results.md"
PICTURES = Path(__file__).parent / "icl"

BULKY = ("figure1", "after")
"""Parts of the results that are not taken over."""
DRAWN: dict[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]] = {
    "flows": ("Flow shares by layer (figure 3)", plots.flow_shares_figure),
    "blocking": ("Blocking (figure 4)", plots.blocking_figure),
    "attention": ("AUCROC and R (figure 5)", analysis_plots.attention_figure),
    "diagnosis": ("Confusion, predicted and real (figure 6)", analysis_plots.diagnosis_figure),
    "reweighting": ("Anchor re-weighting (table 1)", analysis_plots.reweighting_figure),
    "compression": ("Compression (tables 2 and 3)", analysis_plots.compression_figure),
    "faithfulness": ("Flows beside what cutting their edges does", analysis_plots.faithfulness_figure),
    "many_shot": ("Flows by number of demonstrations", analysis_plots.many_shot_figure),
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", metavar="RUN", type=Path, nargs="+", help="folders of finished icl runs")
    arguments = parser.parse_args(words)
    for run in map(read_run, arguments.collect or ()):
        write_json(FOLDER / f"{run.label}.json", collect(run))
    runs = committed(FOLDER)
    for run in runs:
        for name, drawing in pictures(run).items():
            draw(drawing, PICTURES / f"{run.label}_{name}.svg")
    write_atomic(PAGE, page(runs))
    return 0


def collect(run: RunFolder) -> dict[str, Any]:
    """What is kept of a run."""
    env = {key: run.env[key] for key in ("commit", "dirty", "started", "seconds", "device_kind", "versions")}
    results = {name: value for name, value in run.results.items() if name not in BULKY}
    config = {k: run.config.get(k) for k in ("data", "examples", "seeds", "mode", "analyses", "batch_size")}
    config["data"] = {k: v for k, v in config["data"].items() if k in ("kind", "shots", "template")}
    return {"label": run.label, "config": config, "env": env, "results": results}


def committed(folder: Path) -> list[RunFolder]:
    """The runs that are kept, as a report sees them."""
    found = []
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        env = {**kept["env"], "task": "icl"}
        found.append(RunFolder(Path(kept["label"]), kept["config"], env, kept["results"]))
    return found


def pictures(run: RunFolder) -> dict[str, Figure]:
    """One of each analysis of a run that has something to show."""
    found = {}
    for name, (_, make) in DRAWN.items():
        defined = name != "attention" or run.get("attention", "aucroc")
        if run.get(name) and defined:
            found[name] = make(run.results)
    return found


def draw(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with style():
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def page(runs: Sequence[RunFolder]) -> str:
    """The whole page."""
    lines = [
        "# What `run.py icl` saw on real data",
        "",
        "<!-- Written by `python docs/icl_results.py` from docs/results/icl; not by hand. -->",
        "",
        "Runs of `configs/icl` on the paper's data sets, each judged alone by the rules of the report. A",
        "verdict of few prompts is one of few prompts: the table says how many. SmolLM2 has 135M parameters,",
        "the paper's models 1.5B and 6B; its file here is dequantised, so these are not figures of the",
        "original weights. `episodes` is the small model that is shipped, on made-up words: the claims in",
        "miniature.",
        "",
        "| run | prompts | seeds | accuracy | " + " | ".join(f"I{n}" for n in range(1, 9)) + " |",
        "|---|---|---|---|" + "---|" * 8,
    ]
    for run in runs:
        judged = {v.claim.id: v.status for v in icl_verdicts(run)}
        marks = {"seen": "**seen**", "not seen": "not seen", "not examined": ""}
        cells = [
            f"[{run.label}](#{run.label})",
            str(run.get("examples")),
            str(len(run.get("seeds") or [])),
            f"{100 * run.get('accuracy'):.0f} % (chance {100 * run.get('chance'):.0f})",
            *(marks[judged[f"I{n}"]] for n in range(1, 9)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for run in runs:
        lines += section(run)
    return "\n".join(lines) + "\n"


def section(run: RunFolder) -> list[str]:
    """One run: what made it, the verdicts with their figures, the pictures."""
    env = run.env
    dirty = " with changes" if env.get("dirty") else ""
    seconds = sum((run.get("seconds") or {}).values())
    lines = [
        f"## {run.label}",
        "",
        f"`configs/icl/{run.label}.yaml` with `examples: {run.setting('examples')}`, analyses "
        f"{', '.join(run.setting('analyses'))}; commit {str(env.get('commit'))[:10]}{dirty}, "
        f"{str(env.get('started'))[:10]}, {seconds / 60:.0f} minutes on a busy {env.get('device_kind')}.",
        "",
    ]
    alone = run.get("answers", "single_class")
    if alone:
        lines += [f"The model says {alone} to every prompt: accuracy and AUCROC tell nothing.", ""]
    for verdict in icl_verdicts(run):
        if verdict.status != "not examined":
            lines.append(f"- **{verdict.claim.id}, {verdict.status}.** {verdict.evidence}")
    lines.append("")
    for name in pictures(run):
        lines += [f"![{DRAWN[name][0]}](icl/{run.label}_{name}.svg)", ""]
    return lines


if __name__ == "__main__":
    sys.exit(main())
