"""Writes docs/icl_results.md and its pictures from docs/results/icl: what `run.py icl` saw on real data.

python docs/icl_results.py                          # the page, from committed results
python docs/icl_results.py --collect RUN [RUN ...]  # first takes over results of runs, without their maps

Runs of one config that did different analyses are kept side by side, `NAME=RUN` under a name of its own.
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

DRAWN: dict[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]] = {
    "flows": ("Flow shares by layer (figure 3)", plots.flow_shares_figure),
    "blocking": ("Blocking (figure 4)", plots.blocking_figure),
    "attention": ("AUCROC and R (figure 5)", analysis_plots.attention_figure),
    "diagnosis": ("Confusion, predicted and real (figure 6)", analysis_plots.diagnosis_figure),
    "reweighting": ("Anchor re-weighting (table 1)", analysis_plots.reweighting_figure),
    "compression": ("Compression (tables 2 and 3)", analysis_plots.compression_figure),
    "faithfulness": ("Flows beside what cutting their edges does", analysis_plots.faithfulness_figure),
    "heads": ("Heads: label flow beside other scores", analysis_plots.heads_figure),
    "many_shot": ("Flows by number of demonstrations", analysis_plots.many_shot_figure),
}
TASKS = {"sst2": "SST-2", "trec": "TREC", "agnews": "AGNews", "emoc": "EmoC"}
PAPER = {
    "sst2": (61.28, 64.75, 90.07),
    "trec": (57.56, 60.40, 60.92),
    "agnews": (73.32, 52.52, 81.94),
    "emoc": (15.44, 9.80, 41.64),
}
"""GPT2-XL in table 1 of the paper: 1 shot, 5 shots (AGNews 3), re-weighted; percent."""
PAPER_COMPRESSION = {
    "hidden_anchor": (79.47, 62.17),
    "text_anchor": (51.05, 36.65),
    "hidden_random": (48.96, 5.59),
    "hidden_random_top": (57.52, 4.49),
}
"""GPT2-XL in table 2: label loyalty, word loyalty, means over the four sets; percent."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", metavar="RUN", nargs="+", help="folders of finished icl runs")
    arguments = parser.parse_args(words)
    for words in arguments.collect or ():
        name, _, folder = words.rpartition("=")
        run = read_run(Path(folder))
        kept = collect(run, name or run.label)
        write_json(FOLDER / f"{kept['label']}.json", kept)
        if run.get("figure1"):  # its maps are not kept, the picture is
            draw(plots.prompt_figure(run.results), PICTURES / f"{kept['label']}_figure1.svg")
    runs = committed(FOLDER)
    for run in runs:
        for name, drawing in pictures(run).items():
            draw(drawing, PICTURES / f"{run.label}_{name}.svg")
    write_atomic(PAGE, page(runs))
    return 0


def collect(run: RunFolder, name: str) -> dict[str, Any]:
    """What is kept of a run: all but the maps of figure 1, and the command that makes it anew."""
    names = ("commit", "dirty", "started", "seconds", "device_kind", "versions")
    env = {**{key: run.env[key] for key in names}, "pieces": 1 + len(run.env.get("interrupted", []))}
    results = without_maps(run.results)
    if "after" in results:
        results["after"] = without_maps(results["after"])
    config = {k: run.config.get(k) for k in ("data", "examples", "seeds", "mode", "analyses", "batch_size")}
    config["data"] = {
        k: v for k, v in config["data"].items() if k in ("kind", "shots", "template", "mixture")
    }
    return {"label": name, "command": command(run), "config": config, "env": env, "results": results}


def command(run: RunFolder) -> str:
    """With what was given beside the config; the model and the folder of the data are the reader's."""
    config = run.config
    data = "" if config["data"]["kind"] in ("episodes", "digits") else " --data.path FOLDER"
    lists = {name: json.dumps(config[name]).replace('"', "") for name in ("seeds", "analyses")}
    return (
        f"python run.py icl configs/icl/{run.label}.yaml{data} --examples {config['examples']} --batch_size "
        f"{config['batch_size']} --seeds '{lists['seeds']}' --analyses '{lists['analyses']}'"
    )


