"""The part of the page on long input: needles by depth, sparsity without training, other selectors."""

from collections.abc import Mapping, Sequence

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder
from jaxlab.reporting.formats import NONE, Number, decimal, mean, percent
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import Section, best_cell, claim_list, figure, paragraph, table
from jaxlab.reporting.papers.nsa import rules
from jaxlab.reporting.verdicts import Verdict

KEY = "long"
METHODS = {
    "exact_tokens": "exact top-n, tokens",
    "exact_blocks": "exact top-n, blocks",
    "quest": "Quest",
    "infllm": "InfLLM",
    "h2o": "H2O",
}
_SELECTORS = {"compressed": "NSA", "min_max": "min-max selector", "auxiliary": "auxiliary-loss selector"}


def build(runs: Sequence[RunFolder]) -> Section | None:
    """The section, or None where no run speaks of N2, N4 or N5."""
    if not speaks(runs):
        return None
    trained = [r for r in runs if r.task == "train"]
    evaluated = [r for r in runs if r.task == "evaluate"]
    needles = [r for r in evaluated if r.get("needle")]
    sparse = [r for r in evaluated if _method(r) != "none"]
    variants = _variants(trained)
    makers = {id(r): _maker(r, trained) for r in evaluated}
    section = Section(
        KEY, f"Part one · {rules.PAPER}", "Long input: needles, and other ways to be sparse", ("", "")
    )
    compared = [r for r in evaluated if r in needles or r in sparse or _like_any(r, sparse)]
    section.verdicts = [_n2(needles, makers), _n4(compared, makers), rules.n5(_measures(variants))]
    seen = sum(v.status == "seen" for v in section.verdicts)
    section.headline = (f"{seen} of 3", "claims on long input seen")
    section.body = [
        paragraph(
            "A fact is hidden somewhere in a long text and asked for at its end. Sparse attention answers "
            "only if it chooses the block in which the fact stands. Beside NSA, which learns to choose, "
            "stand methods that make a trained dense model sparse without training, at a given number of "
            "tokens read, and other ways to choose within NSA."
        ),
        claim_list(section.verdicts),
        _maps(needles, makers),
        _methods(compared, makers),
        _variant_table(variants),
    ]
    told = [*needles, *sparse, *compared]
    models = [maker for r in told if (maker := makers[id(r)]) is not None]
    of_variants = [r for members in variants.values() for r in members] if len(variants) > 1 else []
    section.runs = list({id(r): r for r in [*models, *of_variants, *told]}.values())
    return section


def speaks(runs: Sequence[RunFolder]) -> bool:
    """Whether any run is an evaluation on needles or with sparsity, or NSA was trained in two variants."""
    evaluated = any(r.task == "evaluate" and (r.get("needle") or _method(r) != "none") for r in runs)
    return evaluated or len(_variants([r for r in runs if r.task == "train"])) > 1


def variant(run: RunFolder) -> str:
    """What the attention of a trained model is, in words: `full attention`, `NSA`, or NSA otherwise."""
    attention = str(run.setting("model", "attention", "kind") or "full")
    if attention != "nsa":
        return f"{attention} attention"
    name = _SELECTORS[str(run.setting("model", "attention", "selector") or "compressed")]
    branches = run.setting("model", "attention", "branches") or []
    absent = [branch for branch in ("compression", "selection", "window") if branch not in branches]
    if branches and absent:
        name += f" without {' and '.join(absent)}"
    return name + (", one K/V projection" if run.setting("model", "attention", "shared_kv") else "")


def _method(run: RunFolder) -> str:
    return str(run.setting("sparsity", "kind") or "none")


def _maker(run: RunFolder, trained: Sequence[RunFolder]) -> RunFolder | None:
    return next((t for t in trained if t.is_named_by(run.setting("model"))), None)


def _like_any(run: RunFolder, others: Sequence[RunFolder]) -> bool:
    """Whether a run measures on the same data as one of the others."""
    return any(_same(run, other, "data", "split", "batch_size", "batches") for other in others)


def _same(a: RunFolder, b: RunFolder, *keys: str) -> bool:
    return all(a.setting(key) == b.setting(key) for key in keys)


def _reader(run: RunFolder, maker: RunFolder | None) -> str:
    """The model of an evaluation, with its sparsity."""
    model = str(run.setting("model")) if maker is None else variant(maker)
    return model if _method(run) == "none" else METHODS.get(_method(run), _method(run))


