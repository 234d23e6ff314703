"""The part of the page on skill injection: every merge-search run is one scenario, that is, one expert."""

from collections.abc import Sequence
from typing import Any

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder, at
from jaxlab.reporting.formats import NONE, decimal, percent
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
from jaxlab.reporting.papers.skill_injection import figures, rules
from jaxlab.reporting.papers.skill_injection.rules import Transfer
from jaxlab.reporting.papers.skill_injection.scenario import (
    KINDS,
    SKILLS,
    Scenario,
    operator_name,
    scenarios_of,
)

KEY = "injection"
_LAMBDA_V, _LAMBDA_E = (join(["λ", tag("sub", letter)]) for letter in "ve")


def build(runs: Sequence[RunFolder]) -> Section | None:
    """The section, or None where no search is among the runs."""
    searches = [run for run in runs if run.task == "merge-search"]
    if not searches:
        return None
    scenarios = scenarios_of(searches)
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
        *[
            part
            for draw in (
                _heat_maps,
                figures.density_maps,
                figures.curves_over_lambda,
                figures.fronts,
                figures.ways,
                figures.lambdas_by_layer,
                figures.task_vectors,
                _examples,
            )
            for s in scenarios
            if (part := draw(s))
        ],
    ]
    trained = [r for r in runs if r.task == "train" and r.setting("data", "kind") == "digits"]
    section.runs = [*trained, *searches]
    return section


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
    reached = {name: [s.reached(name) for s in scenarios] for name in _one_an_operator(scenarios[0], common)}
    scores = {name: sum(values) / len(values) for name, values in reached.items() if None not in values}  # type: ignore[arg-type]
    if not scores:
        return rules.M4.unexamined("No operator was run on every scenario.")
    tried = {name: sum(at(s.operators, name, "evaluations") or 0 for s in scenarios) for name in scores}
    return rules.m4(scores, tried)


def _one_an_operator(s: Scenario, names: Sequence[str]) -> list[str]:
    """Entries by which operators can be compared: chosen in the way that task arithmetic was, with a lambda
    for all layers. Others compare ways of searching."""
    kind = lambda name: tuple(
        s.operators[name].get(key, usual) for key, usual in (("method", "grid"), ("layers", "one"))
    )
    usual = kind("task_arithmetic") if "task_arithmetic" in names else ("grid", "one")
    same = [name for name in names if kind(name) == usual]
    of = lambda name: s.operators[name].get("operator", name)
    return [n for n in same if n == "task_arithmetic" or of(n) != "task_arithmetic"]


_MOST_COLUMNS = 6
_ACCURACY = "Accuracy on images of the skill that only the expert was taught."


def _methods(scenarios: Sequence[Scenario]) -> Markup:
    names = list(dict.fromkeys(name for s in scenarios for name in s.operators))
    seeds = max(len(s.runs) for s in scenarios)
    look = (
        "Exact match on the test split, every operator at the setting that was best on the validation "
        f"split. Bold: the best of a {'row' if len(names) <= _MOST_COLUMNS else 'column'}. Below each: what "
        "the model kept of the VLM's own skill on images."
    )
    if seeds > 1:
        look += f" Means of {seeds} seeds; in brackets the lowest and the highest."
    if len(names) <= _MOST_COLUMNS:
        rows = []
        for s in scenarios:
            transfer = s.transfer()
            last = [percent(transfer.own if transfer else None), percent(s.donor())]
            rows.append([_named(s), percent(s.alone()), *_reached_cells(s, names), *last])
        head = ["scenario", "VLM alone", *map(operator_name, names), "VLM's own skill", "expert, on text"]
        look += " The two last columns show what there was to keep and to transfer."
        return table(head, rows, _ACCURACY, look)
    columns = [_reached_cells(s, names) for s in scenarios]
    transfers = [s.transfer() for s in scenarios]
    rows = [
        ["VLM alone", *(percent(s.alone()) for s in scenarios)],
        *([operator_name(name), *(column[i] for column in columns)] for i, name in enumerate(names)),
        ["VLM's own skill", *(percent(t.own if t else None) for t in transfers)],
        ["expert, on text", *(percent(s.donor()) for s in scenarios)],
    ]
    look += " The two last rows show what there was to keep and to transfer."
    return table(["", *map(_named, scenarios)], rows, _ACCURACY, look)


def _named(s: Scenario) -> Markup:
    kinds = [words for claim, words in SKILLS.items() if s.speaks_about(claim)]
    return join([s.name, *([tag("br"), tag("small", kinds[0], class_="faint")] if kinds else [])])


def _reached_cells(s: Scenario, names: Sequence[str]) -> list[Markup]:
    reached = {name: s.reached(name) for name in names}
    top = max((v for v in reached.values() if v is not None), default=None)
    cells = []
    for name in names:
        each = s.each_reached(name)
        band = f" ({100 * min(each):.0f}–{100 * max(each):.0f})" if len(each) > 1 else ""
        kept = tag("small", f"kept {percent(s.kept(name))}", class_="faint")
        cell = join([percent(reached[name]), band, tag("br"), kept])
        cells.append(best_cell(cell) if reached[name] is not None and reached[name] == top else cell)
    return cells


def _skills(scenarios: Sequence[Scenario]) -> Markup:
    rows = []
    for s in scenarios:
        for i, (name, operator) in enumerate(s.operators.items()):
            best = operator.get("best") or {}
            rows.append(
                [
                    s.name if i == 0 else "",
                    operator_name(name),
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
        rest = lambda p: {
            k: v for k, v in figures.settings_of(p).items() if k not in ("lambda_v", "lambda_e")
        }
        points = [p for p in operator.get("points", []) if best and rest(p) == rest(best)]
        if len(points) < 2 or operator.get("method", "grid") != "grid":
            continue
        density = best.get("density")
        title = operator_name(name) + (f", density {density:g}" if density is not None else "")
        panels.append(figures.panel(s, title, points, best, "lambda_v", "lambda_e"))
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
