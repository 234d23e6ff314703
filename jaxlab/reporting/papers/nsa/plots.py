"""Pictures of native sparse attention: the blocks that queries chose, and time against length."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from jaxlab.reporting.formats import count
from jaxlab.reporting.papers.nsa.rules import AttentionTimes
from jaxlab.reporting.plots import BLUE, FAINT, RULE, canvas, curves, style


def chosen_blocks_figure(layers: Sequence[Mapping[str, Any]], block_size: int) -> Figure:
    """For every layer and group: the query's position against the blocks that it chose.

    Args:
      layers: each with layer, group, queries (positions) and chosen (block indices of each; -1 is none).
    """
    groups = sorted({entry["group"] for entry in layers})
    numbers = sorted({entry["layer"] for entry in layers})
    most = max(query for entry in layers for query in entry["queries"])
    blocks = most // block_size + 1
    with style():
        figure, grid = canvas(
            8.8, 1.0 + 1.9 * len(groups), columns=len(numbers), rows=len(groups), sharex=True, sharey=True
        )
        for entry in layers:
            axes = grid[groups.index(entry["group"]), numbers.index(entry["layer"])]
            queries = entry["queries"]
            step = queries[1] - queries[0] if len(queries) > 1 else block_size
            rows = zip(queries, entry["chosen"], strict=True)
            read = [(query, block) for query, chosen in rows for block in set(chosen) if block >= 0]
            for forced, colour in ((True, FAINT), (False, BLUE)):
                corners = [
                    [(j, t), (j + 1, t), (j + 1, t + step), (j, t + step)]
                    for t, j in read
                    if (j == 0 or j >= t // block_size - 1) == forced
                ]
                axes.add_collection(PolyCollection(corners, facecolors=colour, linewidth=0))
            axes.set(xlim=(0, blocks), ylim=(most + step, 0))
            axes.grid(False)
            axes.plot([0, blocks], [0, blocks * block_size], color=RULE, linewidth=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if entry["group"] == groups[0]:
                axes.set_title(f"layer {entry['layer'] + 1}")
            if entry["layer"] == numbers[0]:
                axes.set_ylabel(f"group {entry['group'] + 1}\nquery position (tokens)")
            if entry["group"] == groups[-1]:
                axes.set_xlabel(f"block of {block_size} tokens")
        return figure


def attention_speed_figure(times: Sequence[AttentionTimes], of_processor: bool) -> Figure:
    """Seconds against length, both on logarithmic scales: forward alone, and with the backward pass."""
    titles = {"forward": "Forward", "forward_backward": "Forward and backward"}
    with style():
        figure, grid = canvas(8.8, 3.2, columns=2, sharey=True)
        for axes, (part, title) in zip(grid[0], titles.items(), strict=True):
            points = sorted(t for t in times if t.part == part)
            lengths = [t.length for t in points]
            dense, sparse = ([t.fair[kind] for t in points] for kind in (0, 1))
            curves(axes, {"dense attention": [(lengths, dense)], "NSA": [(lengths, sparse)]}, markers=True)
            axes.set(xscale="log", yscale="log", title=title, xlabel="length (tokens)")
            axes.set_xticks(lengths, [count(n) for n in lengths])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        grid[0][0].set_ylabel("seconds of processor" if of_processor else "seconds")
        grid[0][0].legend(loc="upper left")
        return figure
