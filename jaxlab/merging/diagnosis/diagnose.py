"""Why a merge would be gibberish: what models have against each other, found from disk, in plain words.

`diagnose` measures (measures.py, tokens.py), `judge` judges, and `Diagnosis.to_json` is
what pages are made from.
"""

import dataclasses
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlab.checkpoints import HEAD, OpenModel
from jaxlab.errors import UserError
from jaxlab.merging.diagnosis.facts import Facts, Finding, config_differences
from jaxlab.merging.diagnosis.judge import judge
from jaxlab.merging.diagnosis.measures import (
    Sums,
    by_layer,
    by_module,
    match_tensors,
    measure,
    open_sides,
)
from jaxlab.merging.diagnosis.tokens import TokenDifferences, compare_tokens

FORMAT = "jaxlab merge diagnosis 1"
_SHOWN_ROWS = 20


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, and what follows."""

    facts: Facts
    findings: tuple[Finding, ...]
    """The worst first; none: nothing speaks against the merge."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it; NaN is null. Numbers of models are in the order of `compared`."""
        facts, measured = self.facts, self.facts.measured
        compared = [side.name for side in facts.compared]
        tensors = [
            {"name": t.name, "module": t.module, "layer": t.layer, **_numbers(t.sums)}
            for t in measured.tensors
        ]
        return {
            "format": FORMAT,
            "models": [
                {
                    "name": side.name,
                    "family": side.found.family,
                    "vision": side.model.described.has_vision,
                    "stored": sorted({t.stored_as for t in side.found.tensors.values()}),
                    "vocabulary": side.model.described.embedding_rows,
                    "tied_head": HEAD not in side.holders,
                }
                for side in facts.sides
            ],
            "reference": facts.reference.name,
            "base": facts.has_base,
            "compared": compared,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "configs": [dataclasses.asdict(difference) for difference in facts.configs],
            "misfits": list(facts.misfits),
            "tokens": [_tokens(tokens) for tokens in facts.tokens],
            "whole": _numbers(facts.whole),
            "layers": [{"layer": i, **_numbers(s)} for i, s in by_layer(measured.tensors).items()],
            "modules": [{"module": m, **_numbers(s)} for m, s in by_module(measured.tensors).items()],
            "embedding": _drift(facts),
            "tensors": tensors,
        }


def diagnose(
    models: Mapping[str, OpenModel],
    base: str | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> Diagnosis:
    """Compares the language models of two models or more; reads each tensor once.

    Args:
      models: by name; the first one, a VLM if there is any, gives the names of tensors.
      base: which of them the others come from; None: differences are taken from the first one.
      progress: called with the bytes of each tensor that was read.

    Raises:
      UserError: fewer than two models, files that are damaged, models that have no tensor in common.
    """
    if len(models) < 2:
        raise UserError("a merge takes two models or more; name another one, or the base with --base")
    sides = open_sides(models)
    reference = 0 if base is None else list(models).index(base)
    compared, misfits = match_tensors(sides)
    if not compared:
        more = f": {misfits[0]}" if misfits else ""
        raise UserError(f"{' and '.join(models)} have no tensor of their language models in common{more}")
    measured = measure(compared, reference, threads=threads, progress=progress)
    first = sides[0]
    facts = Facts(
        sides=tuple(sides),
        reference=sides[reference],
        has_base=base is not None,
        configs=tuple(d for side in sides[1:] for d in config_differences(first, side)),
        misfits=tuple(dict.fromkeys(misfits)),
        tokens=tuple(compare_tokens(first.name, first.model, s.name, s.model) for s in sides[1:]),
        measured=measured,
        tensors={item.name: item.tensors for item in compared},
    )
    return Diagnosis(facts, tuple(judge(facts)))


def table(diagnosis: Diagnosis) -> str:
    """Findings, then norms and cosines by layer and by module, for a terminal."""
    facts, measured = diagnosis.facts, diagnosis.facts.measured
    compared = facts.compared
    merged = compared if facts.has_base else facts.sides
    lines = [f"what speaks against merging {' and '.join(side.name for side in merged)}"]
    for number, finding in enumerate(diagnosis.findings, 1):
        lines += [f"  {number}. {finding.severity}: {finding.said}", f"     {finding.remedy}"]
    if not diagnosis.findings:
        lines.append("  nothing was found")
    letters = dict(zip(string.ascii_uppercase, compared, strict=False))
    legend = ", ".join(f"{letter} {side.name}" for letter, side in letters.items())
    what = "task vectors" if facts.has_base else "differences"
    lines += ["", f"{what} from {facts.reference.name}: {legend}"]
    pairs = list(itertools.combinations(range(len(letters)), 2))
    two = [string.ascii_uppercase[i] + string.ascii_uppercase[j] for i, j in pairs]
    head = [
        "",
        *(word for letter in letters for word in (f"|{letter}|/|weights|", f"cos {letter}", "changed")),
    ]
    head += [word for pair in two for word in (f"cos {pair}", "signs differ")]
    parts = [("all but tables", facts.whole), *by_module(measured.tensors).items()]
    parts += [(f"layer {layer}", sums) for layer, sums in by_layer(measured.tensors).items()]
    rows = [head, *([name, *_cells(sums, len(letters), pairs)] for name, sums in parts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for name, *cells in rows:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"  {name:<{widths[0]}}", *padded]).rstrip())
    return "\n".join(lines)


