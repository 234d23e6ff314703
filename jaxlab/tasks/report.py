"""Task `report`: one HTML page from the files of run folders."""

import dataclasses
import sys
from typing import Annotated

from jaxlab.config import POSITIONAL
from jaxlab.errors import UserError
from jaxlab.files import output_path, write_atomic, writing
from jaxlab.reporting import read_finished, render, split_by_form


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a self-contained HTML page from the results of runs."""

    runs: Annotated[tuple[str, ...], POSITIONAL]
    """run folders; that of a quickstart stands for all its stages; unfinished and damaged ones are named"""
    out: str = "outputs/report.html"
    """the file to write"""


def run(arguments: Arguments) -> None:
    out = output_path(arguments.out)
    if out.suffix not in (".html", ".htm"):
        out = out.with_name(f"{out.name}.html")
    runs, left_out = read_finished(arguments.runs)
    if not runs:
        raise UserError("; ".join(left_out) or "no runs; name their folders")
    try:
        text = render(runs, left_out)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        runs, more = split_by_form(runs)
        if not more:  # no run's own fault
            raise
        left_out += more
        if not runs:
            raise UserError("; ".join(left_out)) from None
        text = render(runs, left_out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text)
    for problem in left_out:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"report: {out}")
