"""Operators searched in every scenario with every seed: what was found, and the verdicts on the claims."""

from collections.abc import Sequence
from typing import Any

from jaxlab.reporting.papers.skill_injection import rules
from jaxlab.reporting.verdicts import Verdict

SCENARIOS = {
    "format": ("M1", "instruction following", "answer formats"),
    "french": ("M2", "cross-lingual", "French"),
    "arithmetic": ("M3", "mathematical reasoning", "sums and products"),
}
COMMAND = "python docs/injection_study.py --run"
Json = dict[str, Any]


def records_of(scenario: str, seed: int, results: Json, origin: str) -> tuple[Json, list[Json]]:
    """What a search of one scenario found, for a study: the models before it, and a record for each
    operator.

    Args:
      results: the search's results.json, of data sets named image_<scenario>, image_words and
        text_<scenario>.
      origin: what made it, in words.
    """
    names = {f"image_{scenario}": "target", "image_words": "kept", f"text_{scenario}": "donor"}
    told = lambda measures: {names[k]: round(v, 4) for k, v in measures.items() if k in names}
    here = {"scenario": scenario, "seed": seed}
    unmerged = {role: told(splits["test"]) for role, splits in results["unmerged"].items()}
    records = []
    for label, found in results["operators"].items():
        tried = found["points"]
        keys = [k for k, v in tried[0].items() if k != "score" and isinstance(v, bool | int | float)]
        measured = [told(row["validation"]) for row in tried]
        points = [
            [*(row[key] for key in keys), measures["target"], measures["kept"]]
            for row, measures in zip(tried, measured, strict=True)
        ]
        best = {key: found["best"][key] for key in keys}
        test = told(found["best"]["test"])
        record = {"label": label, "best": best, "test": test, "keys": keys, "points": points}
        records.append({**here, **record, "origin": origin})
    return {**here, **unmerged}, records


class Study:
    """The records of operators that were searched in every scenario with every seed."""

    def __init__(self, told: Json) -> None:
        self.unmerged = {(r["scenario"], r["seed"]): r for r in told["unmerged"]}
        begun = {seed for _, seed in self.unmerged}
        self.seeds = sorted(s for s in begun if all((name, s) in self.unmerged for name in SCENARIOS))
        found: dict[str, dict[tuple[str, int], Json]] = {}
        for record in told["records"]:
            found.setdefault(record["label"], {})[record["scenario"], record["seed"]] = record
        wanted = {(scenario, seed) for scenario in SCENARIOS for seed in self.seeds}
        whole = [label for label, cells in found.items() if set(cells) == wanted]
        self.missing = [label for label in told.get("searched", found) if label not in whole]
        self.records = {label: cells for label, cells in found.items() if set(cells) == wanted}
        self.cells = [(scenario, seed) for scenario in SCENARIOS for seed in self.seeds]
        self.origins = sorted({r["origin"] for r in told["records"]})

    def values(self, label: str, measure: str, scenario: str | None = None) -> list[float]:
        """On the test split, by cell."""
        return [self.records[label][c]["test"][measure] for c in self.cells if scenario in (None, c[0])]

    def alone(self, measure: str, scenario: str | None = None) -> list[float]:
        """The VLM's without injection."""
        return [self.unmerged[c]["vlm"][measure] for c in self.cells if scenario in (None, c[0])]

    def donors(self, scenario: str) -> list[float]:
        return [self.unmerged[c]["expert"]["donor"] for c in self.cells if c[0] == scenario]

    def ranked(self) -> list[str]:
        """Labels, the highest mean on images first."""
        return sorted(self.records, key=lambda label: -mean(self.values(label, "target")))

    def net(self, label: str) -> list[float]:
        """By cell: what was gained on images less what was lost of the VLM's own skill."""
        gained = differences(self.values(label, "target"), self.alone("target"))
        lost = differences(self.alone("kept"), self.values(label, "kept"))
        return differences(gained, lost)

    def at_an_edge(self, label: str) -> int:
        """In how many cells the chosen weights are the least or the greatest of their list: more may be
        beyond."""
        found = 0
        for cell in self.cells:
            record = self.records[label][cell]
            for name in ("lambda_v", "lambda_e"):
                tried = [point[record["keys"].index(name)] for point in record["points"]]
                if record["best"][name] in (min(tried), max(tried)):
                    found += 1
                    break
        return found

    def settings(self, label: str) -> list[float]:
        """The same of every setting that was tried (validation split; the VLM alone on the test split)."""
        found = []
        for cell in self.cells:
            record, vlm = self.records[label][cell], self.unmerged[cell]["vlm"]
            found += [row[-2] - vlm["target"] - (vlm["kept"] - row[-1]) for row in record["points"]]
        return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def band(values: Sequence[float], digits: int = 0) -> str:
    """The mean, and from the least to the greatest."""
    number = lambda v: f"{100 * v:.{digits}f}"
    low, high = number(min(values)), number(max(values))
    return f"{number(mean(values))} ({low} … {high})" if low != high else number(mean(values))


def verdicts(study: Study) -> dict[str, list[Verdict]]:
    """By claim one verdict for each seed, by the rules of the report."""
    found: dict[str, list[Verdict]] = {}
    for scenario, (name, _, what) in SCENARIOS.items():
        claim = next(c for c in rules.CLAIMS if c.id == name)
        for seed in study.seeds:
            cell = scenario, seed
            best = max(study.records, key=lambda label: validation(study.records[label][cell]))
            tested, alone = study.records[best][cell]["test"], study.unmerged[cell]
            transfer = rules.Transfer(
                what,
                alone["vlm"]["target"],
                tested["target"],
                alone["expert"]["donor"],
                alone["vlm"]["kept"],
                tested["kept"],
            )
            found.setdefault(name, []).append(rules.transfers(claim, transfer, expected=name != "M3"))
    for seed in study.seeds:
        scores = {
            label: mean([cells[s, seed]["test"]["target"] for s in SCENARIOS])
            for label, cells in study.records.items()
        }
        tried = {
            label: sum(len(cells[s, seed]["points"]) for s in SCENARIOS)
            for label, cells in study.records.items()
        }
        found.setdefault("M4", []).append(rules.m4(scores, tried))
        grids = {
            s: [row[-2] for cells in study.records.values() for row in cells[s, seed]["points"]]
            for s in SCENARIOS
        }
        found.setdefault("M5", []).append(rules.m5(grids))
    return found


def summed_up(found: Sequence[Verdict]) -> str:
    """Of one claim over seeds."""
    seen = sum(verdict.status == "seen" for verdict in found)
    if seen in (0, len(found)):
        return found[0].status
    return f"seen in {seen} of {len(found)} seeds"


def claim_records(told: Json) -> list[Json]:
    """The verdicts as docs/claims.py lists them."""
    study = Study(told)
    records = []
    for name, found in verdicts(study).items():
        evidence = " ".join(f"Seed {s}: {v.evidence}" for s, v in zip(study.seeds, found, strict=True))
        rule = found[0].rule
        setting = f"injection study: {len(study.records)} operators on {told.get('models', 'digits')}"
        records.append(
            {"claim": name, "status": summed_up(found), "rule": rule, "evidence": evidence,
             "seeds": study.seeds, "setting": setting, "command": told.get("command", COMMAND)}
        )  # fmt: skip
    return records


def validation(record: Json) -> float:
    return max(row[-2] for row in record["points"])
