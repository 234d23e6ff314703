"""The part of the page on in-context learning: flows to and from label words, and what blocking them does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.reporting.folders import RunFolder, at, distinct_labels
from jaxlab.reporting.formats import Number, percent
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import Section, claim_list, figure, heading, note, paragraph, table
from jaxlab.reporting.papers.label_words import analysis_parts as more
from jaxlab.reporting.papers.label_words import analysis_plots as more_plots
from jaxlab.reporting.papers.label_words import plots, rules
from jaxlab.reporting.papers.label_words.prompt_widget import EXPLAINED, prompt_widget
from jaxlab.reporting.verdicts import Verdict

KEY = "icl"
MADE_UP = "The label words are drawn anew for each prompt, so none stands for the same label in all of them."
MOST_ROWS = 8
"""Rows of a table of differences; those that differ most."""
EDGES = {"into": "into", "from": "from", "to_last": "to the last token from"}


def build(runs: Sequence[RunFolder]) -> Section | None:
    """The section, or None where no analysis is among the runs.

    Its verdicts are those on the first analysis. Of several, a table has the verdicts on each, their curves
    are drawn together, and the pictures of each follow under its name.
    """
    analyses = [run for run in runs if run.task == "icl"]
    if not analyses:
        return None
    run = analyses[0]
    section = Section(
        KEY, f"Part three · {rules.PAPER}", "Information flow of in-context learning", _headline(run)
    )
    section.verdicts = verdicts(run)
    open_claims = [v.claim.id for v in section.verdicts if v.status == "not examined"]
    if open_claims:
        section.beyond = f"Not examined by this analysis: {', '.join(open_claims)}. Each says below why."
    section.body = [
        paragraph(
            "How does a model learn a task from a few examples in its prompt? The flow from one token to "
            "another is its attention times the gradient of the loss to it. S_wp is the mean flow from words "
            "into label words, S_pq from label words into the place of the answer, S_ww between all others."
        ),
        claim_list(section.verdicts),
    ]
    if len(analyses) > 1:
        section.body += _compared(analyses)
    names = distinct_labels(analyses)
    for number, one in enumerate(analyses):
        if len(analyses) > 1:
            section.body.append(heading(names[number]))
        section.body += [
            _accuracy(one),
            *_flows(one, number),
            *_blocking(one, number),
            *more.pictures(one, number),
            *_prompt(one, number),
            *_after(one, number),
        ]
    trained = [r for r in runs if r.task == "train" and r.setting("data", "kind") == "episodes"]
    section.runs = [*trained, *analyses]
    return section


def verdicts(run: RunFolder) -> list[Verdict]:
    """On claims I1 to I8, from the results of one analysis."""
    shares = {name: run.get("flows", "share", name) or [] for name in ("wp", "pq", "ww")}
    shares = {name: [] if None in values else values for name, values in shares.items()}
    table = run.get("reweighting", "table") or []
    plain = {row["shots"]: row["accuracy_by_seed"] for row in table if not row["reweighted"]}
    learned = [row for row in table if row["reweighted"]]
    labels = run.get("diagnosis", "label_words")
    made_up = run.get("data") == "episodes"
    return [
        rules.i1(shares["wp"]),
        rules.i2(shares["pq"]),
        rules.i3(shares["wp"], shares["pq"], shares["ww"]),
        _i4(run),
        rules.i5(run.get("attention", "aucroc_by_seed") or []),
        rules.I6.unexamined(MADE_UP)
        if made_up
        else rules.i6(at(learned, 0, "accuracy_by_seed") or [], plain, at(learned, 0, "single_class")),
        rules.i7(
            {
                row["method"]: {name: row[name] for name in ("label_loyalty", "word_loyalty")}
                for row in run.get("compression", "table") or []
            },
            run.get("compression", "speed_up", "against_the_whole_prompt"),
            "label_loyalty" not in (run.get("compression", "undefined") or []),
            run.get("compression", "speed_up", "against_a_full_cache"),
        ),
        rules.I8.unexamined(MADE_UP)
        if made_up
        else rules.i8(
            run.get("diagnosis", "correlation", "pearson"),
            run.get("diagnosis", "correlation", "spearman"),
            None if labels is None else len(labels),
        ),
    ]


def _compared(analyses: Sequence[RunFolder]) -> list[Markup]:
    """The verdicts on several runs, and their curves together."""
    judged, names = [verdicts(run) for run in analyses], distinct_labels(analyses)
    body = [
        [f"{of[0].claim.id}: {of[0].claim.statement}", *(verdict.status for verdict in of)]
        for of in zip(*judged, strict=True)
    ]
    parts = [
        table(
            ["claim", *names],
            body,
            "The verdicts on each run.",
            "By the rules told above with the first.",
            texts=1 + len(analyses),
        )
    ]
    for measure, key, caption in (
        ("shares", ("flows", "share"), "Shares of S_wp and S_pq of all runs."),
        ("aucroc", ("attention", "aucroc"), "AUCROC of all runs."),
    ):
        having = {name: run.results for name, run in zip(names, analyses, strict=True) if run.get(*key)}
        if len(having) > 1:
            drawing = more_plots.comparison_figure(having, measure)
            parts.append(
                figure(drawing, f"icl-compared-{measure}", caption, "By depth, so that models compare.")
            )
    return parts + _differences(dict(zip(names, analyses, strict=True)))


def _differences(runs: Mapping[str, RunFolder]) -> list[Markup]:
    """How the flows of each run differ from those of the first that has the same sets of edges."""
    having = {name: run for name, run in runs.items() if run.get("flows", "share")}
    first = next(iter(having), "")
    parts: list[Markup] = []
    for name, run in having.items():
        sets = run.get("flows", "share")
        if name == first or set(sets) != set(having[first].get("flows", "share")):
            continue
        number = len(parts) // 2 + 1
        parts += _difference(having[first].results, run.results, name, first, f"icl-difference-{number}")
    return parts


def _difference(
    first: Mapping[str, Any], other: Mapping[str, Any], name: str, first_name: str, place: str
) -> list[Markup]:
    """The difference of two runs' flow shares, drawn and in numbers."""
    rows: list[tuple[str, float, float, float]] = []
    for key, values in first["flows"]["share"].items():
        before, after = plots.numbers(values), plots.numbers(other["flows"]["share"][key])
        if np.isnan(before).any() or np.isnan(after).any():
            continue
        ends = zip(
            ("first", "last"), rules.thirds(before.tolist()), rules.thirds(after.tolist()), strict=True
        )
        told = key.replace("_to_", " → ") if "_to_" in key else f"S_{key}"
        rows += [(f"{told}, {where} third", a, b, b - a) for where, a, b in ends]
    if len(rows) > MOST_ROWS:
        rows = sorted(rows, key=lambda row: -abs(row[3]))[:MOST_ROWS]
    body = [[told, percent(a, 1), percent(b, 1), f"{100 * d:+.1f} points"] for told, a, b, d in rows]
    return [
        figure(
            more_plots.difference_figure(first, other),
            place,
            f"Flows of {name} less those of {first_name}.",
            "Differences of the shares, by depth; above zero: more in the second run. Bands: one deviation "
            "over seeds.",
        ),
        table(
            ["share, layers", first_name, name, "difference"],
            body,
            "The same by thirds of the layers.",
            "Means over the layers of a third.",
        ),
    ]


