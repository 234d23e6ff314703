"""How fast documents are tokenised and read, beside what a training step takes.

    python benchmarks/data.py --tokenizer MODEL --out benchmarks/data_cpu.json

The corpus is the source of Python's standard library, repeated with a number in front so that no two
documents are equal, as JSON Lines. Rates are per CPU second of all threads and processes, so that other work
on the machine counts little: what cores work side by side comes on top.
"""

import dataclasses
import json
import os
import resource
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from jaxlab.app import environment, model_folder
from jaxlab.data import BatchReader, DataSet, DocumentsConfig, DocumentsSource
from jaxlab.files import write_json


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    tokenizer: str | None = None
    """A model whose tokenizer is used besides bytes."""
    megabytes: int = 32
    """Of text."""
    files: int = 2
    """Over which it is spread: a process takes whole files."""
    lengths: tuple[int, ...] = (512, 4096)
    """Tokens in a row."""
    out: Path | None = None
    """JSON file to write."""


def write_corpus(folder: Path, arguments: Arguments) -> None:
    """The files, of equal size."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in library]
    number = 0
    for name in range(arguments.files):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            while file.tell() < (arguments.megabytes << 20) // arguments.files:
                file.write(json.dumps({"text": f"# {number}\n{texts[number % len(texts)]}"}) + "\n")
                number += 1


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def prepared(folder: Path, tokenizer: str | None, processes: int) -> tuple[DocumentsSource, dict[str, Any]]:
    """A source whose tokens were just made in a cache of their own, and how long it took."""
    with tempfile.TemporaryDirectory(dir=folder, delete=False) as cache:
        os.environ["JAXLAB_DATA_CACHE"] = cache
    sets = (DataSet(str(folder / "*.jsonl")),)
    source = DocumentsSource(DocumentsConfig(sources=sets, tokenizer=tokenizer, held_out=0.0), model_folder)
    _ = source.identity  # digests of the files are made apart
    cpu, wall = cpu_seconds(), time.perf_counter()
    source.prepare(processes)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    tokens = source.describe()["train"]["*.jsonl"]["tokens"]
    rate = {"tokens": tokens, "tokens_per_cpu_second": tokens / cpu, "tokens_per_second": tokens / wall}
    return source, {"tokenizer": tokenizer, "processes": processes, **rate}


def read(source: DocumentsSource, length: int) -> dict[str, Any]:
    """Batches of 8 rows by themselves, and through the thread that reads ahead."""
    found: dict[str, Any] = {"length": length}
    config = dataclasses.replace(source.config, sequence_length=length)
    rows = DocumentsSource(config, model_folder)
    rows.batch(0, 0, 8)
    steps = max(20, (1 << 21) // (8 * length))
    for name, ahead in (("tokens_per_cpu_second", 0), ("ahead_tokens_per_cpu_second", 2)):
        reader = BatchReader(rows, 0, 8, ahead=ahead)
        reader.read(0)
        cpu = cpu_seconds()
        for step in range(1, steps):
            reader.read(step)
        found[name] = (steps - 1) * 8 * length / (cpu_seconds() - cpu)
        reader.close()
    return {**found, "fill": rows.describe()["train"]["*.jsonl"]["fill"]}


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, arguments)
        made, source = [], None
        for tokenizer in dict.fromkeys((None, arguments.tokenizer)):
            for processes in (1, 2):
                source, rate = prepared(folder, tokenizer, processes)
                made.append(rate)
        assert source is not None
        results = {
            "prepare": made,
            "batches": [read(source, length) for length in arguments.lengths],
            "environment": environment(),
        }
    print(json.dumps(results["prepare"] + results["batches"], indent=2))
    if arguments.out is not None:
        write_json(arguments.out, results)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
