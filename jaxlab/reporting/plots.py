"""matplotlib Figures in one style, and their way onto a page as inline SVG.

Text stays text, and the few colours of the style become CSS variables of the page, so that one drawing serves
light and dark.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from jaxlab.reporting.formats import Number
from jaxlab.reporting.markup import Markup

INK, FAINT, RULE, PAPER = "#1b1f24", "#6b7280", "#d8dbe0", "#fdfcfa"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072b2", "#d98200", "#009e73", "#d55e00", "#a8578a"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED)
"""After Okabe and Ito: told apart by readers with any colour vision; lines differ in dash or marker too."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 3)))

HEAT = LinearSegmentedColormap.from_list("heat", ["#eef3f7", "#a9cbe0", "#4f97c3", "#14679f", "#08325a"])

_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    RULE: "--rule",
    PAPER: "--paper",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    RED: "--red",
    PURPLE: "--purple",
}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "page",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlecolor": INK,
    "axes.labelsize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.9,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.prop_cycle": cycler(color=SERIES),
    "figure.constrained_layout.use": True,
}


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures; for drawing and for writing alike."""
    with matplotlib.rc_context(_STYLE):
        yield


def svg(figure: Figure, name: str, label: str) -> Markup:
    """A figure as an inline SVG element.

    Args:
      name: of the figure, unique on its page: ids inside the drawing get it as prefix.
      label: what a screen reader says.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"<!--.*?-->\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", drawing)  # HTML knows them
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", name)
    drawing = re.sub(r'\bid="', f'id="{prefix}-', drawing)
    drawing = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    drawing = drawing.replace("'DejaVu Sans'", "var(--sans)")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', drawing).groups()  # type: ignore[union-attr]
    # As wide as drawn where there is room, else as wide as the page; see style.py.
    head = f'<svg role="img" aria-label="{_attribute(label)}" style="max-width:{float(width) * 4 / 3:.0f}px"'
    drawing = drawing.replace("<svg", head, 1).replace(f'width="{width}pt" height="{height}pt"', "", 1)
    return Markup(drawing.strip())


