"""The part of the page on in-context learning: flows to and from label words, and what blocking them does."""

from collections.abc import Sequence
from typing import Any

from jaxlab.reporting.folders import RunFolder, at
from jaxlab.reporting.formats import Number, percent
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import Section, claim_list, figure, note, paragraph, table
from jaxlab.reporting.papers.label_words import plots, rules

KEY = "icl"


def build(runs: Sequence[RunFolder]) -> Section | None:
    """The section, or None where no analysis is among the runs."""
    analyses = [run for run in runs if run.task == "icl"]
    if not analyses:
        return None
    run = analyses[0]
    section = Section(
        KEY, f"Part three · {rules.PAPER}", "Information flow of in-context learning", _headline(run)
    )
    shares = {name: run.get("flows", "share", name) or [] for name in ("wp", "pq", "ww")}
    judged = [
        rules.i1(shares["wp"]),
        rules.i2(shares["pq"]),
        rules.i3(shares["wp"], shares["pq"], shares["ww"]),
        _i4(run),
    ]
    section.verdicts = [
        *(rules.judged_if_able(verdict, run.get("accuracy"), run.get("chance")) for verdict in judged),
        rules.I5.unexamined(
            "It needs the AUCROC of attention to label words for the answer, layer by layer, on a model that "
            "errs often enough."
        ),
        rules.I6.unexamined("It needs a training of weights on the attention to label words, on real tasks."),
        rules.I7.unexamined("It needs prompts cut down to the hidden states of their label words, timed."),
        rules.I8.unexamined("It needs a model that confuses classes; this one hardly does."),
    ]
    section.beyond = "Not examined by this analysis: I5 to I8. Each says below what would show it."
    section.body = [
        paragraph(
            "A model that was trained on nothing but examples in a row learns a task from its prompt "
            "alone: the words that name the classes are drawn anew for every prompt. Where does what it "
            "learns travel? The flow from one token to another is its attention times the gradient of the "
            "loss to it. S_wp is the mean flow from words into label words, S_pq from label words into the "
            "place of the answer, S_ww between all others."
        ),
        claim_list(section.verdicts),
        _accuracy(run),
        *_flows(run),
        *_blocking(run),
        *_prompt(run),
    ]
    trained = [r for r in runs if r.task == "train" and r.setting("data", "kind") == "episodes"]
    section.runs = [*trained, *analyses]
    return section


def _headline(run: RunFolder) -> tuple[str, str]:
    accuracy, chance = run.get("accuracy"), run.get("chance")
    return percent(accuracy), f"of few-shot prompts answered rightly; guessing gives {percent(chance)}"


def _i4(run: RunFolder) -> Any:
    """Judged at the greatest number of blocked layers for which the first and the last do not overlap."""
    rows = run.get("blocking", "table") or []
    n = max((row["layers"] for row in rows if 2 * row["layers"] <= (run.get("layers") or 0)), default=None)

    def accuracy(words: str, where: str) -> Number | None:
        found = [r for r in rows if (r["words"], r["where"], r["layers"]) == (words, where, n)]
        return at(found, 0, "accuracy")

    return rules.i4(
        run.get("accuracy"),
        accuracy("label", "first"),
        accuracy("label", "last"),
        accuracy("random", "first"),
        n,
    )


def _accuracy(run: RunFolder) -> Markup:
    std = run.get("accuracy_std")
    spread = f" (± {percent(std, 1)} over seeds)" if std else ""
    return paragraph(
        f"On prompts of {run.get('tokens')} tokens with {run.get('labels')} classes, whose words it never "
        f"saw together, the model answers {percent(run.get('accuracy'), 1)}{spread} of "
        f"{run.get('examples')} questions rightly; guessing would give {percent(run.get('chance'))}."
    )


def _flows(run: RunFolder) -> list[Markup]:
    if not run.get("flows"):
        return [note("Flows were not analysed in this run.")]
    return [
        figure(
            plots.flow_shares_figure(run.results),
            "icl-shares",
            "Where information flows, by layer.",
            "Shares of the three mean flows in their sum. The paper sees words gather in label words in "
            "shallow layers and label words feed the answer in deep ones: the first line should fall and "
            "the second rise. In the last layer nothing that reaches a label word can reach the answer any "
            "more, so S_wp is 0 there by definition.",
        )
    ]


def _blocking(run: RunFolder) -> list[Markup]:
    rows = run.get("blocking", "table")
    if not rows:
        return [note("Blocking was not analysed in this run.")]
    body = [
        [
            f"{row['words']} words, {row['where']} {row['layers']} layers",
            percent(row.get("accuracy"), 1),
            percent(row.get("label_loyalty"), 1),
            percent(row.get("word_loyalty"), 1),
        ]
        for row in rows
    ]
    return [
        figure(
            plots.blocking_figure(run.results),
            "icl-blocking",
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


def _prompt(run: RunFolder) -> list[Markup]:
    if not run.get("figure1"):
        return []
    right = run.get("figure1", "answer") == run.get("figure1", "prediction")
    return [
        figure(
            plots.prompt_figure(run.results),
            "icl-prompt",
            "One prompt, after Figure 1 of the paper.",
            "Lines are flows, thicker where stronger. In shallow layers words should flow into the label "
            "words that follow them, in deep layers label words into the end. The answer is "
            f"{run.get('figure1', 'answer')}, which the model "
            f"{'gives' if right else 'misses: it says ' + str(run.get('figure1', 'prediction'))}.",
        )
    ]
