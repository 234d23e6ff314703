"""The part of the page on native sparse attention: a full and a sparse model of one size, side by side."""

import dataclasses
from collections.abc import Sequence

from jaxlab.reporting import plots
from jaxlab.reporting.folders import RunFolder, at
from jaxlab.reporting.formats import NONE, Number, change, count, decimal, duration, mean, percent, size
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.page import Section, best_cell, claim_list, figure, figure_row, note, paragraph, table
from jaxlab.reporting.papers.nsa import long_input, rules
from jaxlab.reporting.papers.nsa.plots import attention_speed_figure, chosen_blocks_figure
from jaxlab.reporting.verdicts import Verdict

KEY = "nsa"
KICKER = f"Part one · {rules.PAPER}"
FULL, SPARSE = "full attention", "NSA"
LONGER = 300 * 8192
"""Tokens that configs/nsa/n1_nsa.yaml trains on."""
MORE = " What a longer training shows: configs/nsa/n1_full.yaml and n1_nsa.yaml."


def build(runs: Sequence[RunFolder]) -> Section | None:
    """The section, or None where no run of text with NSA is among the runs."""
    trained = [r for r in runs if r.task == "train" and _is_from_scratch_on_bytes(r)]
    # Other selectors and ablations of NSA are told in the part on long input.
    groups = {name: [r for r in trained if long_input.variant(r) == name] for name in (FULL, SPARSE)}
    timed = [r for r in runs if r.task == "attention-speed"]
    if not groups[SPARSE]:
        return _of_speed_alone(timed) if timed else None
    evaluated = [r for r in runs if r.task == "evaluate" and _of(r, trained)]
    measured = {name: _by_model(evaluated, members) for name, members in groups.items()}
    section = Section(KEY, KICKER, "Native sparse attention", _headline(groups, timed))
    section.verdicts = [_n1(groups), _n3(groups, timed)]
    if not long_input.speaks(runs):
        section.verdicts += [
            rules.N2.unexamined(
                "A needle is found only by a model trained on needles. configs/nsa/n2_needle_nsa.yaml and "
                "n2_needle_nsa_test.yaml train for it and search at every depth."
            ),
            rules.N4.unexamined(
                "On texts this short every method reads nearly all. configs/nsa/n4_needle.yaml and "
                "n4_text.yaml compare NSA with H2O, InfLLM, Quest and exact choices at equal budgets."
            ),
            rules.N5.unexamined(
                "So small a difference takes several seeds and longer training: "
                "configs/nsa/n5_selectors.yaml and n5_branches.yaml."
            ),
        ]
        section.verdicts.sort(key=lambda verdict: verdict.claim.id)
    longer = ("N2", "N4", "N5")
    open_claims = [v.claim.id for v in section.verdicts if v.claim.id in longer]
    if section.verdicts[0].evidence.endswith(MORE):
        open_claims.insert(0, "N1")
    if open_claims:
        section.beyond = (
            f"Not at this size: {', '.join(open_claims)}. configs/nsa/ has runs that examine them."
        )
    section.body = [
        paragraph(
            "Each query reads three things only: summaries of blocks of the text before it, the few blocks "
            "whose summaries matter most to it, and a window of its nearest neighbours. The choice of "
            "blocks is learned with the model. Two byte-level language models of equal size learn the same "
            "text here, one with such attention, one with full attention."
        ),
        claim_list(section.verdicts),
        _loss(groups),
        _numbers(groups),
        _speed(groups),
        _attention_speed(timed),
        _positions(measured),
        *_blocks(measured[SPARSE], groups[SPARSE]),
        _decoding(measured[SPARSE]),
    ]
    if not groups[FULL]:
        section.body.insert(2, note("No run with full attention was given: nothing to compare NSA with."))
    section.runs = [*trained, *evaluated, *timed]
    return section


def _is_from_scratch_on_bytes(run: RunFolder) -> bool:
    on_bytes = run.setting("data", "kind") == "text" and run.setting("data", "tokenizer") is None
    return on_bytes and run.get("retrofit") is None


def _of(evaluation: RunFolder, trained: Sequence[RunFolder]) -> bool:
    """Whether an evaluation is of one of the trained models, or of an NSA model from elsewhere."""
    named = any(run.is_named_by(evaluation.setting("model")) for run in trained)
    return named or evaluation.get("nsa") is not None


def _by_model(evaluated: Sequence[RunFolder], members: Sequence[RunFolder]) -> list[RunFolder]:
    return [e for e in evaluated if any(run.is_named_by(e.setting("model")) for run in members)]


def _losses(runs: Sequence[RunFolder]) -> list[Number]:
    return [loss for run in runs if (loss := run.get("test", "eval_loss")) is not None]


def _speeds(runs: Sequence[RunFolder]) -> list[Number]:
    return [speed for run in runs if (speed := run.get("tokens_per_second")) is not None]


