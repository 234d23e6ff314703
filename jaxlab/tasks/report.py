"""Task `report`: one HTML page from the files of run folders."""

import dataclasses
from typing import Annotated

from jaxlab.config import POSITIONAL
from jaxlab.files import output_path, write_atomic
from jaxlab.reporting import read_runs, render


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a self-contained HTML page from the results of runs."""

    runs: Annotated[tuple[str, ...], POSITIONAL]
    """run folders; the folder of a quickstart stands for all its stages"""
    out: str = "outputs/report.html"
    """the file to write"""


def run(arguments: Arguments) -> None:
    out = output_path(arguments.out)
    if out.suffix not in (".html", ".htm"):
        out = out.with_name(f"{out.name}.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, render(read_runs(arguments.runs)))
    print(f"report: {out}")
