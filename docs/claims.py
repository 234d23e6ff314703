"""Writes docs/claims.md from the results in docs/results: what was seen of each claim of the three papers.

python docs/claims.py                               # the page, from committed results
python docs/claims.py --collect outputs/quickstart  # first takes over the verdicts of a quickstart
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab.files import write_atomic, write_json
from jaxlab.reporting import (
    CLAIMS,
    Claim,
    RunFolder,
    Verdict,
    build_sections,
    icl_verdicts,
    read_run,
    read_runs,
)
from jaxlab.reporting.papers.nsa import rules as nsa
from jaxlab.reporting.papers.skill_injection.study import claim_records

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "claims.md"

PAPERS = {
    "N": "Native Sparse Attention (arXiv 2502.11089)",
    "I": "Label Words are Anchors (arXiv 2305.14160)",
    "M": "Cross-Modal Skill Injection (arXiv 2605.19523); what it claims is known from its abstract alone",
}

NO_QUICKSTART = {"title": "Quickstart", "origin": "No run of it is committed.", "command": "", "records": []}

# What would show a claim better than what is measured here, or at all.
BETTER = {
    "N1": "Models of 1e8 parameters and more at 8k tokens and longer, on many GPUs: not reachable here.",
    "N2": "Several facts, at 8k to 64k tokens: not reachable here. Here: `--sweep seed=[0,1,2]`.",
    "N3": "The kernels on a Hopper GPU at 8k to 64k tokens: `python benchmarks/nsa.py --out h100.json`. "
    "There was none; `benchmarks/nsa_compiled.json` has what is counted and compiled for one: no times.",
    "N4": "Tasks on long input that lose something by reading less, over seeds, on a model of full size.",
    "N5": "Text in place of needles, over seeds: the selectors differ where choosing is hard.",
    "I1": "GPT2-XL and GPT-J on the paper's data sets: not reachable here.",
    "I2": "GPT2-XL and GPT-J on the paper's data sets: not reachable here.",
    "I3": "GPT2-XL and GPT-J on the paper's data sets: not reachable here.",
    "I4": "GPT2-XL and GPT-J on the paper's data sets: not reachable here.",
    "I5": "GPT2-XL and GPT-J on the paper's data sets: not reachable here. `configs/paper/icl` has the "
    "commands.",
    "I6": "GPT2-XL on the paper's data sets, 1000 prompts x 5 seeds: not reachable here.",
    "I7": "GPT2-XL and GPT-J on the paper's data sets: not reachable here.",
    "I8": "GPT2-XL on all 500 questions of TREC: not reachable here.",
    "M1": "llama3-llava-next-8b and an instruction-tuned Llama on its own benchmarks: not reachable here.",
    "M2": "The paper's VLMs and language experts: not reachable here.",
    "M3": "llama3-llava-next-8b and a mathematics expert (dart-math): not reachable here.",
    "M4": "More operators, more seeds, the paper's models.",
    "M5": "Searches on the paper's models; here `python run.py merge-search` draws the whole grid.",
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", metavar="RUN", type=Path, help="the folder of a finished quickstart")
    arguments = parser.parse_args(words)
    if arguments.collect:
        write_json(FOLDER / "quickstart.json", collect(arguments.collect))
    write_atomic(PAGE, page(FOLDER))
    return 0


def collect(folder: Path) -> dict[str, Any]:
    """The verdicts of a quickstart, computed again from its runs, and what made it."""
    whole = read_run(folder)
    if whole.setting("smoke") or whole.env["dirty"]:
        sys.exit(f"{folder}: a smoke test, or made by uncommitted code; its results are not kept")
    records = []
    runs = read_runs([str(folder)])
    for section in build_sections(runs):
        settings = [r.setting(key) for r in section.runs for key in ("seed", "seeds")]
        listed = [value if isinstance(value, list | tuple) else [value] for value in settings]
        seeds = sorted({seed for values in listed for seed in values if seed is not None})
        for verdict in section.verdicts:
            records.append(
                {
                    "claim": verdict.claim.id,
                    "status": verdict.status,
                    "rule": verdict.rule,
                    "evidence": verdict.evidence,
                    "seeds": seeds,
                }
            )
    env = whole.env
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in ("jax", "flax", "numpy"))
    device = f"{env['device_count']} x {env['device_kind']}"
    started = min(run.env["started"] for run in runs if "started" in run.env)
    origin = f"Commit {env['commit'][:10]}, {device}, {versions}, {started[:10]}."
    return {
        "title": "Quickstart",
        "origin": origin,
        "command": "python run.py quickstart",
        "records": records,
    }


def page(folder: Path) -> str:
    """The whole page."""
    studies = json.loads((folder / "nsa.json").read_text(encoding="utf-8"))
    quickstart = NO_QUICKSTART
    if (folder / "quickstart.json").exists():
        quickstart = json.loads((folder / "quickstart.json").read_text(encoding="utf-8"))
    real = json.loads((folder / "smollm2.json").read_text(encoding="utf-8"))
    claims = dict(sorted(CLAIMS.items(), key=lambda item: ("NIM".index(item[0][0]), item[0])))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in claims}
    for record in studies["records"]:
        verdict = judge(claims[record["claim"]], record["numbers"])
        found[record["claim"]].append(
            {**record, "status": verdict.status, "rule": verdict.rule, "evidence": verdict.evidence}
        )
    if (folder / "real_run.json").exists():
        told = json.loads((folder / "real_run.json").read_text(encoding="utf-8"))
        for record in real_run_records(told):
            found[record["claim"]].append(record)
    for record in quickstart["records"]:
        setting = "quickstart: small models, minutes of training"
        found[record["claim"]].append({"setting": setting, "command": quickstart["command"], **record})
    for name in ("injection_study.json", "injection_smollm2.json"):
        if (folder / name).exists():
            for record in claim_records(json.loads((folder / name).read_text(encoding="utf-8"))):
                found[record["claim"]].append(record)
    for record in real_records(real):
        found[record["claim"]].append({"setting": real["title"], "real": True, **record})
    for record in analysis_records(folder / "icl"):
        found[record["claim"]].append(record)

    lines = [
        "# What was seen of the papers' claims",
        "",
        "<!-- Written by `python docs/claims.py` from docs/results; not by hand. -->",
        "",
        "Every verdict follows from figures, by a rule that is told with it. *Not measured here*: nothing",
        "that is committed speaks about the claim. A claim that was not seen stays in the table.",
        "",
    ]
    for letter, paper in PAPERS.items():
        lines += [f"## {paper}", "", "| | claim | seen here? |", "|---|---|---|"]
        lines += [
            f"| [{name}](#{name.lower()}) | {claim.statement} | {summary(found[name])} |"
            for name, claim in claims.items()
            if name[0] == letter
        ]
        lines.append("")
    for name, claim in claims.items():
        lines += details(claim, found[name])
    lines += ["## Where the figures are from", ""]
    for source in (studies, quickstart, real):
        lines += [f"- **{source['title']}.** {source['origin']}"]
    return "\n".join(lines) + "\n"


def judge(claim: Claim, numbers: Mapping[str, Any]) -> Verdict:
    """The verdict of the report's own rule on figures of a study."""
    match claim.id:
        case "N1":
            return nsa.n1(numbers["full"], numbers["nsa"], tuple(numbers["parameters"]), True)
        case "N2":  # of the ten depths the worst and the mean are known
            rest = (10 * numbers["mean"] - numbers["worst"]) / 9
            return nsa.n2([numbers["worst"], *[rest] * 9], numbers["length"])
        case "N4":
            methods = {name: [tuple(point)] for name, point in numbers["methods"].items()}
            return nsa.n4([tuple(numbers["nsa"])], methods, by_loss=True)
        case "N5":
            return nsa.n5(numbers)
    raise ValueError(f"no study of {claim.id}")