def _n1(groups: dict[str, list[RunFolder]]) -> Verdict:
    full, sparse = groups[FULL], groups[SPARSE]
    if not full:
        return rules.n1([], _losses(sparse), (1, 1), True)
    same = ("data", "steps", "batch_size")
    fair = all(
        [r.setting(key) for key in same] == [full[0].setting(key) for key in same] for r in [*full, *sparse]
    )
    sizes = full[0].get("parameters") or 1, sparse[0].get("parameters") or 1
    verdict = rules.n1(_losses(full), _losses(sparse), sizes, fair)
    read = (sparse[0].get("steps") or 0) * (sparse[0].get("tokens_per_step") or 0)
    if verdict.status == "not seen" and read < LONGER:
        return dataclasses.replace(verdict, evidence=verdict.evidence + MORE)
    return verdict


def _n3(groups: dict[str, list[RunFolder]], timed: Sequence[RunFolder]) -> Verdict:
    """By the time of attention alone where it was measured, else by the speed of training."""
    run = groups[SPARSE][0]
    length = run.setting("data", "sequence_length")
    trained = (
        _speeds(groups[FULL]),
        _speeds(groups[SPARSE]),
        length,
        str(run.env.get("device_kind", "this device")),
    )
    if not timed:
        return rules.n3_training(*trained)
    device = str(timed[0].env.get("device_kind", "this device"))
    return rules.n3(attention_times(timed[0]), device, rules.training_speed(*trained))


def _of_speed_alone(timed: Sequence[RunFolder]) -> Section:
    """The section of a page without trained models."""
    device = str(timed[0].env.get("device_kind", "this device"))
    headline = _speed_headline(attention_times(timed[0]))
    section = Section(KEY, KICKER, "Native sparse attention", headline, runs=list(timed))
    section.verdicts = [rules.n3(attention_times(timed[0]), device)]
    section.body = [claim_list(section.verdicts), _attention_speed(timed)]
    return section


def attention_times(run: RunFolder) -> list[rules.AttentionTimes]:
    """The rows of an attention-speed run, NSA and dense attention of one length and part together."""
    rows = {(row["attention"], row["length"], row["part"]): row for row in run.get("rows") or []}
    found = []
    for (kind, length, part), row in rows.items():
        dense = rows.get(("dense", length, part))
        if kind == "nsa" and dense:
            used = dense["processor_seconds"], row["processor_seconds"]
            found.append(rules.AttentionTimes(length, part, dense["seconds"], row["seconds"], *used))
    return found


def _headline(groups: dict[str, list[RunFolder]], timed: Sequence[RunFolder]) -> tuple[str, str]:
    """The speed of attention where it was timed, else the loss; whatever they came to."""
    full, sparse = mean(_losses(groups[FULL])), mean(_losses(groups[SPARSE]))
    loss = None if full is None or sparse is None else change(sparse / full - 1)
    if timed:
        number, said = _speed_headline(attention_times(timed[0]))
        return number, said + (f"; test loss {loss} beside full attention at equal size" if loss else "")
    if loss is None:
        return decimal(sparse), "test loss with sparse attention, in nats per byte"
    return loss, "test loss with sparse attention, against full attention"


def _speed_headline(times: Sequence[rules.AttentionTimes]) -> tuple[str, str]:
    """How much faster attention is, forward and backward, at the greatest length, and at the least one."""
    both = sorted(t for t in times if t.part == "forward_backward")
    if not both:
        return NONE, "attention was not timed forward and backward"
    return (
        f"{1 / both[-1].ratio_used:.2f} ×",
        f"dense attention's time over NSA's, forward and backward, at {count(both[-1].length)} tokens "
        f"({1 / both[0].ratio_used:.2f} × at {count(both[0].length)})",
    )


def _loss(groups: dict[str, list[RunFolder]]) -> Markup:
    series = {
        key: {name: [run.curve(key) for run in members] for name, members in groups.items() if members}
        for key in ("loss", "eval_loss")
    }
    seeds = max(len(members) for members in groups.values())
    look = (
        "The closer the two lines, the less the sparsity costs. The right-hand side is text that neither "
        "model was trained on."
    )
    if seeds > 1:
        look += f" Bands span {seeds} seeds."
    drawing = plots.loss_figure(series["loss"], series["eval_loss"], "nats per byte")
    return figure(drawing, "nsa-loss", "Loss while training.", look)


def _numbers(groups: dict[str, list[RunFolder]]) -> Markup:
    rows = []
    losses = {name: mean(_losses(members)) for name, members in groups.items()}
    lowest = min((v for v in losses.values() if v is not None), default=None)
    for name, members in groups.items():
        if not members:
            continue
        run, loss = members[0], losses[name]
        rows.append(
            [
                name,
                count(run.get("parameters")),
                best_cell(decimal(loss)) if loss == lowest else decimal(loss),
                decimal(None if loss is None else loss / 0.6931471805599453, 3),
                count(mean(_speeds(members))),
                decimal(run.get("attended_tokens"), 1),
                duration(run.seconds),
            ]
        )
    head = [
        "attention",
        "parameters",
        "test loss, nats/byte",
        "bits/byte",
        "tokens/s, training",
        "tokens read per query",
        "time",
    ]
    return table(
        head,
        rows,
        "Two models of one size.",
        "Equal sizes need a narrower MLP in the sparse model, whose three branches have their own keys and "
        "values. Tokens read are counted over its branches: compressed blocks, chosen blocks, window.",
    )


