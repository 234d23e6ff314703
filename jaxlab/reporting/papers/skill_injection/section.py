"""The part of the page on skill injection: every merge-search run is one scenario, that is, one expert."""

import re
from collections.abc import Sequence
from typing import Any

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder, at
from jaxlab.reporting.formats import NONE, Number, decimal, mean, percent
from jaxlab.reporting.markup import Markup, join, tag
from jaxlab.reporting.page import (
    Section,
    best_cell,
    claim_list,
    figure,
    folded,
    heading,
    paragraph,
    pixels,
    table,
)
from jaxlab.reporting.papers.skill_injection import rules
from jaxlab.reporting.papers.skill_injection.rules import Transfer

KEY = "injection"
_LAMBDA_V, _LAMBDA_E = (join(["λ", tag("sub", letter)]) for letter in "ve")
KINDS = {
    "M1": ("format", "instruction"),
    "M2": ("french", "spanish", "german", "language", "cross"),
    "M3": ("arithmetic", "math"),
}
"""Which claim a scenario speaks about, by words in the names of its data set and its expert."""

NAMES = {
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_linear": "DARE",
    "dare_ties": "DARE + TIES",
    "slerp": "SLERP",
}


def build(runs: Sequence[RunFolder]) -> Section | None:
    """The section, or None where no search is among the runs."""
    searches = [run for run in runs if run.task == "merge-search"]
    if not searches:
        return None
    scenarios = [Scenario(run) for run in searches]
    transfers = {claim: _of_kind(scenarios, claim) for claim in KINDS}
    section = Section(KEY, f"Part two · {rules.PAPER}", "Cross-modal skill injection", _headline(scenarios))
    section.verdicts = [
        rules.transfers(rules.M1, transfers["M1"]),
        rules.transfers(rules.M2, transfers["M2"]),
        rules.transfers(rules.M3, transfers["M3"], expected=False),
        _m4(scenarios),
        rules.m5({s.name: s.tried() for s in scenarios}),
    ]
    section.body = [
        paragraph(
            "A vision-language model and an expert in something else both grew from one language model. "
            "The weights that the expert changed are added to the language model inside the "
            "vision-language model, so that it might do with images what the expert does with text, "
            "without ever having been trained to. The images are handwritten digits; the experts have seen "
            "text only."
        ),
        paragraph(
            "Of this paper only the abstract was at hand: the claims are the abstract's, nothing more.",
            class_="faint",
        ),
        claim_list(section.verdicts),
        _methods(scenarios),
        _skills(scenarios),
        *[part for s in scenarios if (part := _heat_maps(s))],
        *[part for s in scenarios if (part := _examples(s))],
    ]
    trained = [r for r in runs if r.task == "train" and r.setting("data", "kind") == "digits"]
    section.runs = [*trained, *searches]
    return section


SKILLS = {"M1": "instruction following", "M2": "cross-lingual", "M3": "mathematical reasoning"}

_EXPERTS = frozenset(word for words in KINDS.values() for word in words)