def real_run_records(real: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Verdicts on the pair of docs/real_run.md, cooled down after equal steps."""
    both = real.get("cooled")
    if not both or any(one["test"] is None for one in both.values()):
        return []
    ours, full = both["nsa"], both["full"]
    found_by = {
        name: [at["exact_match"] for at in one["needle"].get(str(one["length"]), [])]
        for name, one in both.items()
    }
    verdicts = [
        nsa.n1([full["test"]], [ours["test"]], (full["parameters"], ours["parameters"]), True),
        nsa.n2(found_by["nsa"], ours["length"]),
    ]
    dense = found_by["full"]
    beside = f" Full attention: {min(dense):.0%} and {sum(dense) / len(dense):.0%}." if dense else ""
    tokens = ours["steps"] * ours["tokens_per_step"]
    size = f"models of {ours['parameters'] / 1e6:.1f} M parameters on real text, {tokens / 1e6:.2f} M tokens"
    return [
        {
            "claim": verdict.claim.id,
            "setting": f"{size} in rows of {ours['length']:,} ([real_run.md](real_run.md))",
            "status": verdict.status,
            "rule": verdict.rule,
            "evidence": verdict.evidence + (beside if verdict.claim.id == "N2" else ""),
            "seeds": [0],
            "command": "python docs/real_run.py --measure outputs",
            "caveat": f"{tokens / ours['parameters']:.2f} tokens were read for each parameter, where about "
            "20 are usual: models that have hardly begun to learn.",
        }
        for verdict in verdicts
        if verdict.status != "not examined"
    ]


def real_records(real: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Verdicts on a real model, of which thirds of the layers are known, by the thresholds of the report."""
    data = real["data"]

    def by_data(claim: str, rule: str, seen: Mapping[str, bool], told: Mapping[str, str]) -> dict[str, Any]:
        where = [name for name in seen if seen[name]]
        some = f"seen on {', '.join(where)} alone" if where else "not seen"
        status = "seen" if len(where) == len(seen) else some
        evidence = "; ".join(f"{name} ({data[name]['prompts']}): {told[name]}" for name in seen) + "."
        return {"claim": claim, "rule": rule, "status": status, "evidence": evidence}

    shares = lambda key: {
        n: "{:.2f} in the first, {:.2f} in the last third".format(*d[key]) for n, d in data.items()
    }
    layers, loyalty, auc = real["layers"], real["word_loyalty"], real["aucroc"]
    middle, deep = (all(thirds[i] > thirds[0] for thirds in auc["by_seed"]) for i in (1, 2))
    drop = min(loyalty["label_last"], loyalty["random_first"]) - loyalty["label_first"]
    return [
        by_data(
            "I1",
            "Seen if S_wp's share in the first third of the layers is above 1/3 and above the last third's.",
            {n: d["wp"][0] > max(1 / 3, d["wp"][1]) for n, d in data.items()},
            shares("wp"),
        ),
        by_data(
            "I2",
            "Seen if S_pq's share in the last third of the layers is above 1/3 and above the first third's.",
            {n: d["pq"][1] > max(1 / 3, d["pq"][0]) for n, d in data.items()},
            shares("pq"),
        ),
        by_data(
            "I3",
            "Seen if S_ww is the smallest of the three in at least two thirds of the layers.",
            {n: 3 * d["ww_smallest"] >= 2 * layers for n, d in data.items()},
            {n: f"{d['ww_smallest']} of {layers} layers" for n, d in data.items()},
        ),
        {
            "claim": "I4",
            "rule": "Seen if blocking label words in the first layers costs at least 5 points more word "
            "loyalty than in the last ones, and than blocking random words in the first ones.",
            "status": "seen" if drop >= 0.05 else "not seen",
            "evidence": "Word loyalty on {data}: label words blocked in the first {layers} layers "
            "{label_first:.2f}, in the last {label_last:.2f}; random words in the first {random_first:.2f}, "
            "in the last {random_last:.2f}.".format(**loyalty),
            "caveat": real["caveat"],
        },
        {
            "claim": "I5",
            "rule": "Seen if AUCROC is higher in the middle and in the last third of the layers than in the "
            "first, in every seed.",
            "status": "seen" if middle and deep else "seen in deep layers alone" if deep else "not seen",
            "evidence": f"AUCROC on {auc['data']} by thirds of the layers: "
            + " and ".join(", ".join(f"{x:.2f}" for x in thirds) for thirds in auc["by_seed"])
            + f" (two seeds); the best is {auc['best']:.2f} in layer {auc['best_layer']}.",
        },
    ]


def analysis_records(folder: Path) -> list[dict[str, Any]]:
    """Verdicts on the runs of `run.py icl` that docs/icl_results.py took over, by the report's own rules."""
    found = []
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        run = RunFolder(Path(kept["label"]), kept["config"], kept["env"], kept["results"])
        real, prompts = bool(kept["results"].get("dequantized")), kept["results"]["examples"]
        for verdict in icl_verdicts(run):
            if verdict.status != "not examined":
                found.append(
                    {
                        "claim": verdict.claim.id,
                        "setting": f"{run.label}, {prompts} prompts",
                        "status": verdict.status,
                        "rule": verdict.rule,
                        "evidence": verdict.evidence,
                        "seeds": kept["results"]["seeds"],
                        "command": kept["command"],
                        "real": real,
                        "data": kept["config"]["data"]["kind"],
                    }
                )
    return found


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts on one claim in a cell of a table."""
    told = [
        f"**{r['status']}** ({model(r) if r.get('real') else seeds(r)})"
        for r in records
        if r["status"] != "not examined"
    ]
    return "; ".join(told) or "not measured here"


def model(record: Mapping[str, Any]) -> str:
    return ", ".join(["SmolLM2, dequantised", *([record["data"]] if "data" in record else [])])


def seeds(record: Mapping[str, Any]) -> str:
    many = len(record["seeds"])
    return f"{many} seed{'s' * (many != 1)}"


def details(claim: Claim, records: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"### {claim.id}", "", f"{claim.statement} ({claim.source})", ""]
    for r in records:
        lines += [f"- **{r['setting']}: {r['status']}.** {r['evidence']}"]
        lines += [f"    - Rule: {r['rule']}"] if r["rule"] else []
        lines += [f"    - Seeds: {', '.join(map(str, r['seeds']))}"] if r.get("seeds") else []
        lines += [f"    - Command: `{r['command']}`"] if r.get("command") else []
        lines += [f"    - Beware: {r['caveat']}"] if r.get("caveat") else []
    if not records:
        lines.append("- Not measured here.")
    return [*lines, f"- What would show it, or more of it: {BETTER[claim.id]}", ""]


if __name__ == "__main__":
    sys.exit(main())
