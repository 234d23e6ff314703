"""The page of several icl runs: how the flows of one differ from those of another."""

import re
from pathlib import Path

import pytest

from jaxlab.reporting.folders import RunFolder
from jaxlab.reporting.page import run_list
from jaxlab.reporting.papers.label_words.analysis_plots import comparison_figure, difference_figure
from jaxlab.reporting.papers.label_words.section import _differences

LAYERS = 6


def run(name, wp, layers=LAYERS, seed=1):
    """A run whose share of S_wp is `wp` in every layer; S_pq has a third of the rest, S_ww two."""
    share = {"wp": [wp] * layers, "pq": [(1 - wp) / 3] * layers, "ww": [2 * (1 - wp) / 3] * layers}
    std = {key: [0.01] * layers for key in share}
    config = {"seeds": [seed], "model": f"models/{name}"}
    return RunFolder(
        Path(f"icl-{name}"), config, {"task": "icl"}, {"flows": {"share": share, "share_std": std}}
    )


def test_differences_in_numbers():
    runs = {"one": run("one", 0.2), "two": run("two", 0.5)}
    figure, table = map(str, _differences(runs))
    assert 'id="figure-icl-difference-1"' in figure
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table.replace("\xa0", " "))
    assert cells[:4] == ["S_wp, first third", "20.0 %", "50.0 %", "+30.0 points"]
    assert cells[-4:] == ["S_ww, last third", "53.3 %", "33.3 %", "-20.0 points"]
    # Other sets of edges cannot be set beside each other; a run with itself has no difference.
    other = run("vlm", 0.2)
    other.results["flows"]["share"] = {"image_to_answer": [1.0] * LAYERS}
    assert _differences({"one": runs["one"], "vlm": other}) == []
    assert "+0.0 points" in str(_differences({"one": runs["one"], "again": run("one", 0.2)})[1])


@pytest.mark.parametrize("layers", [LAYERS, 12])
def test_the_curve_is_the_second_less_the_first(layers):
    figure = difference_figure(run("one", 0.2).results, run("two", 0.5, layers).results)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert lines["words → label words (S_wp)"] == pytest.approx([0.3] * LAYERS)


def test_long_names_of_runs_stay_on_the_picture():
    names = ("my (data.shots 1, label_classes together, model a)", "word " * 40)
    figure = comparison_figure({name: run("one", 0.2).results for name in names}, "shares")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert 0 < place.x0 < place.x1 < figure.bbox.width
    assert 0 < place.y0 < place.y1 < figure.bbox.height
    assert len(legend.get_texts()) == 4


def test_the_list_of_runs_tells_those_of_one_name_apart():
    two = [
        RunFolder(Path(f"own-{digest}"), {"model": m}, {}, {})
        for digest, m in (("12345678", "a"), ("22345678", "b"))
    ]
    text = str(run_list(two))
    assert "<b>own (model a)</b>" in text
    assert "<b>own (model b)</b>" in text