def _after(run: RunFolder, number: int) -> list[Markup]:
    """The second model of the run on the same prompts, beside the first."""
    after = run.get("after")
    if not after:
        return []
    before = {"before": run.results, "after": after}
    parts = [
        paragraph(
            f"The same prompts through {after['model']}: {percent(after.get('accuracy'), 1)} right, before "
            f"{percent(run.get('accuracy'), 1)}."
        )
    ]
    if run.get("flows"):
        of_labels = run.get("flows", "share", "wp")
        drawing = (
            more_plots.comparison_figure(before, "shares")
            if of_labels
            else more_plots.cross_modal_figure(before)
        )
        parts.append(
            figure(
                drawing,
                more.name_of("after", number),
                "Flows before and after.",
                "The same prompts through both models.",
            )
        )
        parts += _difference(run.results, after, "after", "before", more.name_of("after-difference", number))
    return parts


def _headline(run: RunFolder) -> tuple[str, str]:
    accuracy, chance = run.get("accuracy"), run.get("chance")
    alone = run.get("answers", "single_class")
    told = f"; it says {alone} to every prompt" if alone else ""
    return percent(accuracy), f"of few-shot prompts answered rightly; guessing gives {percent(chance)}{told}"


def _i4(run: RunFolder) -> Verdict:
    """Judged at the greatest number of blocked layers for which the first and the last do not overlap."""
    rows = [row for row in run.get("blocking", "table") or [] if row.get("edges", "into") == "into"]
    n = max((row["layers"] for row in rows if 2 * row["layers"] <= (run.get("layers") or 0)), default=None)
    hidden = run.get("blocking", "undefined") or []

    def loyalty(measure: str) -> rules.Loyalty | None:
        def value(words: str, where: str) -> Number | None:
            found = [r for r in rows if (r["words"], r["where"], r["layers"]) == (words, where, n)]
            return at(found, 0, measure)

        values = (value("label", "first"), value("label", "last"), value("random", "first"))
        if measure in hidden or None in values:
            return None
        return rules.Loyalty(*(x for x in values if x is not None))

    return rules.i4(loyalty("word_loyalty"), loyalty("label_loyalty"), loyalty("accuracy"), n)