def without_maps(results: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(results)
    if "figure1" in found:
        found["figure1"] = {name: found["figure1"][name] for name in ("answer", "prediction")}
    return found


def committed(folder: Path) -> list[RunFolder]:
    """The runs that are kept, as a report sees them."""
    found = []
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        env = {**kept["env"], "task": "icl", "command": kept["command"]}
        found.append(RunFolder(Path(kept["label"]), kept["config"], env, kept["results"]))
    return found


def pictures(run: RunFolder) -> dict[str, Figure]:
    """One of each analysis of a run that has something to show."""
    found = {}
    for name, (_, make) in DRAWN.items():
        defined = name != "attention" or run.get("attention", "aucroc")
        if run.get(name) and defined and not (name == "flows" and run.get("after")):
            found[name] = make(run.results)
    if run.get("after"):
        both = {"before": run.results, "after": run.get("after")}
        found["after"] = analysis_plots.cross_modal_figure(both)
        found["difference"] = analysis_plots.difference_figure(*both.values())
    return found


def draw(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with style():
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def page(runs: Sequence[RunFolder]) -> str:
    """The whole page."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(task_of(run), []).append(run)
    order = [*TASKS.values(), *(name for name in groups if name not in TASKS.values())]
    groups = {name: groups[name] for name in order if name in groups}
    lines = [
        "# What `run.py icl` saw on real data",
        "",
        "<!-- Written by `python docs/icl_results.py` from docs/results/icl; not by hand. -->",
        "",
        "Runs of `configs/icl` on the paper's data sets, each judged alone by the rules of the report. A",
        "verdict of few prompts is one of few prompts: behind each stands how many. SmolLM2 has 135M",
        "parameters, the paper's models 1.5B and 6B; its file here is dequantised, so these are not figures",
        "of the original weights. `episodes` is the small model that is shipped, on made-up words: the",
        "claims in miniature. The claims are told in [claims.md](claims.md).",
        "",
        "| task | " + " | ".join(f"I{n}" for n in range(1, 9)) + " |",
        "|---|" + "---|" * 8,
    ]
    for name, members in groups.items():
        cells = [verdict_cell(members, f"I{n}") for n in range(1, 9)]
        if any(cells):
            lines.append(f"| [{name}](#{anchor(name)}) | " + " | ".join(cells) + " |")
    lines += ["", *accuracies(groups), *compressions(groups)]
    for name, members in groups.items():
        lines += [f"## {name}", ""]
        for run in members:
            lines += section(run)
    return "\n".join(lines) + "\n"


def task_of(run: RunFolder) -> str:
    kind = str(run.setting("data", "kind"))
    return TASKS.get(kind, run.label)


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def verdict_cell(runs: Sequence[RunFolder], claim: str) -> str:
    """What the runs of one task say of a claim, and of how many prompts."""
    judged = [(run, v) for run in runs for v in icl_verdicts(run) if v.claim.id == claim]
    told = [
        f"{'**seen**' if v.status == 'seen' else v.status} ({run.get('examples')})"
        for run, v in judged
        if v.status != "not examined"
    ]
    undefined = claim == "I5" and any(
        run.get("attention") and not run.get("attention", "aucroc") for run in runs
    )
    return "; ".join(told) or ("undefined" if undefined else "")


def accuracies(groups: Mapping[str, Sequence[RunFolder]]) -> list[str]:
    """Accuracy of each run by seed, beside the paper's GPT2-XL."""
    lines = [
        "## Accuracy",
        "",
        "Percent, by seed (of demonstrations, queries and their order). Where a model gives one answer to",
        "every prompt, accuracy, label loyalty and AUCROC say nothing of it and are undefined.",
        "",
        "| run | prompts | by seed | mean | chance | GPT2-XL in the paper |",
        "|---|---|---|---|---|---|",
    ]
    for members in groups.values():
        for run in members:
            alone = run.get("answers", "single_class")
            by_seed = run.get("answers", "accuracy_by_seed") or []
            mean = f"undefined: {alone} to every prompt" if alone else f"{100 * run.get('accuracy'):.0f}"
            paper = PAPER.get(run.get("data"))
            chance = f"{100 * run.get('chance'):.0f}" if run.get("labels") else ""
            lines.append(
                f"| {run.label} | {run.get('examples')} | {', '.join(f'{100 * x:.0f}' for x in by_seed)} | "
                f"{mean} | {chance} | {paper[0] if paper else ''} |"
            )
    table = [
        f"| {run.label} | {run.get('examples')} | "
        + " | ".join(f"{100 * row['accuracy']:.1f}{mark(row)}" for row in run.get("reweighting", "table"))
        + f" | {', '.join(str(x) for x in PAPER[run.get('data')])} |"
        for members in groups.values()
        for run in members
        if run.get("reweighting") and run.get("data") in PAPER
    ]
    if table:
        lines += [
            "",
            "Re-weighted attention to label words beside plain prompts (I6); of AGNews the paper's second",
            "number is of 3 shots. *: one answer to every prompt.",
            "",
            "| run | prompts | 1 shot | more shots | 1 shot, re-weighted | GPT2-XL in the paper |",
            "|---|---|---|---|---|---|",
            *table,
        ]
    return [*lines, ""]


def mark(row: Mapping[str, Any]) -> str:
    return "\\*" if row.get("single_class") else ""


def compressions(groups: Mapping[str, Sequence[RunFolder]]) -> list[str]:
    """Loyalties of each way to compress, by run."""
    body = []
    for members in groups.values():
        for run in members:
            if not run.get("compression"):
                continue
            rows = {row["method"]: row for row in run.get("compression", "table")}
            hidden = run.get("compression", "undefined") or []
            cell = lambda row, name: "–" if name in hidden else f"{100 * row[name]:.0f}"  # noqa: B023
            cells = [
                f"{cell(rows[m], 'label_loyalty')} / {cell(rows[m], 'word_loyalty')}"
                for m in PAPER_COMPRESSION
            ]
            speed = run.get("compression", "speed_up")
            cells += [f"{speed[name]:.2f}" for name in ("against_the_whole_prompt", "against_a_full_cache")]
            body.append(f"| {run.label} | {run.get('examples')} | " + " | ".join(cells) + " |")
    if not body:
        return []
    paper = " | ".join(f"{a:.0f} / {b:.0f}" for a, b in PAPER_COMPRESSION.values())
    return [
        "## Compression",
        "",
        "Label loyalty / word loyalty in percent (–: undefined), and how many times as fast a query is from",
        "the anchors' cache.",
        "",
        "| run | prompts | Hidden_anchor | Text_anchor | Hidden_random | Hidden_random-top | than the whole "
        "prompt | than a full cache |",
        "|---|---|---|---|---|---|---|---|",
        *body,
        f"| GPT2-XL in the paper, mean of four sets | 1000 x 5 | {paper} | 1.1 to 2.5 | |",
        "",
    ]


def section(run: RunFolder) -> list[str]:
    """One run: what made it, the verdicts with their figures, the pictures."""
    env = run.env
    dirty = " with changes" if env.get("dirty") else ""
    minutes = f"{sum((run.get('seconds') or {}).values()) / 60:.0f} minutes"
    if env.get("pieces", 1) > 1:
        minutes = f"stopped and taken up again {env['pieces'] - 1} times"
    lines = [
        f"### {run.label}",
        "",
        f"`{run.command}`",
        "",
        f"{run.get('examples')} prompts; commit {str(env.get('commit'))[:10]}{dirty}, "
        f"{str(env.get('started'))[:10]}, {minutes} on a busy {env.get('device_kind')}.",
        "",
    ]
    alone = run.get("answers", "single_class")
    if alone:
        lines += [f"The model says {alone} to every prompt: accuracy and AUCROC are undefined.", ""]
    for verdict in icl_verdicts(run):
        if verdict.status != "not examined":
            lines.append(f"- **{verdict.claim.id}, {verdict.status}.** {verdict.evidence}")
    lines += [*beyond(run), ""]
    if run.get("figure1"):
        lines += [f"![One prompt (figure 1)](icl/{run.label}_figure1.svg)", ""]
    captions = {name: caption for name, (caption, _) in DRAWN.items()} | AFTER
    for name in pictures(run):
        lines += [f"![{captions[name]}](icl/{run.label}_{name}.svg)", ""]
    return lines


AFTER = {
    "after": "Flows between the parts of the prompt, before and after",
    "difference": "Difference of the shares, after less before",
}


def beyond(run: RunFolder) -> list[str]:
    """What analyses that are ours say, a line each."""
    lines = []
    by_seed = run.get("diagnosis", "correlation_by_seed")
    if by_seed and None not in by_seed:
        lines.append(f"- Correlations of I8 by seed: {', '.join(f'{x:.2f}' for x in by_seed)}.")
    if found := run.get("faithfulness"):
        lines.append(
            "- Faithfulness: over layers and pairs of classes flows and the change of the loss when their "
            f"edges are cut have a rank correlation of {found['of_means']['spearman']:.2f} (means over "
            f"{found['prompts']} prompts), {found['of_prompts']['spearman']:.2f} within a prompt."
        )
    if found := run.get("heads"):
        agree, top = found["correlation"], found["top"]
        told = ", ".join(f"{r['layer']}.{r['head']} ({100 * r['pq_share']:.0f} %)" for r in top[:5])
        lines.append(
            f"- Heads that carry most of S_pq (layer.head): {told}. Rank correlation over {found_heads(run)} "
            "heads of the share of S_pq with the function-vector score "
            f"{agree['pq_function_vector']:.2f}, with the induction score {agree['pq_induction']:.2f}; of "
            f"{found['prompts']} prompts."
        )
    if found := run.get("many_shot"):
        ends = [(r["shots"], r["share"]["wp"], r["share"]["pq"]) for r in found["table"]]
        rows = [f"{n}: {mean_of(wp, first=True):.0f} / {mean_of(pq, first=False):.0f}" for n, wp, pq in ends]
        lines.append(
            "- Demonstrations of each label: share of S_wp in the first / of S_pq in the last third of the "
            f"layers, percent: {'; '.join(rows)} ({found['prompts']} prompts)."
        )
    if after := run.get("after"):
        lines.append(f"- {told_after(run, after)}")
    return lines


def found_heads(run: RunFolder) -> int:
    return sum(map(len, run.get("heads", "scores", "pq")))


def mean_of(values: Sequence[float], *, first: bool) -> float:
    size = max(1, len(values) // 3)
    part = values[:size] if first else values[-size:]
    return 100 * sum(part) / size


def told_after(run: RunFolder, after: Mapping[str, Any]) -> str:
    """What the second model of a run does otherwise with the same prompts."""
    parts = []
    for one in (run.results, after):
        into = {
            pair.partition("_to_")[0]: sum(values)
            for pair, values in one["flows"]["mean"].items()
            if pair.endswith("_to_answer")
        }
        parts.append(100 * into["image"] / sum(into.values()))
    return (
        f"Before the injection {100 * run.get('accuracy'):.0f} % of {run.get('examples')} prompts are "
        f"answered rightly, after it {100 * after['accuracy']:.0f} %. Flows are of the loss, so that all are "
        "smaller where the model is right; of the mean flows into the place of the answer, summed over the "
        f"layers, the image's part is {parts[0]:.0f} % before and {parts[1]:.0f} % after."
    )


if __name__ == "__main__":
    sys.exit(main())
