"""The page of a diagnosis of a merge: what `inspect --merge` found, from its JSON alone."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from jaxlab.reporting import plots
from jaxlab.reporting.formats import NONE, Number, count, decimal, percent
from jaxlab.reporting.markup import Markup, join, tag
from jaxlab.reporting.page import (
    Section,
    badge,
    facts,
    figure,
    folded,
    heading,
    page,
    paragraph,
    table,
)

Json = Mapping[str, Any]


def diagnosis_page(told: Json) -> str:
    """The page as HTML text.

    Args:
      told: `Diagnosis.to_json()`, as JSON has it.
    """
    names = [m["name"] for m in told["models"] if not told["base"] or m["name"] != told["reference"]]
    return page(
        f"Merging {_listed(names)}",
        "What speaks against it, from their tensors, settings and tokenizers. Differences are from "
        f"{told['reference']}.",
        [
            (
                model["name"],
                f"{model['family']}, {', '.join(model['stored'])}, {count(model['vocabulary'])} rows",
            )
            for model in told["models"]
        ],
        [_findings(told), _vectors(told), _tokens(told)],
        [],
        footer="Every number and every plot on this page is in diagnosis.json beside it.",
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _findings(told: Json) -> Section:
    found = told["findings"]
    worst = found[0]["severity"] if found else "nothing"
    said = {
        "breaks": "the merge would be gibberish, or cannot be made",
        "harms": "the merge would lose something",
        "note": "nothing is wrong; something should be known",
        "nothing": "nothing speaks against the merge",
    }[worst]
    section = Section("findings", "Findings", "What was found", (str(len(found)), said))
    items = [
        tag(
            "li",
            tag("span", str(number), class_="id"),
            tag("span", finding["said"], class_="what"),
            tag("span", badge(finding["severity"]), class_="verdict"),
            tag("span", finding["remedy"], class_="here"),
            tag("details", tag("summary", "tensors"), ", ".join(finding["tensors"]))
            if finding["tensors"]
            else None,
        )
        for number, finding in enumerate(found, 1)
    ]
    section.body = [
        paragraph("Nothing speaks against merging these models.")
        if not found
        else tag("ul", *items, class_="claims"),
        paragraph(
            badge("breaks"),
            " the merge is gibberish or not possible  ",
            badge("harms"),
            " it loses something  ",
            badge("note"),
            " know it before you merge",
            class_="key",
        ),
    ]
    if told["configs"]:
        rows = [[d["field"], d["first"], d["values"][0], d["other"], d["values"][1]] for d in told["configs"]]
        section.body += [
            heading("Settings in which the models are not one function"),
            table(["setting", "model", "value", "model", "value"], rows, "Settings.", "", texts=5),
        ]
    return section


def _vectors(told: Json) -> Section:
    compared, layers, modules = told["compared"], told["layers"], told["modules"]
    pairs = list(combinations(range(len(compared)), 2))
    whole = told["whole"]
    longest = max(whole["relative"], key=lambda v: v or 0.0)
    title = "Task vectors" if told["base"] else "Differences"
    section = Section(
        "vectors",
        "Tensors",
        title,
        (decimal(longest, 3), f"length of the longest over that of the weights of {told['reference']}"),
    )
    section.body = [
        facts(
            [
                (
                    name,
                    f"length {decimal(whole['relative'][i], 4)}, cosine "
                    f"{decimal(whole['cosine_to_reference'][i], 4)}; "
                    f"{percent(whole['changed'][i], 1)} changed",
                )
                for i, name in enumerate(compared)
            ]
        )
    ]
    if len(layers) > 1:
        at = [row["layer"] for row in layers]
        lengths = {
            name: _curve(at, [row["relative"][i] for row in layers]) for i, name in enumerate(compared)
        }
        likeness = {
            name: _curve(at, [row["cosine_to_reference"][i] for row in layers])
            for i, name in enumerate(compared)
        }
        section.body.append(
            figure(
                plots.layer_panels(
                    [
                        ("length / length of the weights", lengths, None),
                        (f"cosine to {told['reference']}", likeness, None),
                    ]
                ),
                "lengths",
                "How far each layer went.",
                "A fine-tune changes all layers by about as much, and leaves the direction of the weights. A "
                "layer that stands out was damaged, shuffled, or trained otherwise; near 0 are cosines of "
                "weights of another origin.",
            )
        )
        if pairs:
            label = lambda pair: f"{compared[pair[0]]}, {compared[pair[1]]}"
            pick = lambda key: {
                label((i, j)): _curve(at, [row[key][i][j] for row in layers]) for i, j in pairs
            }
            section.body.append(
                figure(
                    plots.layer_panels(
                        [
                            ("cosine of task vectors", pick("cosines"), 0.0),
                            ("signs differ", pick("conflicts"), 0.5),
                        ]
                    ),
                    "conflicts",
                    "Whether the models pull in one direction.",
                    "Cosines near 0, and signs that differ in half of the elements, are what chance gives: "
                    "skills of different kinds. Below 0 they undo each other.",
                )
            )
    maps = [
        part
        for part in (
            _map(told, "relative", "Length of the task vector over that of the weights", logarithmic=True),
            _map(told, "cosine_to_reference", f"Cosine to {told['reference']}"),
        )
        if part is not None
    ]
    section.body += maps
    section.body.append(_module_table(modules, compared, pairs))
    return section


def _curve(at: Sequence[Number], values: Sequence[Number | None]) -> tuple[list[Number], list[Number]]:
    known = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _map(told: Json, key: str, caption: str, logarithmic: bool = False) -> Markup | None:
    """Modules by layers, one panel for each model."""
    tensors = [t for t in told["tensors"] if t["layer"] is not None]
    modules = list(dict.fromkeys(t["module"] for t in tensors))
    layers = sorted({t["layer"] for t in tensors})
    if len(layers) < 2 or not modules:
        return None
    panels = []
    for i, name in enumerate(told["compared"]):
        cells: dict[tuple[str, int], list[float]] = {}
        for t in tensors:
            if t[key][i] is not None:
                cells.setdefault((t["module"], t["layer"]), []).append(t[key][i])
        values = [
            [sum(c) / len(c) if (c := cells.get((m, layer))) else None for layer in layers] for m in modules
        ]
        panels.append({"title": name, "rows": modules, "columns": layers, "values": values})
    drawing = plots.layer_maps(panels, logarithmic=logarithmic)
    look = "Rows are modules, columns layers; one that stands out in its row is where to look."
    return figure(drawing, f"map-{key}", f"{caption}.", look)


def _module_table(
    modules: Sequence[Json], compared: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Markup:
    head = ["module", *(f"{name}: length" for name in compared), *(f"{name}: cosine" for name in compared)]
    head += [f"{compared[i]}, {compared[j]}: cosine" for i, j in pairs]
    head += [f"{compared[i]}, {compared[j]}: signs differ" for i, j in pairs]
    head += [*(f"{name}: changed" for name in compared), "not finite"]
    rows = [
        [
            m["module"],
            *(decimal(v, 4) for v in m["relative"]),
            *(decimal(v, 4) for v in m["cosine_to_reference"]),
            *(decimal(m["cosines"][i][j], 3) for i, j in pairs),
            *(percent(m["conflicts"][i][j], 1) for i, j in pairs),
            *(percent(v, 1) for v in m["changed"]),
            count(sum(m["not_finite"])),
        ]
        for m in modules
    ]
    return folded(
        "The same by module, in numbers",
        table(head, rows, "Task vectors by module.", "Lengths are over those of the weights."),
    )


def _tokens(told: Json) -> Section:
    section = Section("tokens", "Tokens", "Tokenizers, templates, embeddings", None)
    rows = []
    for t in told["tokens"]:
        if t["problem"]:
            rows.append([f"{t['first']}, {t['other']}", *[NONE] * 6, t["templates"]])
            continue
        rows.append(
            [
                f"{t['first']}, {t['other']}",
                f"{count(t['sizes'][0])}, {count(t['sizes'][1])}",
                count(t["shared"]),
                *(count(t[key]["count"]) for key in ("moved", "reused")),
                f"{count(t['only_first']['count'])}, {count(t['only_other']['count'])}",
                count(len(t["cut"])),
                t["templates"],
            ]
        )
    head = [
        "models",
        "tokens",
        "in both",
        "with other ids",
        "ids of two tokens",
        "in one alone",
        "texts cut otherwise",
    ]
    section.body = [
        table(
            [*head, "chat template"],
            rows,
            "Tokenizers.",
            "A token with another id has its row elsewhere: merged by id, rows of two tokens are mixed.",
        )
    ]
    for t in told["tokens"]:
        lists = [
            (f"with other ids in {t['other']}", [f"{w} ({i}, {j})" for w, i, j in t["moved"]["first"]]),
            (f"only in {t['first']}", t["only_first"]["first"]),
            (f"only in {t['other']}", t["only_other"]["first"]),
        ]
        shown = [paragraph(tag("b", f"{name}: "), ", ".join(words)) for name, words in lists if words]
        if shown:
            section.body.append(folded(f"Tokens that {t['first']} and {t['other']} do not share", *shown))
    section.body += _drift(told["embedding"])
    return section


def _drift(drift: Json | None) -> list[Markup | None]:
    """How far the embedding's rows went."""
    if drift is None:
        return []
    rows, parts = [], []
    for model in drift["models"]:
        quantiles = [decimal(q, 4) for q in model["quantiles"]] or [NONE] * 5
        rows.append([model["model"], percent(model["changed"], 1), *quantiles])
        far = [
            [join([tag("code", row["token"]) if row["token"] is not None else NONE]), count(row["id"]),
             decimal(row["relative"], 3), decimal(row["cosine"], 3)]
            for row in model["farthest"]
        ]  # fmt: skip
        if far:
            look = "Length of the change over that of the row, and cosine of the row to what it was."
            parts.append(
                folded(
                    f"Tokens whose rows went farthest in {model['model']}",
                    table(["token", "id", "length", "cosine"], far, "Rows.", look),
                )
            )
    head = ["model", "rows changed", "least", "quarter", "half", "three quarters", "most"]
    caption = f"Drift of the embedding, over the {count(drift['rows'])} rows that all have."
    return [
        heading("Embedding"),
        table(head, rows, caption, "Length of the change of a row over the row's own: quantiles over rows."),
        *parts,
    ]