def _cells(sums: Sums, count: int, pairs: Sequence[tuple[int, int]]) -> list[str]:
    cells = []
    for i in range(count):
        share = sums.changed[i] / max(1, sums.size)
        cells += [_said(sums.relative[i], ".4f"), _said(sums.to_reference[i], ".4f"), f"{share:.1%}"]
    for i, j in pairs:
        cells += [_said(sums.cosines[i, j], ".3f"), _said(sums.conflicts[i, j], ".1%")]
    return cells


def _said(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


def _numbers(sums: Sums) -> dict[str, Any]:
    """Norms and shares as JSON has them; matrices over the compared models."""
    size = max(1, sums.size)
    return {
        "size": sums.size,
        "reference_norm": float(np.sqrt(sums.reference)),
        "norms": sums.norms,
        "relative": sums.relative,
        "cosine_to_reference": sums.to_reference,
        "changed": sums.changed / size,
        "cosines": sums.cosines,
        "conflicts": sums.conflicts,
        "not_finite": sums.not_finite,
    }


def _tokens(tokens: TokenDifferences) -> dict[str, Any]:
    """Counts, and the first of each list."""
    told = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    lists = ("moved", "reused", "only_first", "only_other")
    return {
        **{key: value for key, value in told.items() if key not in lists},
        **{key: {"count": len(told[key]), "first": told[key][:_SHOWN_ROWS]} for key in lists},
    }


def _drift(facts: Facts) -> dict[str, Any] | None:
    """How far rows of the embedding went, and which went farthest."""
    rows = facts.measured.rows
    if rows is None or not rows.relative.shape[1]:
        return None
    tokenizer = None if any(t.problem for t in facts.tokens) else facts.sides[0].model.tokenizer
    models = []
    for side, relative, cosines in zip(facts.compared, rows.relative, rows.cosines, strict=True):
        known = relative[~np.isnan(relative)]
        far = np.argsort(-np.nan_to_num(relative, nan=-1.0), kind="stable")[:_SHOWN_ROWS]
        models.append(
            {
                "model": side.name,
                "quantiles": np.quantile(known, [0, 0.25, 0.5, 0.75, 1]) if len(known) else [],
                "changed": float(np.mean(known > 0)) if len(known) else None,
                "farthest": [
                    {
                        "id": int(i),
                        "token": None if tokenizer is None else tokenizer.id_to_token(int(i)),
                        "relative": float(relative[i]),
                        "cosine": float(cosines[i]),
                    }
                    for i in far
                    if relative[i] > 0
                ],
            }
        )
    return {"rows": rows.relative.shape[1], "models": models}
