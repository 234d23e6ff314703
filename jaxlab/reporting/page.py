"""The page: its parts as functions, and one function that puts them together. Nothing is from elsewhere."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder, distinct_labels
from jaxlab.reporting.formats import duration
from jaxlab.reporting.markup import Markup, join, tag
from jaxlab.reporting.style import CSS
from jaxlab.reporting.verdicts import Verdict

_FROM_RUNS = (
    "Every number and every plot on this page was read from results.json, metrics.jsonl, config.yaml and "
    "env.json of the run folders named on it."
)


@dataclass
class Section:
    """A part of the page: what it says, the verdicts on its claims, and the runs that it was made from."""

    key: str
    kicker: str
    title: str
    headline: tuple[str, str] | None
    """The number to remember, and what it is; None for a section without a card."""
    beyond: str = ""
    """What cannot be seen in runs of this size, and what would show it; on the card."""
    verdicts: list[Verdict] = field(default_factory=list)
    body: list[Markup | None] = field(default_factory=list)
    runs: list[RunFolder] = field(default_factory=list)


def paragraph(*children: Any, class_: str | None = None) -> Markup:
    return tag("p", *children, class_=class_)


def heading(title: str) -> Markup:
    return tag("h3", title)


def figure(drawing: Figure | Markup, name: str, caption: str, look: str) -> Markup:
    """A figure with its caption: what it shows, and what to look at.

    Args:
      drawing: a matplotlib Figure, or finished HTML.
      name: unique on the page.
    """
    inner = plots.svg(drawing, name, caption) if isinstance(drawing, Figure) else drawing
    return tag("figure", tag("div", inner, class_="plot"), _caption(caption, look), id=f"figure-{name}")


def figure_row(drawings: Sequence[Figure], name: str, caption: str, look: str) -> Markup:
    """Small figures side by side under one caption."""
    inner = [tag("div", plots.svg(d, f"{name}-{i}", caption), class_="plot") for i, d in enumerate(drawings)]
    return tag("figure", tag("div", *inner, class_="row"), _caption(caption, look), id=f"figure-{name}")


def _caption(caption: str, look: str) -> Markup:
    return tag("figcaption", tag("b", caption), " ", look)


def table(
    head: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str, look: str, texts: int = 1
) -> Markup:
    """A table with a caption. The first `texts` columns hold words, the others numbers."""
    kind = lambda column: None if column < texts else "number"

    def cell(value: Any, column: int) -> Markup:
        if isinstance(value, Markup) and value.startswith("<td"):
            return value
        return tag("td", value, class_=kind(column))

    top = tag("tr", *(tag("th", name, scope="col", class_=kind(i)) for i, name in enumerate(head)))
    body = [tag("tr", *(cell(value, i) for i, value in enumerate(row))) for row in rows]
    grid = tag("table", tag("thead", top), tag("tbody", *body))
    return tag("figure", tag("div", grid, class_="scroll"), _caption(caption, look))


def best_cell(value: Any) -> Markup:
    return tag("td", value, class_="number best")


def pixels(values: Any, label: str) -> Markup:
    """A small grey picture as an inline PNG; values float [height, width], 0 black and 1 white."""
    grey = (np.clip(np.asarray(values, np.float64), 0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG")
    return tag("img", src="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), alt=label)


def folded(summary: str, *children: Any) -> Markup:
    """Detail that opens on request."""
    return tag("details", tag("summary", summary), *children, class_="folded")


def note(*children: Any) -> Markup:
    return tag("p", *children, class_="note")


def badge(status: str, words: str | None = None) -> Markup:
    return tag("span", words or status, class_=f"badge {status.replace(' ', '-')}")


def claim_list(verdicts: Sequence[Verdict]) -> Markup:
    """What the paper claims, beside what was seen in these runs, and by which rule."""
    items = []
    for v in verdicts:
        rule = tag("details", tag("summary", "rule"), v.rule) if v.rule else None
        items.append(
            tag(
                "li",
                tag("span", v.claim.id, class_="id"),
                tag(
                    "span", v.claim.statement, " ", tag("span", v.claim.source, class_="where"), class_="what"
                ),
                tag("span", badge(v.status), class_="verdict"),
                tag("span", v.evidence, class_="here"),
                rule,
                class_="quiet" if not v.rule else None,
            )
        )
    return tag("ul", *items, class_="claims")


def run_list(runs: Sequence[RunFolder]) -> Markup:
    """The command of every run, so that a reader can do it again."""
    rows = [
        tag(
            "div",
            tag("b", name),
            f" · {run.task} · {duration(run.seconds)} · ",
            tag("code", run.name),
            tag("code", run.command, class_="command") if run.command else None,
        )
        for run, name in zip(runs, distinct_labels(runs), strict=True)
    ]
    return tag("div", *rows, class_="runs")


def facts(pairs: Sequence[tuple[str, Any]]) -> Markup:
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts"
    )


def _section(section: Section) -> Markup:
    return tag(
        "section",
        tag("p", section.kicker, class_="kicker"),
        tag("h2", section.title),
        *section.body,
        [heading("How these runs were made"), run_list(section.runs)] if section.runs else None,
        id=section.key,
    )


def _card(section: Section) -> Markup:
    big, of = section.headline or ("", "")
    return tag(
        "a",
        tag("strong", section.title),
        tag("span", big, class_="big"),
        tag("span", of, class_="of"),
        tag("span", section.beyond, class_="beyond") if section.beyond else None,
        tag("span", *(badge(v.status, v.claim.id) for v in section.verdicts), class_="dots"),
        class_="card",
        href=f"#{section.key}",
    )


def page(
    title: str,
    lede: str,
    header: Sequence[tuple[str, Any]],
    sections: Sequence[Section],
    notes: Sequence[Any],
    footer: str = _FROM_RUNS,
) -> str:
    """The whole page as HTML text.

    Args:
      header: facts about the machine and the code.
      notes: what a reader must know before the numbers.
      footer: where the numbers are from.
    """
    judged = any(section.verdicts for section in sections)
    key = paragraph(
        badge("seen"),
        " ",
        badge("not seen"),
        " ",
        badge("not examined"),
        "  Whether these runs show what a paper claims; decided from their numbers by the rule given with "
        "each claim.",
        class_="key",
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", title),
            paragraph(lede, class_="lede"),
            facts(header),
            tag("nav", *(_card(section) for section in sections if section.headline), class_="glance"),
            key if judged else None,
            *(note(line) for line in notes),
            class_="top",
        ),
        tag("main", *(_section(section) for section in sections)),
        tag("footer", footer),
    )
    return join([Markup("<!doctype html>\n"), tag("html", head, body, lang="en")]) + "\n"
