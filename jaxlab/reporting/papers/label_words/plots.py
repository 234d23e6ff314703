"""Pictures of the `icl` task, from its results.json alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxlab.icl import unpack_maps
from jaxlab.reporting.plots import BLUE, DASHES, FAINT, INK, ORANGE, canvas, style

Results = Mapping[str, Any]

SETS = {
    "wp": ("words → label words (S_wp)", ORANGE),
    "pq": ("label words → target (S_pq)", BLUE),
    "ww": ("all other flow (S_ww)", FAINT),
}
SETS_OF_IMAGES = {
    "wp": ("from the image", ORANGE),
    "pq": ("instruction → last token", BLUE),
    "ww": ("all other flow", FAINT),
}
"""Of prompts without label words, in the same colours."""
MEASURES = {"accuracy": "Accuracy", "label_loyalty": "Label loyalty", "word_loyalty": "Word loyalty"}
FAINTEST = 0.03
"""Lines thinner than this part of the thickest are left out of the prompt picture."""
MOST_LINES = 60
"""Of each colour so many are drawn, the strongest."""
LINE = 0.176
"""Height of a line of the prompt picture, in inches."""


def numbers(values: Iterable[Any]) -> np.ndarray:
    """With NaN for null, which is what is undefined: it is not drawn."""
    return np.array([np.nan if x is None else x for x in values], float)


def flow_shares_figure(results: Results) -> Figure:
    """Shares of S_wp, S_pq and S_ww by layer (the paper's figure 3); bands are one deviation over seeds."""
    flows = results["flows"]
    with style():
        figure, grid = canvas(7.0, 3.4)
        axes = grid[0, 0]
        layers = np.arange(1, results["layers"] + 1)
        for number, (name, (label, colour)) in enumerate(SETS.items()):
            share, spread = numbers(flows["share"][name]), numbers(flows["share_std"][name])
            axes.fill_between(layers, share - spread, share + spread, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                layers, share, color=colour, marker="os^"[number], linestyle=DASHES[number], label=label
            )
        axes.set(xlabel="layer", ylabel="share of the mean flow", ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        figure.legend(loc="outside upper center", ncols=3, columnspacing=1.5, handlelength=2.6)
        return figure


def blocking_figure(results: Results) -> Figure:
    """What it costs to block label words, or as many random ones, in first or last layers (figure 4)."""
    table = [row for row in results["blocking"]["table"] if row.get("edges", "into") == "into"]
    groups = list(dict.fromkeys((row["where"], row["layers"]) for row in table))
    groups.sort(key=lambda group: (group[0] != "first", group[1]))
    rows = {(row["words"], row["where"], row["layers"]): row for row in table}
    # Room between the blocks of bars of the first and of the last layers.
    places = np.arange(len(groups)) + np.array([0.5 * (where != "first") for where, _ in groups])
    with style():
        figure, grid = canvas(max(7.2, 2.0 + 0.95 * len(groups)), 3.1, columns=3, sharey=True)
        for axes, (measure, title) in zip(grid[0], MEASURES.items(), strict=True):
            for words, shift, colour, label in (
                ("label", -0.19, ORANGE, "label words blocked"),
                ("random", 0.19, FAINT, "as many random words blocked"),
            ):
                chosen = [rows[words, *group] for group in groups]
                axes.bar(
                    places + shift,
                    numbers(row[measure] for row in chosen),
                    width=0.34,
                    color=colour,
                    yerr=numbers(row[f"{measure}_std"] for row in chosen),
                    error_kw={"elinewidth": 0.9, "ecolor": INK},
                    label=label,
                )
            axes.set_title(title)
            axes.set_xticks(places, [str(n) for _, n in groups])
            axes.grid(axis="x", visible=False)
            for where in ("first", "last"):
                middle = float(
                    np.mean([p for p, group in zip(places, groups, strict=True) if group[0] == where])
                )
                axes.annotate(
                    f"{where} layers",
                    (middle, 0),
                    (0, -21),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=9,
                    color=FAINT,
                )
        axes = grid[0, 0]
        if results["accuracy"] is not None:
            axes.axhline(
                results["accuracy"], color=INK, linewidth=0.9, linestyle=DASHES[1], label="nothing blocked"
            )
        axes.axhline(results["chance"], color=INK, linewidth=0.9, linestyle=DASHES[2], label="chance")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.08)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1.4
        )
        return figure