def _variants(trained: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """NSA models by variant, of those that read what the first one reads."""
    models = [r for r in trained if r.setting("model", "attention", "kind") == "nsa"]
    found: dict[str, list[RunFolder]] = {}
    for run in models:
        if _same(run, models[0], "data", "steps", "batch_size"):
            found.setdefault(variant(run), []).append(run)
    return found


def _measures(variants: Mapping[str, Sequence[RunFolder]]) -> dict[str, list[Number]]:
    """Test losses of the variants that differ in the selector alone."""
    names = set(_SELECTORS.values())
    losses = {
        name: [loss for r in members if (loss := r.get("test", "eval_loss")) is not None]
        for name, members in variants.items()
        if name in names
    }
    return {name: values for name, values in losses.items() if values}


def _n2(needles: Sequence[RunFolder], makers: Mapping[int, RunFolder | None]) -> Verdict:
    found: list[Number] = []
    length = None
    for run in needles:
        maker = makers[id(run)]
        if maker is None or variant(maker) != "NSA":
            continue
        if run.get("needle", "length") == maker.setting("data", "sequence_length"):
            length = run.get("needle", "length")
            found += [at["exact_match"] for at in run.get("needle", "depths")]
    return rules.n2(found, length)


def _n4(runs: Sequence[RunFolder], makers: Mapping[int, RunFolder | None]) -> Verdict:
    """Of the data on which most was measured: NSA against the methods on a dense model."""
    sparse = [r for r in runs if _method(r) != "none"]
    if not sparse:
        return rules.n4([], {}, by_loss=False)
    first = max(sparse, key=lambda r: sum(_like_any(r, [other]) for other in runs))
    same = [r for r in runs if _like_any(r, [first])]
    by_loss = first.get("needle") is None
    measure = "loss" if by_loss else "exact_match"
    points: dict[str, list[tuple[Number, Number]]] = {}
    for run in same:
        name = _reader(run, makers[id(run)])
        if run.get(measure) is not None and run.get("attended_tokens") is not None:
            points.setdefault(name, []).append((run.get("attended_tokens"), run.get(measure)))
    methods = {name: points[name] for name in METHODS.values() if name in points}
    return rules.n4(points.get("NSA", []), methods, by_loss=by_loss)


def _maps(needles: Sequence[RunFolder], makers: Mapping[int, RunFolder | None]) -> Markup | None:
    """A panel for each model: depths against lengths, mean over runs."""
    by_model: dict[str, list[RunFolder]] = {}
    for run in needles:
        by_model.setdefault(_reader(run, makers[id(run)]), []).append(run)
    panels = []
    for name, members in by_model.items():
        lengths = sorted({r.get("needle", "length") for r in members})
        most = max(len(r.get("needle", "depths")) for r in members)
        values = [[_at_depth(members, length, row, most) for length in lengths] for row in range(most)]
        depths = [round(row / max(most - 1, 1), 2) for row in range(most)]
        panels.append({"title": name, "rows": depths, "columns": lengths, "values": values})
    if not panels:
        return None
    return figure(
        plots.heat_maps(panels, min(3, len(panels)), "depth of the fact", "length (tokens)"),
        "needle-maps",
        "Facts found, by depth and length.",
        "Per cent of the questions answered right; depth 0 is the start of the text, the greatest distance. "
        "Every cell dark: nothing that was asked for is out of reach.",
    )


def _at_depth(members: Sequence[RunFolder], length: int, row: int, most: int) -> Number | None:
    of_length = [r.get("needle", "depths") for r in members if r.get("needle", "length") == length]
    return mean([depths[row]["exact_match"] for depths in of_length if len(depths) == most])


def _methods(runs: Sequence[RunFolder], makers: Mapping[int, RunFolder | None]) -> Markup | None:
    if not any(_method(r) != "none" for r in runs):
        return None
    rows = [
        [
            _reader(run, makers[id(run)]),
            str(run.setting("data", "kind")),
            _length(run),
            decimal(run.get("attended_tokens"), 1),
            percent(run.get("exact_match"), 1) if run.get("needle") else NONE,
            decimal(run.get("loss"), 3),
        ]
        for run in sorted(runs, key=_order)
    ]
    head = ["attention", "data", "length", "tokens read per query", "needles found", "loss"]
    return table(
        head,
        rows,
        "Sparsity without training, beside models trained as they are read.",
        "Tokens read are a mean over positions. The exact choices know every score before they choose, so "
        "they show what is lost by reading less, not what a method could save.",
    )


def _order(run: RunFolder) -> tuple[int, str, Number]:
    """By length, shorter numbers first, then by tokens read."""
    return len(_length(run)), _length(run), run.get("attended_tokens") or 0


def _length(run: RunFolder) -> str:
    if run.get("needle"):
        return str(run.get("needle", "length"))
    is_text = run.setting("data", "kind") == "text"
    return str(run.setting("data", "sequence_length")) if is_text else NONE


def _variant_table(variants: Mapping[str, Sequence[RunFolder]]) -> Markup | None:
    if len(variants) < 2:
        return None
    losses = {
        name: mean([v for r in members if (v := r.get("test", "eval_loss")) is not None])
        for name, members in variants.items()
    }
    lowest = min((v for v in losses.values() if v is not None), default=None)
    rows = [
        [
            name,
            str(len(members)),
            best_cell(decimal(losses[name], 4)) if losses[name] == lowest else decimal(losses[name], 4),
            percent(mean([v for r in members if (v := r.get("test", "eval_exact_match")) is not None]), 1),
            decimal(members[0].get("attended_tokens"), 1),
        ]
        for name, members in variants.items()
    ]
    head = ["variant", "seeds", "test loss", "exact match", "tokens read per query"]
    return table(
        head,
        rows,
        "Selectors and ablations, on equal data and steps.",
        "The exact match is of whole sequences of targets: of use on needles, not on text.",
    )