def _accuracy(run: RunFolder) -> Markup:
    std = run.get("accuracy_std")
    spread = f" (± {percent(std, 1)} over seeds)" if std else ""
    alone = run.get("answers", "single_class")
    told = (
        f" It says {alone} to every prompt: accuracy, label loyalty and AUCROC tell nothing of it."
        if alone
        else ""
    )
    among = f" with {run.get('labels')} labels" if run.get("labels") else ""
    rough = " Its weights are dequantised, not the original ones." if run.get("dequantized") else ""
    return paragraph(
        f"On prompts of at most {run.get('tokens')} tokens{among} the model answers "
        f"{percent(run.get('accuracy'), 1)}{spread} of {run.get('examples')} questions rightly; guessing "
        f"would "
        f"give {percent(run.get('chance'))}.{told}{rough}"
    )


def _flows(run: RunFolder, number: int) -> list[Markup]:
    if not run.get("flows"):
        return [note("Flows were not analysed in this run.")]
    if not run.get("flows", "share", "wp"):
        return [
            figure(
                more_plots.cross_modal_figure({"": run.results}),
                more.name_of("cross-modal", number),
                "Where information flows between the parts of the prompt, by layer.",
                "Mean flow over the edges between two classes of tokens, in parts of the largest. In a VLM "
                "the "
                "image is expected to reach the words of the instruction first, and these the answer later.",
            )
        ]
    return [
        figure(
            plots.flow_shares_figure(run.results),
            more.name_of("shares", number),
            "Where information flows, by layer.",
            "Shares of the three mean flows in their sum. The paper sees words gather in label words in "
            "shallow layers and label words feed the answer in deep ones: the first line should fall and "
            "the second rise. In the last layer nothing that reaches a label word can reach the answer any "
            "more, so S_wp is 0 there by definition.",
        )
    ]


def _blocking(run: RunFolder, number: int) -> list[Markup]:
    rows = run.get("blocking", "table")
    if not rows:
        return [note("Blocking was not analysed in this run.")]
    body = [
        [
            f"{EDGES[row.get('edges', 'into')]} {row['words']} words, {row['where']} {row['layers']} layers",
            percent(row.get("accuracy"), 1),
            percent(row.get("label_loyalty"), 1),
            percent(row.get("word_loyalty"), 1),
        ]
        for row in rows
    ]
    return [
        figure(
            plots.blocking_figure(run.results),
            more.name_of("blocking", number),
            "What blocking costs.",
            "Nothing may flow into the label words, or into as many random words, in the first or in the "
            "last layers. The paper sees label words in first layers matter most.",
        ),
        table(
            ["blocked", "accuracy", "label loyalty", "word loyalty"],
            body,
            "The same in numbers.",
            "Label loyalty: how often the answer stays what it was without blocking. Word loyalty: how "
            f"much of the {run.get('blocking', 'top_words')} likeliest next words stays (Jaccard).",
        ),
    ]


def _prompt(run: RunFolder, number: int) -> list[Markup]:
    if not run.get("figure1"):
        return []
    right = run.get("figure1", "answer") == run.get("figure1", "prediction")
    expected = (
        "in shallow layers words should flow into the label words that follow them, in deep layers label "
        "words into the end"
    )
    if not run.get("figure1", "labels"):
        expected = "the image should reach the words of the instruction first, and these the answer later"
    return [
        figure(
            plots.prompt_figure(run.results),
            more.name_of("prompt", number),
            "One prompt, after Figure 1 of the paper.",
            "Lines are flows, thicker where stronger, of each colour the strongest; grey ones are drawn "
            "fainter than the others, those from the first token, on which attention rests, not at all; "
            f"{expected}. The answer is "
            f"{run.get('figure1', 'answer')}, which the model "
            f"{'gives' if right else 'misses: it says ' + str(run.get('figure1', 'prediction'))}.",
        ),
        figure(
            prompt_widget(run.results, number),
            more.name_of("prompt-arcs", number),
            "The same prompt, layer by layer.",
            EXPLAINED,
        ),
    ]