def prompt_figure(results: Results, layers: int | None = None) -> Figure:
    """The paper's figure 1: a prompt in three columns, between them its flows in first and in last layers.

    Args:
      layers: how many layers each half sums over; by default a third of them.
    """
    prompt = results["figure1"]
    maps = _maps(prompt)
    total = len(maps)
    count = max(1, total // 3) if layers is None else layers
    heights = _line_heights(prompt)
    with style():
        figure = Figure(figsize=(7.6, LINE * (heights[-1] + 5.5)))
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, 10), ylim=(heights[-1] + 3.0, -2.5))
        axes.axis("off")
        columns = (0.9, 5.0, 9.1)
        margin = 0.76
        halves = (
            (_spanned(1, count), slice(0, count)),
            (_spanned(total - count + 1, total), slice(-count, None)),
        )
        for half, (title, chosen) in enumerate(halves):
            left, right = columns[half] + margin, columns[half + 1] - margin
            _lines(axes, prompt, maps[chosen], left, right, heights)
            axes.text((left + right) / 2, -1.6, title, ha="center", va="center", fontsize=10, color=INK)
        for column in columns:
            _words(axes, prompt, column, heights)
        sets = SETS if prompt["labels"] else SETS_OF_IMAGES
        handles = [
            axes.plot([], [], color=colour, linewidth=3, label=label)[0] for label, colour in sets.values()
        ]
        axes.legend(
            handles=handles, loc="lower center", ncols=3, fontsize=8.5, columnspacing=1.6, borderaxespad=0.4
        )
        return figure


def _maps(prompt: Results) -> Sequence[Any]:
    """Of each layer the rows, as they are packed or, in older results, as they are."""
    maps = prompt["maps"]
    return list(unpack_maps(maps)) if isinstance(maps, Mapping) else maps


def _spanned(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _line_heights(prompt: Results) -> np.ndarray:
    """Where each token is written: one line each, and half a line more after each label word."""
    gaps = np.zeros(len(prompt["tokens"]))
    gaps[[at + 1 for at in prompt["labels"] if at + 1 < len(gaps)]] = 0.5
    return np.arange(len(gaps)) + np.cumsum(gaps)


def _words(axes: Axes, prompt: Results, column: float, heights: np.ndarray) -> None:
    for at, (token, height) in enumerate(zip(prompt["tokens"], heights, strict=True)):
        kind = "label" if at in prompt["labels"] else "target" if at == prompt["query"] else "word"
        colour = {"label": ORANGE, "target": BLUE, "word": INK}[kind]
        if kind != "word":
            box = FancyBboxPatch(
                (column - 0.72, height - 0.42),
                1.44,
                0.84,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=colour,
                alpha=0.16,
                edgecolor="none",
                mutation_aspect=4,
            )
            axes.add_patch(box)
        axes.text(
            column,
            height,
            _readable(token),
            ha="center",
            va="center_baseline",
            fontsize=8.6,
            color=colour,
            fontweight="normal" if kind == "word" else "bold",
            clip_on=True,
        )


def _edge_kind(prompt: Results, labels: set[int], i: int, j: int) -> str:
    """To which set the edge from j to i belongs."""
    if labels:
        return "wp" if i in labels else "pq" if i == prompt["query"] and j in labels else "ww"
    part = prompt["parts"][j] if prompt.get("parts") else "text"
    return "wp" if part == "image" else "pq" if i == prompt["query"] and part == "text" else "ww"


def _readable(token: str) -> str:
    """A token as a word: blanks shown where nothing else is."""
    text = token.strip(" ").replace("\n", "↵").replace("\t", "→")
    return text if text else "·"


def _lines(
    axes: Axes,
    prompt: Results,
    maps: Sequence[Any],
    left: float,
    right: float,
    heights: np.ndarray,
) -> None:
    """A line for each edge, as thick as its flow, summed over the layers, is beside the greatest of them."""
    size = len(heights)
    flow = np.zeros((size, size))
    for layer in maps:
        for i, row in enumerate(layer):
            flow[i, : len(row)] += row
    labels = set(prompt["labels"])
    flow[:, 0] = 0.0  # attention that goes nowhere rests on the first token
    if flow.max() <= 0.0:
        return
    flow /= flow.max()
    of_kind: dict[str, list[tuple[float, int, int]]] = {"ww": [], "wp": [], "pq": []}
    for i, j in zip(*np.nonzero(flow >= FAINTEST), strict=True):
        kind = _edge_kind(prompt, labels, int(i), int(j))
        of_kind[kind].append((flow[i, j], i, j))
    middle = (left + right) / 2
    edges = [(kind, *edge) for kind, some in of_kind.items() for edge in sorted(some)[-MOST_LINES:]]
    for kind, strength, i, j in edges:
        part = 0.45 if kind == "ww" else 1.0
        start, end = heights[j], heights[i]
        path = Path(
            [(left, start), (middle, start), (middle, end), (right, end)],
            [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
        )
        axes.add_patch(
            PathPatch(
                path,
                fill=False,
                edgecolor=SETS[kind][1],
                linewidth=0.4 + 4.2 * part * strength,
                alpha=part * (0.3 + 0.6 * strength),
                capstyle="round",
            )
        )