def _speed(groups: dict[str, list[RunFolder]]) -> Markup:
    names = [name for name, members in groups.items() if members]
    attended = [groups[name][0].get("attended_tokens") or 0.0 for name in names]
    speeds = [mean(_speeds(groups[name])) or 0.0 for name in names]
    return figure_row(
        [
            plots.bars(names, attended, "Tokens read per query (mean over positions)", digits=1),
            plots.bars(names, speeds, "Training speed (tokens per second)"),
        ],
        "nsa-speed",
        "What is saved, and what it is worth on text as short as this.",
        "Fewer tokens read (left) become time saved (right) only on texts that are long enough, or with "
        "kernels made for it.",
    )


def _attention_speed(timed: Sequence[RunFolder]) -> Markup | None:
    """Time against length, of attention alone."""
    times = [t for run in timed[:1] for t in attention_times(run)]
    if not times:
        return None
    run = timed[0]
    on_cpu = all(t.nsa_used for t in times)
    heads, groups, dim = (run.setting(key) for key in ("num_heads", "num_kv_heads", "head_dim"))
    tried = ", ".join(
        f"{row['name']} {decimal(row['processor_seconds'] or row['seconds'], 2)} s"
        for row in run.get("dense_tried") or []
    )
    look = (
        f"{count(heads)} query heads, {count(groups)} key/value heads of {count(dim)}, {run.get('dtype')}, "
        "random inputs, medians of calls in turn"
        + (", seconds of processor, as other programs may use the machine. " if on_cpu else ". ")
        + "Dense attention is the fastest of those that jax has here and that never hold all scores "
        f"({tried} at the least length, forward and backward). Where the lines cross sparse attention begins "
        "to pay: most of its time grows with the length, dense attention's with the square. benchmarks/ has "
        "longer texts."
    )
    return figure(
        attention_speed_figure(times, on_cpu), "nsa-attention-speed", "Time of attention, by length.", look
    )


def _positions(measured: dict[str, list[RunFolder]]) -> Markup | None:
    series = {
        name: [
            ((p["first"] + p["last"]) / 2, p["loss"])
            for p in runs[0].get("by_position") or []
            if p["loss"] is not None
        ]
        for name, runs in measured.items()
        if runs
    }
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return None
    return figure(
        plots.position_figure(series, "nats per byte"),
        "nsa-position",
        "Test loss by position.",
        "Falling to the right means that the model uses text from far before. A line that stops falling "
        "where the window ends would mean that the chosen blocks bring nothing.",
    )


def _blocks(evaluated: Sequence[RunFolder], trained: Sequence[RunFolder]) -> list[Markup]:
    chosen = next((run.get("nsa") for run in evaluated if run.get("nsa")), None)
    if not chosen or not at(chosen, "layers"):
        return [
            note("The chosen blocks were not recorded: no evaluation of the sparse model is among the runs.")
        ]
    overlap = chosen.get("neighbour_overlap") or []
    chance = chosen.get("chance_overlap") or [None] * len(overlap)
    told = ", ".join(
        f"layer {i + 1}: {percent(v)} (by lot {percent(lot)})"
        for i, (v, lot) in enumerate(zip(overlap, chance, strict=True))
        if v is not None
    )
    blocks = trained[0].setting("model", "attention", "num_blocks") if trained else None
    look = (
        "Each row is a query, each column a block; later queries stand further down. Grey: the first block "
        "and the two nearest ones, which every query must read. Blue: chosen freely; vertical stripes are "
        "blocks that many queries find useful."
    )
    if blocks:
        look += f" Every query may read {blocks} blocks."
    if told:
        look += f" Of the blocks chosen freely, the query before reads too: {told}."
    return [
        figure(
            chosen_blocks_figure(chosen["layers"], chosen["block_size"]),
            "nsa-blocks",
            "The blocks that queries chose.",
            look,
        )
    ]


def _decoding(evaluated: Sequence[RunFolder]) -> Markup | None:
    """What claim N3 says of decoding, by count: bytes are what a decoded token waits for."""
    rows = next((run.get("nsa", "decoding") for run in evaluated if run.get("nsa", "decoding")), None)
    if not rows:
        return None
    cells = [
        [
            count(row["length"]),
            count(row["nsa_tokens"]),
            count(row["dense_tokens"]),
            size(row["nsa_bytes"]),
            size(row["dense_bytes"]),
            f"{row['dense_bytes'] / row['nsa_bytes']:.1f}",
        ]
        for row in rows
    ]
    return table(
        ["tokens so far", "tokens read, NSA", "full", "bytes read, NSA", "full", "times fewer"],
        cells,
        "What a decoded token reads.",
        "Counted from the sizes of this model, keys and values of all layers. Full attention reads all the "
        "text; of what NSA reads only the summaries grow with it, so NSA gains the more the longer it is.",
    )
