"""More pictures of the `icl` task, from its results.json alone: attention, re-weighting, compression,
diagnosis, and what is beyond the paper."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from jaxlab.reporting.papers.label_words.plots import SETS, numbers
from jaxlab.reporting.plots import BLUE, DASHES, FAINT, GREEN, HEAT, INK, ORANGE, SERIES, canvas, style

Results = Mapping[str, Any]

DEPTH = "viridis"
METHODS = {
    "hidden_anchor": "Hidden_anchor",
    "text_anchor": "Text_anchor",
    "hidden_random": "Hidden_random",
    "hidden_random_top": "Hidden_random-top",
}


def _layers(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))


def attention_figure(results: Results) -> Figure:
    """AUCROC_l and R_l by layer (the paper's figure 5); the band is one deviation over seeds."""
    found = results["attention"]
    with style():
        figure, grid = canvas(7.0, 3.2)
        axes = grid[0, 0]
        mean, spread, r = (numbers(found[name]) for name in ("aucroc", "aucroc_std", "r"))
        layers = np.arange(1, len(mean) + 1)
        axes.fill_between(layers, mean - spread, mean + spread, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(layers, mean, color=BLUE, marker="o", label="AUCROC_l")
        axes.axhline(0.5, color=FAINT, linewidth=0.9, linestyle=DASHES[2], label="chance")
        axes.set_ylabel("AUCROC_l")
        axes.set_ylim(float(np.nanmin([0.3, *(mean - spread)])), 1.02)
        other = axes.twinx()
        other.plot(layers, r, color=ORANGE, linestyle=DASHES[1], label="R_l")
        other.set_ylabel("R_l")
        other.grid(visible=False)
        _layers(axes)
        lines = [*axes.get_lines(), *other.get_lines()]
        figure.legend(handles=lines, loc="outside upper center", ncols=3, handlelength=2.6)
        return figure


def loyalty_by_layers_figure(results: Results) -> Figure:
    """Loyalties by the number of blocked layers (the paper's figure 8)."""
    blocking = results["blocking"]
    table = [row for row in blocking["table"] if row.get("edges", "into") == "into"]
    hidden = blocking.get("undefined") or []
    measures = [n for n in ("label_loyalty", "word_loyalty") if n not in hidden]
    with style():
        figure, grid = canvas(3.6 * len(measures) + 0.6, 3.0, columns=len(measures), sharey=True)
        for axes, measure in zip(grid[0], measures, strict=True):
            for words, colour in (("label", ORANGE), ("random", FAINT)):
                for number, where in enumerate(("first", "last")):
                    rows = sorted(
                        (r for r in table if r["words"] == words and r["where"] == where),
                        key=lambda row: row["layers"],
                    )
                    axes.plot(
                        [row["layers"] for row in rows],
                        numbers(row[measure] for row in rows),
                        color=colour,
                        marker="os"[number],
                        linestyle=DASHES[number],
                        label=f"{words} words, {where} layers",
                    )
            axes.set_title(measure.replace("_", " ").capitalize())
            axes.set_xlabel("layers blocked")
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        grid[0, 0].set_ylim(-0.03, 1.05)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, handlelength=2.8)
        return figure


def reweighting_figure(results: Results) -> Figure:
    """Accuracy with and without learned factors, and the loss while they were learned."""
    found = results["reweighting"]
    with style():
        figure, grid = canvas(7.2, 2.9, columns=2)
        axes = grid[0, 0]
        names = [
            f"{row['shots']} shot{'s' * (row['shots'] != 1)}"
            + (",\nre-weighted" if row["reweighted"] else "")
            for row in found["table"]
        ]
        colours = [ORANGE if row["reweighted"] else FAINT for row in found["table"]]
        axes.bar(
            names,
            numbers(row["accuracy"] for row in found["table"]),
            yerr=numbers(row["accuracy_std"] for row in found["table"]),
            color=colours,
            width=0.6,
            error_kw={"elinewidth": 0.9, "ecolor": INK},
        )
        for at, row in enumerate(found["table"]):
            axes.scatter(
                [at] * len(row["accuracy_by_seed"]),
                numbers(row["accuracy_by_seed"]),
                s=9,
                color=INK,
                zorder=3,
            )
        axes.axhline(results["chance"], color=INK, linewidth=0.9, linestyle=DASHES[2])
        axes.set_title("Accuracy (points: seeds; dotted: chance)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.05)
        axes.grid(axis="x", visible=False)
        axes = grid[0, 1]
        axes.plot(np.arange(1, len(found["loss"]) + 1), numbers(found["loss"]), color=BLUE, marker="o")
        axes.set_title("Loss while learning")
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        return figure


def compression_figure(results: Results) -> Figure:
    """Loyalties and accuracy of the ways to compress demonstrations (the paper's table 2), and time."""
    found = results["compression"]
    rows = {row["method"]: row for row in found["table"]}
    hidden = found.get("undefined") or []
    measures = [n for n in ("label_loyalty", "word_loyalty", "accuracy") if n not in hidden]
    with style():
        figure, grid = canvas(7.6, 3.0, columns=2, gridspec_kw={"width_ratios": [2.2, 1.0]})
        axes = grid[0, 0]
        size = 0.8 / len(METHODS)
        for number, (method, name) in enumerate(METHODS.items()):
            places = np.arange(len(measures)) + (number - (len(METHODS) - 1) / 2) * size
            axes.bar(
                places,
                numbers(rows[method][m] for m in measures),
                width=0.92 * size,
                color=(ORANGE, BLUE, FAINT, GREEN)[number],
                yerr=numbers(rows[method][f"{m}_std"] for m in measures),
                error_kw={"elinewidth": 0.9, "ecolor": INK},
                label=name,
            )
        axes.set_xticks(range(len(measures)), [m.replace("_", " ") for m in measures])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.08)
        axes.grid(axis="x", visible=False)
        axes = grid[0, 1]
        names = {"whole_prompt": "whole prompt", "full_cache": "full cache", "anchor_cache": "anchors' cache"}
        seconds = [1e3 * found["seconds"][name] / found["batch"] for name in names]
        axes.barh(list(names.values()), seconds, color=[FAINT, BLUE, ORANGE], height=0.6)
        axes.invert_yaxis()
        axes.set_title("ms a query")
        axes.grid(axis="y", visible=False)
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1.2
        )
        return figure


