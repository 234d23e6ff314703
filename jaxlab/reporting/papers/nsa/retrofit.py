"""The part of the page on retrofits: what NSA's blocks hold of a dense model's attention, and its losses."""

from collections.abc import Sequence

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder
from jaxlab.reporting.formats import count, decimal, mean, percent
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import Section, figure, heading, paragraph, table

KEY = "retrofit"
_SHARES = {
    "best": "best blocks",
    "with_window": "chosen blocks and window",
    "chosen": "chosen blocks",
    "random": "blocks by lot",
}
"""Names in results, and on the page."""


def build(runs: Sequence[RunFolder]) -> Section | None:
    """The section, or None where no run is a retrofit."""
    retrofits = [r for r in runs if r.task == "train" and r.get("retrofit") is not None]
    if not retrofits:
        return None
    section = Section(KEY, "Retrofit", "A dense model made sparse", _headline(retrofits[0]), runs=retrofits)
    section.body = [
        paragraph(
            "Native sparse attention need not be trained from the start: the keys and values of a dense "
            "model can initialise its three branches, with means of blocks as summaries and with gates that "
            "let the chosen blocks pass almost alone. What such a model loses at first is the attention that "
            "its blocks do not hold; training is there to get it back."
        )
    ]
    for index, run in enumerate(retrofits):
        if len(retrofits) > 1:
            section.body.append(heading(run.label))
        section.body += [_coverage(run, index), _losses(run), _curves(run, index)]
    return section


def _headline(run: RunFolder) -> tuple[str, str]:
    chosen = mean(run.get("retrofit", "coverage", "chosen") or [])
    return percent(chosen), "of the dense model's attention lies on the blocks that NSA chooses untrained"


def _coverage(run: RunFolder, index: int) -> Markup:
    coverage = run.get("retrofit", "coverage")
    blocks, size = (run.setting("model", "attention", key) for key in ("num_blocks", "block_size"))
    look = (
        f"Measured on {count(run.get('retrofit', 'sequences'))} held-out sequences of "
        f"{count(run.get('retrofit', 'length'))} tokens before the first step: every query may read {blocks} "
        f"blocks of {size} tokens, and {percent(run.get('retrofit', 'choice'))} of the queries see more than "
        "these; the others read all. The choice is good where its line is near the best blocks', and worth "
        "nothing where it is near the lot's; with the window more is read than the best blocks hold."
    )
    return figure(
        plots.layer_figure({said: coverage[name] for name, said in _SHARES.items()}, "share of attention"),
        f"retrofit-{index}-coverage",
        "How much of the dense attention the blocks hold.",
        look,
    )


def _losses(run: RunFolder) -> Markup:
    loss = run.get("retrofit", "loss")
    rows = [
        ["dense model", decimal(loss["dense"])],
        ["NSA, made of it", decimal(loss["retrofitted"])],
        [f"NSA after {count(run.get('steps'))} steps", decimal(loss["trained"])],
    ]
    return table(
        ["model", "loss"],
        rows,
        "Loss before and after training.",
        "All three on the batch on which the attention was measured. The dense model was not trained on: "
        "that the last may lie below the first says nothing for NSA.",
    )


def _curves(run: RunFolder, index: int) -> Markup:
    training, held_out = ({run.label: [run.curve(key)]} for key in ("loss", "eval_loss"))
    return figure(
        plots.loss_figure(training, held_out),
        f"retrofit-{index}-loss",
        "Loss while training on.",
        "From the dense model's parameters, not from random ones.",
    )