def _attribute(value: str) -> str:
    return value.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def canvas(
    width: float = 7.4, height: float = 3.2, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A Figure and an array [rows, columns] of its axes; inside `style()`."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


Curves = Mapping[str, Sequence[tuple[Sequence[Number], Sequence[Number]]]]
"""By name: for every seed, the steps and the values."""


def curves(axes: Axes, series: Curves, markers: bool = False) -> None:
    """One line per name: the mean over seeds and, of several, a band from the least to the greatest."""
    for index, (name, seeds) in enumerate(series.items()):
        colour = SERIES[index % len(SERIES)]
        drawn = [seed for seed in seeds if seed[0]]
        if not drawn:
            continue
        steps = sorted(set.intersection(*(set(x) for x, _ in drawn)))
        values = np.array([[dict(zip(x, y, strict=True))[step] for step in steps] for x, y in drawn])
        if len(drawn) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.16, linewidth=0)
        marker = "os^Dv"[index % 5] if markers else None
        axes.plot(
            steps,
            values.mean(0),
            color=colour,
            linestyle=DASHES[(index + index // len(SERIES)) % len(DASHES)],  # beyond the colours, other pairs
            marker=marker,
            label=name,
        )


def loss_figure(training: Curves, held_out: Curves, unit: str = "nats per token") -> Figure:
    """Training loss on the left, held-out loss on the right, on one scale."""
    with style():
        figure, grid = canvas(8.8, 3.3, columns=2, sharey=True)
        for axes, series, title in zip(grid[0], (training, held_out), ("training", "held out"), strict=True):
            curves(axes, series, markers=title == "held out")
            axes.set(title=f"Loss, {title}", xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        grid[0][0].set_ylabel(f"loss ({unit})")
        values = [
            v for series in (training, held_out) for seeds in series.values() for _, y in seeds for v in y
        ]
        if values:  # the first few steps would flatten everything else
            low, high = min(values), float(np.quantile(values, 0.97))
            grid[0][0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) + 1e-6)
        if len(training) > 1:
            grid[0][1 if grid[0][1].lines else 0].legend(loc="upper right")
        return figure


def bars(names: Sequence[str], values: Sequence[Number], label: str, digits: int = 0) -> Figure:
    """One horizontal bar per name, its value beside it."""
    with style():
        figure, grid = canvas(4.1, 0.55 + 0.42 * len(names))
        axes = grid[0, 0]
        axes.barh(
            range(len(names)), values, height=0.55, color=[SERIES[i % len(SERIES)] for i in range(len(names))]
        )
        for i, value in enumerate(values):
            shown = f"{value:,.{digits}f}".replace(",", "\u2009")
            axes.annotate(shown, (value, i), (5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelcolor=INK, labelsize=9)
        axes.set(xlim=(0, 1.32 * max([*values, 1e-9])), xticks=[])
        figure.suptitle(label, x=0.01, ha="left", fontsize=10)
        axes.spines[["bottom"]].set_visible(False)
        axes.grid(False)
        axes.invert_yaxis()
        return figure


def position_figure(series: Mapping[str, Sequence[tuple[Number, Number]]], unit: str) -> Figure:
    """Held-out loss by position in the sequence."""
    with style():
        figure, grid = canvas(8.8, 2.9)
        curves(
            grid[0, 0],
            {name: [([p[0] for p in points], [p[1] for p in points])] for name, points in series.items()},
        )
        grid[0, 0].set(xlabel="position in the sequence (tokens)", ylabel=f"loss ({unit})")
        if len(series) > 1:
            grid[0, 0].legend(loc="upper right")
        return figure


def layer_figure(series: Mapping[str, Sequence[Number]], label: str) -> Figure:
    """Shares by layer, one line per name."""
    with style():
        figure, grid = canvas(8.8, 3.1)
        axes = grid[0, 0]
        numbered = {name: (list(range(1, len(values) + 1)), values) for name, values in series.items()}
        curves(axes, {name: [points] for name, points in numbered.items()}, markers=True)
        layers = max(len(values) for values in series.values())
        axes.set(xlabel="layer", ylabel=label, ylim=(0, 1.04), xlim=(0.5, layers + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def heat_maps(
    panels: Sequence[Mapping[str, Any]], columns: int, rows_label: str, columns_label: str
) -> Figure:
    """Small heat maps in rows of `columns`, accuracies written into their cells.

    Args:
      panels: each with title, rows, columns (the values along the axes), values [rows][columns] (None is
        empty) and, optionally, chosen (row, column): the cell to frame.
    """
    lines = -(-len(panels) // columns)
    tall = max(len(panel["rows"]) for panel in panels)
    with style():
        figure, grid = canvas(
            (2.93 if columns < 4 else 2.2) * columns, lines * (0.75 + 0.3 * tall), columns=columns, rows=lines
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for place, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            values = np.array([[np.nan if v is None else v for v in row] for row in panel["values"]], float)
            axes.pcolormesh(
                np.ma.masked_invalid(values), cmap=HEAT, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1
            )
            for (i, j), value in np.ndenumerate(values):
                if np.isfinite(value):
                    colour = (
                        "#ffffff" if value > 0.45 else "#10202c"
                    )  # on the cell's own colour, in any theme
                    axes.text(
                        j + 0.5,
                        i + 0.5,
                        f"{100 * value:.0f}",
                        ha="center",
                        va="center",
                        color=colour,
                        fontsize=8,
                    )
            if panel.get("chosen"):
                i, j = panel["chosen"]
                axes.add_patch(
                    Rectangle((j, i), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.2, clip_on=False)
                )
            axes.set_xticks(np.arange(len(panel["columns"])) + 0.5, [f"{v:g}" for v in panel["columns"]])
            axes.set_yticks(np.arange(len(panel["rows"])) + 0.5, [f"{v:g}" for v in panel["rows"]])
            axes.set_title(panel["title"], fontsize=9.5)
            axes.grid(False)
            axes.spines[:].set_visible(False)
            if place % columns == 0:
                axes.set_ylabel(rows_label)
            if place + columns >= len(panels):
                axes.set_xlabel(columns_label)
        return figure


def layer_panels(
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[Number], Sequence[Number]]], float | None]],
) -> Figure:
    """Side by side, numbers by layer: one line per name.

    Args:
      panels: each a label, (layers, values) by name, and a value to mark by a line across, or None.
    """
    with style():
        figure, grid = canvas(8.8, 3.1, columns=len(panels))
        for axes, (label, series, mark) in zip(grid[0], panels, strict=True):
            curves(axes, {name: [points] for name, points in series.items()}, markers=True)
            if mark is not None:
                axes.axhline(mark, color=FAINT, linewidth=1, linestyle=(0, (1, 2)))
                low, high = axes.get_ylim()  # noise around the mark is not to look like something
                axes.set_ylim(min(low, mark - 0.05), max(high, mark + 0.05))
            axes.set(title=label, xlabel="layer")
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.ticklabel_format(axis="y", useOffset=False)
        if len(panels[0][1]) > 1:
            grid[0][0].legend(loc="best")
        return figure


def _plain(value: float, _: Any) -> str:
    return f"{value:g}"


def layer_maps(panels: Sequence[Mapping[str, Any]], logarithmic: bool = False) -> Figure:
    """Heat maps one below the other, of modules by layers, on one scale that a bar tells.

    Args:
      panels: each with title, rows, columns and values [rows][columns]; None is empty.
      logarithmic: the scale; zeros are empty on it.
    """
    grids = [
        np.array([[np.nan if v is None else v for v in row] for row in p["values"]], float) for p in panels
    ]
    if logarithmic:
        grids = [np.where(values > 0, values, np.nan) for values in grids]
    known = np.concatenate([values[np.isfinite(values)] for values in grids])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.1, 1.0)
    if low == high:
        low, high = low * 0.9 - 1e-9, high * 1.1 + 1e-9
    norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
    with style():
        tall = sum(0.65 + 0.19 * len(p["rows"]) for p in panels)
        figure, axes_grid = canvas(8.8, tall, rows=len(panels))
        for axes, panel, values in zip(axes_grid[:, 0], panels, grids, strict=True):
            drawn = axes.pcolormesh(
                np.ma.masked_invalid(values), cmap=HEAT, norm=norm, edgecolors=PAPER, linewidth=0.6
            )
            step = max(1, len(panel["columns"]) // 16)
            axes.set_xticks(np.arange(len(panel["columns"]))[::step] + 0.5, panel["columns"][::step])
            axes.set_yticks(np.arange(len(panel["rows"])) + 0.5, panel["rows"])
            axes.invert_yaxis()
            axes.set_title(panel["title"], fontsize=9.5)
            axes.grid(False)
            axes.spines[:].set_visible(False)
            bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01, format=FuncFormatter(_plain))
            bar.outline.set_visible(False)
        axes_grid[-1, 0].set_xlabel("layer")
        return figure