def diagnosis_figure(results: Results) -> Figure:
    """Predicted and real confusion (the paper's figure 6)."""
    found = results["diagnosis"]
    names = [name.strip() for name in found["label_words"]]
    with style():
        figure, grid = canvas(7.4, 3.6, columns=2)
        panels = (("predicted", "Predicted, from keys", 0.0), ("real", "Real, AUC", None))
        for axes, (name, title, least) in zip(grid[0], panels, strict=True):
            values = np.array([numbers(row) for row in found[name]])
            known = values[np.isfinite(values)]
            low = float(known.min(initial=1.0)) if least is None else least
            axes.imshow(np.ma.masked_invalid(values), cmap=HEAT, vmin=low, vmax=1.0)
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    if np.isfinite(value):
                        dark = value > (1.0 + low) / 2
                        axes.text(
                            j,
                            i,
                            f"{value:.2f}",
                            ha="center",
                            va="center",
                            fontsize=8,
                            color="white" if dark else INK,
                        )
            axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
            axes.set_yticks(range(len(names)), names)
            axes.set_title(title)
            axes.grid(visible=False)
        return figure


def faithfulness_figure(results: Results) -> Figure:
    """The flow between two classes of tokens in a layer beside what cutting it does to the loss."""
    found = results["faithfulness"]
    names = found["classes"]
    flow, effect = (np.array([[numbers(r) for r in layer] for layer in found[n]]) for n in ("flow", "effect"))
    with style():
        figure, grid = canvas(6.4, 3.8)
        axes = grid[0, 0]
        shown = 0
        for i in range(len(names)):
            for j in range(len(names)):
                x, y = flow[:, i, j], effect[:, i, j]
                there = (x > 0) & np.isfinite(y) & (y > 0)
                if there.any():
                    axes.scatter(
                        x[there],
                        y[there],
                        s=14,
                        color=SERIES[shown % len(SERIES)],
                        marker="os^Dv"[(shown // len(SERIES)) % 5],
                        label=f"{names[j]} → {names[i]}",
                        alpha=0.8,
                    )
                    shown += 1
        axes.set(xscale="log", yscale="log", xlabel="flow", ylabel="change of the loss when cut")
        for axis in (axes.xaxis, axes.yaxis):  # text is not parsed as mathematics
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}"))
            axis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside right upper", fontsize=7.5)
        return figure


def heads_figure(results: Results) -> Figure:
    """Each head's share of S_pq beside its function-vector and its induction score, coloured by layer."""
    scores = {name: np.array([numbers(r) for r in rows]) for name, rows in results["heads"]["scores"].items()}
    layers = np.repeat(np.arange(1, len(scores["pq"]) + 1), scores["pq"].shape[1])
    agree = results["heads"]["correlation"]
    panels = (("function_vector", "function-vector score"), ("induction", "induction score"))
    with style():
        figure, grid = canvas(7.4, 3.3, columns=2, sharey=True)
        for axes, (name, label) in zip(grid[0], panels, strict=True):
            drawn = axes.scatter(
                scores[name].ravel(), scores["pq"].ravel(), c=layers, cmap=DEPTH, s=13, linewidths=0
            )
            axes.set_xlabel(label)
            axes.set_title(f"rank correlation {agree[f'pq_{name}']:.2f}", fontsize=9)
        grid[0, 0].set_ylabel("share of S_pq")
        grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.colorbar(drawn, ax=list(grid[0]), label="layer", pad=0.02)
        return figure


def many_shot_figure(results: Results) -> Figure:
    """Flow shares in the first and the last third of the layers, and accuracy, by demonstrations."""
    table = results["many_shot"]["table"]
    shots = [row["shots"] for row in table]
    names = [name for name in SETS if name in table[0]["share"]]
    with style():
        figure, grid = canvas(7.6, 2.9, columns=3, sharey=True)
        for axes, (title, part) in zip(grid[0], (("first third", 0), ("last third", -1)), strict=False):
            for number, name in enumerate(names):
                size = max(1, len(table[0]["share"][name]) // 3)
                cut = slice(0, size) if part == 0 else slice(-size, None)
                values = [float(np.mean(numbers(row["share"][name][cut]))) for row in table]
                label, colour = SETS[name]
                axes.plot(
                    shots, values, color=colour, marker="os^"[number], linestyle=DASHES[number], label=label
                )
            axes.set_title(f"Shares, {title}")
        axes = grid[0, 2]
        axes.errorbar(
            shots,
            numbers(r["accuracy"] for r in table),
            numbers(r["accuracy_std"] for r in table),
            color=INK,
            marker="o",
        )
        axes.axhline(results["chance"], color=FAINT, linewidth=0.9, linestyle=DASHES[2])
        axes.set_title("Accuracy")
        for axes in grid[0]:
            axes.set_xscale("log", base=2)
            axes.set_xticks(shots, [str(n) for n in shots])
            axes.set_xlabel("demonstrations of each class")
            axes.minorticks_off()
        grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        grid[0, 0].set_ylim(-0.03, 1.05)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return figure


def comparison_figure(runs: Mapping[str, Results], measure: str) -> Figure:
    """One measure of several runs by layer: the shares of S_wp and S_pq, or AUCROC."""
    with style():
        figure, grid = canvas(7.0, 3.2)
        axes = grid[0, 0]
        for number, (name, results) in enumerate(runs.items()):
            colour = SERIES[number % len(SERIES)]
            curves = (
                {"AUCROC": results["attention"]["aucroc"]}
                if measure == "aucroc"
                else {f"S_{key}": results["flows"]["share"][key] for key in ("wp", "pq")}
            )
            for which, (label, values) in enumerate(curves.items()):
                depth = (np.arange(len(values)) + 1) / len(values)
                axes.plot(
                    depth, numbers(values), color=colour, linestyle=DASHES[which], label=f"{name}: {label}"
                )
        axes.set_xlabel("depth (layer / layers)")
        axes.set_ylabel("AUCROC_l" if measure == "aucroc" else "share of the mean flow")
        _legend_of_runs(figure)
        return figure


def _legend_of_runs(figure: Figure) -> None:
    """A legend above the curves. Names of runs may be long: each then has a line, or more."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) <= 42 else 1
    told = ["\n".join(textwrap.wrap(label, 88)) or label for label in labels]
    rows = -(-sum(1 + label.count("\n") for label in told) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, rows - 2))
    figure.legend(handles, told, loc="outside upper center", ncols=columns, handlelength=2.8)


def difference_figure(first: Results, other: Results) -> Figure:
    """What another run's shares of the flow have more than the first one's, by depth; bands are one deviation
    over seeds of the difference. Of prompts without label words the pairs of classes that differ most."""
    shares = [one["flows"]["share"] for one in (first, other)]
    spreads = [one["flows"]["share_std"] for one in (first, other)]
    names = [name for name in shares[0] if name in shares[1]]
    found = {name: _difference(shares, spreads, name) for name in names}
    if not set(SETS) <= set(names):
        names = sorted(names, key=lambda name: -float(np.nanmax(np.abs(found[name][1]), initial=0.0)))[:4]
    with style():
        figure, grid = canvas(7.0, 3.0)
        axes = grid[0, 0]
        axes.axhline(0.0, color=INK, linewidth=0.9)
        for number, name in enumerate(names):
            label, colour = SETS.get(name, (name.replace("_to_", " → "), SERIES[number % len(SERIES)]))
            depth, values, spread = found[name]
            axes.fill_between(depth, values - spread, values + spread, color=colour, alpha=0.18, linewidth=0)
            axes.plot(depth, values, color=colour, linestyle=DASHES[number % len(DASHES)], label=label)
        axes.set_xlabel("depth (layer / layers)")
        axes.set_ylabel("difference of the shares")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:+.0f} %"))
        figure.legend(loc="outside upper center", ncols=3, handlelength=2.8)
        return figure


def _difference(
    shares: Sequence[Mapping[str, Any]], spreads: Sequence[Mapping[str, Any]], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(depth, difference, deviation), at the layers of the first; the other's are drawn between its own."""
    depths = [(np.arange(len(one[name])) + 1) / len(one[name]) for one in shares]
    there = lambda values: np.interp(depths[0], depths[1], numbers(values))
    difference = there(shares[1][name]) - numbers(shares[0][name])
    return depths[0], difference, np.hypot(there(spreads[1][name]), numbers(spreads[0][name]))


def cross_modal_figure(runs: Mapping[str, Results], most: int = 4) -> Figure:
    """Mean flow between classes of tokens by layer, of prompts without label words: the strongest pairs of
    different classes of the first run, of each run in a dash of its own."""
    means = {
        name: {pair: numbers(values) for pair, values in results["flows"]["mean"].items()}
        for name, results in runs.items()
    }
    first = next(iter(means.values()))
    apart = [pair for pair in first if len({*pair.split("_to_")}) == 2 and np.max(first[pair]) > 0.0]
    pairs = sorted(apart, key=lambda pair: -float(np.max(first[pair])))[:most]
    with style():
        figure, grid = canvas(7.0, 3.4)
        axes = grid[0, 0]
        for number, pair in enumerate(pairs):
            for which, (name, mean) in enumerate(means.items()):
                values = np.array(mean[pair]) / max(float(np.max(first[pair])), np.finfo(float).tiny)
                axes.plot(
                    np.arange(1, len(values) + 1),
                    values,
                    color=SERIES[number % len(SERIES)],
                    linestyle=DASHES[which % len(DASHES)],
                    marker="o" if which == 0 else None,
                    label=" ".join(filter(None, (pair.replace("_to_", " → "), name))),
                )
        axes.set_ylabel("mean flow / its largest")
        _layers(axes)
        _legend_of_runs(figure)
        return figure