class Scenario:
    """One search as this part reads it: which data set is the target, which show what the sources can do.

    The target is the first data set on images by which points were chosen; the donor's own skill is measured
    on the data set of text whose name shares most words with the target's, the receiver's own on the data
    sets on images that are no expert's.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.operators: dict[str, Any] = run.get("operators") or {}
        measured = list(run.get("unmerged", "vlm", "test") or {})
        texts = list(run.get("unmerged", "expert", "test") or {})
        images = [name for name in measured if name not in texts]
        chosen = [name for name in run.get("chosen_by") or [] if name in images]
        self.target: str | None = next(iter(chosen or images or measured), None)
        wanted = _words(self.target or "")
        self.donor_set = max(texts, key=lambda name: len(wanted & _words(name)), default=None)
        self.own_sets = [name for name in images if name != self.target and not _words(name) & _EXPERTS]
        self.name = _scenario_name(run)

    def points(self) -> list[dict[str, Any]]:
        return [point for operator in self.operators.values() for point in operator.get("points", [])]

    def tried(self) -> list[Number]:
        """The target's accuracy on the validation split at every setting."""
        return [v for p in self.points() if (v := at(p, "validation", str(self.target))) is not None]

    @property
    def best(self) -> tuple[str, dict[str, Any]] | None:
        """The operator and the point with the highest score on the validation split; the first of equals."""
        ranked = [(name, o["best"]) for name, o in self.operators.items() if o.get("best")]
        return max(ranked, key=lambda pair: pair[1].get("score", 0.0), default=None)

    def alone(self) -> Number | None:
        return self.run.get("unmerged", "vlm", "test", str(self.target))

    def donor(self) -> Number | None:
        return self.run.get("unmerged", "expert", "test", str(self.donor_set))

    def own(self, measured: Any) -> float | None:
        """The mean over the receiver's own data sets in a dict of measures."""
        values = [v for name in self.own_sets if (v := at(measured, name)) is not None]
        return mean(values)

    def reached(self, operator: str) -> Number | None:
        return at(self.operators, operator, "best", "test", str(self.target))

    def transfer(self) -> Transfer | None:
        if self.best is None:
            return None
        tested = self.best[1].get("test")
        values = (
            self.alone(),
            at(tested, str(self.target)),
            self.donor(),
            self.own(self.run.get("unmerged", "vlm", "test")),
            self.own(tested),
        )
        return None if any(v is None for v in values) else Transfer(self.name, *values)  # type: ignore[arg-type]

    def speaks_about(self, claim: str) -> bool:
        return bool(_words(f"{self.name} {self.run.label} {self.target}") & set(KINDS[claim]))


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower())) - {""}


def _scenario_name(run: RunFolder) -> str:
    """The expert's label without the words that every expert shares."""
    parts = [
        part for part in re.split(r"[/\\]", str(run.setting("expert") or "")) if part not in ("", "model")
    ]
    label = re.sub(r"(-[0-9a-f]{8})$|\.ya?ml$", "", parts[-1]) if parts else run.label
    return re.sub(r"^(digits_)?(expert_)?", "", label).replace("_", " ")


def _operator_name(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _of_kind(scenarios: Sequence[Scenario], claim: str) -> Transfer | None:
    return next((t for s in scenarios if s.speaks_about(claim) and (t := s.transfer())), None)


def _headline(scenarios: Sequence[Scenario]) -> tuple[str, str]:
    transfers = [t for s in scenarios if (t := s.transfer())]
    if not transfers:
        return NONE, "no scenario could be read"
    best = max(transfers, key=lambda t: t.injected - t.alone)
    numbers = f"{100 * best.alone:.0f} → {percent(best.injected)}"
    return numbers, f"right answers on images in the scenario {best.scenario}, before and after injection"


def _m4(scenarios: Sequence[Scenario]) -> Any:
    common = [name for name in scenarios[0].operators if all(name in s.operators for s in scenarios)]
    reached = {name: [s.reached(name) for s in scenarios] for name in common}
    scores = {name: sum(values) / len(values) for name, values in reached.items() if None not in values}  # type: ignore[arg-type]
    if not scores:
        return rules.M4.unexamined("No operator was run on every scenario.")
    tried = {name: sum(at(s.operators, name, "evaluations") or 0 for s in scenarios) for name in scores}
    return rules.m4(scores, tried)


def _methods(scenarios: Sequence[Scenario]) -> Markup:
    names = list(dict.fromkeys(name for s in scenarios for name in s.operators))
    rows = []
    for s in scenarios:
        reached = {name: s.reached(name) for name in names}
        top = max((v for v in reached.values() if v is not None), default=None)
        kinds = [words for claim, words in SKILLS.items() if s.speaks_about(claim)]
        named = join([s.name, *([tag("br"), tag("small", kinds[0], class_="faint")] if kinds else [])])
        row: list[Any] = [named, percent(s.alone())]
        for name in names:
            kept = s.own(at(s.operators, name, "best", "test"))
            cell = join(
                [percent(reached[name]), tag("br"), tag("small", f"kept {percent(kept)}", class_="faint")]
            )
            row.append(best_cell(cell) if reached[name] is not None and reached[name] == top else cell)
        transfer = s.transfer()
        row += [percent(transfer.own if transfer else None), percent(s.donor())]
        rows.append(row)
    head = ["scenario", "VLM alone", *map(_operator_name, names), "VLM's own skill", "expert, on text"]
    return table(
        head,
        rows,
        "Accuracy on images of the skill that only the expert was taught.",
        "Exact match on the test split, every operator at the setting that was best on the validation "
        "split. Bold: the best of a row. Below each: what the model kept of the VLM's own skill on images. "
        "The two last columns show what there was to keep and to transfer.",
    )


def _skills(scenarios: Sequence[Scenario]) -> Markup:
    rows = []
    for s in scenarios:
        for i, (name, operator) in enumerate(s.operators.items()):
            best = operator.get("best") or {}
            rows.append(
                [
                    s.name if i == 0 else "",
                    _operator_name(name),
                    decimal(best.get("lambda_v"), 2),
                    decimal(best.get("lambda_e"), 2),
                    decimal(best.get("density"), 2),
                    percent(at(best, "validation", str(s.target)), 1),
                    percent(at(best, "test", str(s.target)), 1),
                    str(operator.get("evaluations", NONE)),
                ]
            )
    head = ["scenario", "operator", _LAMBDA_V, _LAMBDA_E, "density", "validation", "test", "settings tried"]
    look = join([_LAMBDA_V, " weighs what the VLM changed, ", _LAMBDA_E, " what the expert changed."])
    return folded(
        "The settings chosen, for every operator", table(head, rows, "The settings chosen.", look, texts=2)
    )


def _heat_maps(s: Scenario) -> Markup | None:
    panels = []
    for name, operator in s.operators.items():
        best = operator.get("best") or {}
        points = [p for p in operator.get("points", []) if p.get("density") == best.get("density")]
        rows, columns = (sorted({p[key] for p in points}) for key in ("lambda_v", "lambda_e"))
        if len(points) < 2:
            continue
        values: list[list[Any]] = [[None] * len(columns) for _ in rows]
        for p in points:
            i, j = rows.index(p["lambda_v"]), columns.index(p["lambda_e"])
            values[i][j] = at(p, "validation", str(s.target))
        density = best.get("density")
        panels.append(
            {
                "title": _operator_name(name) + (f", density {density:g}" if density is not None else ""),
                "rows": rows,
                "columns": columns,
                "values": values,
                "chosen": (rows.index(best["lambda_v"]), columns.index(best["lambda_e"])),
            }
        )
    if not panels:
        return None
    drawing = plots.heat_maps(
        panels, 4 if len(panels) == 4 else min(3, len(panels)), "λᵥ (VLM)", "λₑ (expert)"
    )
    return figure(
        drawing,
        f"injection-{s.run.name}",
        f"How the weights decide: {s.name}.",
        "Accuracy in per cent on images of the validation split; darker is better, the chosen setting is "
        "framed. A skill that transfers shows as a broad dark field, one that depends on luck as a lone "
        "dark cell.",
    )


def _examples(s: Scenario) -> Markup | None:
    """Questions with their images, and the answers before and after; from the search's `examples`."""
    examples = s.run.get("examples") or []
    if not examples:
        return None
    cards = []
    for example in examples:
        expected, image = example.get("expected", NONE), example.get("image")
        answers = [
            (tag("dt", who), _answer(said, expected)) for who, said in (example.get("answers") or {}).items()
        ]
        told = tag("dl", *answers, tag("dt", "expected"), tag("dd", expected))
        picture = pixels(image, "handwritten digit") if image else tag("span", "text only", class_="faint")
        question = tag("div", example.get("question", ""), class_="question")
        cards.append(tag("div", picture, tag("div", question, told), class_="example"))
    return tag("div", heading(f"Questions about images: {s.name}"), tag("div", *cards, class_="examples"))


def _answer(said: str, expected: str) -> Markup:
    right = said.strip() == expected.strip()
    return tag(
        "dd", said or "(nothing)", "\u00a0", "✓" if right else "✗", class_="right" if right else "wrong"
    )
