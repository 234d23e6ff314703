"""Fills the cache: every unit that is not done is tokenised, from where it was left, by several processes
where that pays."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tqdm import tqdm

from jaxlab.data.documents.cache import Unit, make_folder
from jaxlab.data.documents.config import DocumentsConfig
from jaxlab.data.documents.document import Counts, Document, Encoder
from jaxlab.data.documents.encoders import Encoders
from jaxlab.data.documents.files import DataFile
from jaxlab.data.documents.readers import (
    Place,
    Progress,
    Reader,
    Row,
    read_json_lines,
    read_parquet,
    read_saved,
    read_text,
)
from jaxlab.data.documents.shards import write_arrays
from jaxlab.errors import UserError
from jaxlab.files import remove_torn

SHARD_TOKENS = 1 << 26
"""Tokens after which a shard is written; so many, and their offsets, are held in memory."""
BATCH_ROWS, BATCH_LETTERS = 1024, 1 << 22
"""At most so much is tokenised at once."""
CORES_EACH, PARALLEL_BYTES = 8, 1 << 28
"""What pays for a further process: one keeps so many cores busy, as the tokenizer has threads of its own."""
FindModelFolder = Callable[[str], Path]


def prepare_units(
    units: Sequence[Unit],
    config: DocumentsConfig,
    encoders: Encoders,
    find_model: FindModelFolder,
    *,
    processes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenises what is not tokenised yet. A process that is killed leaves whole shards, which are gone on
    from; of several that work on one unit all but one wait.

    Args:
      processes: None: as many as there are cores and as pays.

    Raises:
      UserError: a file, a tokenizer, a template or the disk fails; what is done so far stays.
    """
    todo = [unit for unit in units if not unit.done]
    if not todo:
        return
    total = sum(unit.size for unit in todo)
    if processes is None:
        cores = os.cpu_count() or 1
        processes = min(-(-cores // CORES_EACH), len(todo), 1 + total // PARALLEL_BYTES)
    with tqdm(total=total, desc="tokenise", unit="B", unit_scale=True) as bar:
        if processes <= 1:
            for unit in todo:
                _prepare(unit, config, encoders.of(unit.data), bar.update, shard_tokens)
        else:
            _in_processes(todo, config, find_model, processes, bar, shard_tokens)


def _prepare(
    unit: Unit, config: DocumentsConfig, encoder: Encoder, report: Callable[[int], Any], shard_tokens: int
) -> None:
    """Tokenises a unit to its end; `report` is told the bytes that were read."""
    make_folder(unit.folder)
    lock = filelock.FileLock(unit.folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        tqdm.write(f"another process tokenises {unit.files[0].path}: waiting for it")
        lock.acquire()
    except OSError as error:
        raise UserError(f"{unit.folder}: cannot be written: {error.strerror}") from error
    try:
        if not unit.done:
            _write(unit, config, encoder, report, shard_tokens)
    finally:
        lock.release()


@dataclass
class _Buffer:
    """Documents that wait for a shard."""

    tokens: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    size: int = 0

    def add(self, documents: Sequence[Document], dtype: type[np.unsignedinteger]) -> None:
        for document in documents:
            self.tokens.append(document.tokens.astype(dtype))
            if document.targets is not None:
                self.targets.append(document.targets)
            self.lengths.append(len(document.tokens))
            self.keys.append(document.key)
            self.size += len(document.tokens)

    def arrays(self, dtype: type[np.unsignedinteger]) -> dict[str, np.ndarray]:
        found = {
            "tokens": np.concatenate([np.zeros(0, dtype), *self.tokens]),
            "ends": np.cumsum(self.lengths, dtype=np.int64),
            "keys": np.asarray(self.keys, np.uint64),
        }
        if self.targets:
            found["targets"] = np.concatenate(self.targets)
        return found


def _write(
    unit: Unit, config: DocumentsConfig, encoder: Encoder, report: Callable[[int], Any], shard_tokens: int
) -> None:
    number, first, place = unit.reached()
    dtype = _token_dtype(encoder.largest)
    remove_torn(unit.folder / f"{number:05}.safetensors")
    report(sum(file.size for file in unit.files[:first]))
    buffer, counts = _Buffer(), Counts()
    at: tuple[int, ...] = (first, *place)
    for rows, at in _batches(unit, first, place, report):
        buffer.add(encoder.encode(rows, counts), dtype)
        if counts.bad and config.on_bad_rows == "refuse":
            raise UserError(f"{counts.first_bad} (set data.on_bad_rows to skip to pass such rows by)")
        if buffer.size >= shard_tokens:
            _flush(unit, number, buffer, dtype, counts, at, done=False)
            number, buffer, counts = number + 1, _Buffer(), Counts()
    _flush(unit, number, buffer, dtype, counts, at, done=True)


def _flush(
    unit: Unit,
    number: int,
    buffer: _Buffer,
    dtype: type[np.unsignedinteger],
    counts: Counts,
    after: tuple[int, ...],
    *,
    done: bool,
) -> None:
    arrays = buffer.arrays(dtype)
    facts = {
        "documents": len(arrays["ends"]),
        "tokens": len(arrays["tokens"]),
        "largest": int(arrays["tokens"].max(initial=0)),
        "counts": counts.to_json(),
        "after": list(after),
        "done": done,
    }
    write_arrays(unit.folder / f"{number:05}.safetensors", arrays, facts)


def _batches(
    unit: Unit, first: int, place: Place, report: Callable[[int], Any]
) -> Iterator[tuple[list[tuple[str, Row]], tuple[int, ...]]]:
    """Rows with where they stand, and after them (file, *place) of what comes next."""
    rows: list[tuple[str, Row]] = []
    letters = 0
    at = (first, *place)
    for number in range(first, len(unit.files)):
        file, progress, told = unit.files[number], Progress(), 0
        what = "line" if file.format == "jsonl" else "row"
        for row in _reader(unit, file)(place if number == first else Place(), progress):
            where = str(file.path) if file.format == "text" else f"{file.path} {what} {row.after.number}"
            rows.append((where, row))
            letters += len(row.value) if isinstance(row.value, str) else 1000
            at = (number, *row.after)
            if len(rows) >= BATCH_ROWS or letters >= BATCH_LETTERS:
                yield rows, at
                rows, letters = [], 0
                report(progress.read - told)
                told = progress.read
        report(file.size - told)
    if rows:
        yield rows, at


def _reader(unit: Unit, file: DataFile) -> Reader:
    data, path = unit.data, file.path
    chat = data.content == "chat"
    column = data.column or (None if chat else "text")
    match file.format:
        case "text":
            return lambda start, progress: read_text(path, start, progress, data.separator)
        case "jsonl":
            return lambda start, progress: read_json_lines(path, start, progress, column, chat=chat)
        case "parquet":
            return lambda start, progress: read_parquet(path, start, progress, column, chat=chat)
        case "dataset":
            return lambda start, progress: read_saved(
                str(path), data.split, start, progress, column, subset=data.subset, chat=chat
            )


def _token_dtype(largest: int) -> type[np.unsignedinteger]:
    return np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.uint32


def _in_processes(
    units: Sequence[Unit],
    config: DocumentsConfig,
    find_model: FindModelFolder,
    processes: int,
    bar: tqdm,
    shard_tokens: int,
) -> None:
    """Spreads units over processes, the largest first. Nothing but bytes read and a message comes back: what
    they make is on the disk."""
    shares: list[list[Unit]] = [[] for _ in range(processes)]
    for unit in sorted(units, key=lambda unit: -unit.size):
        min(shares, key=lambda share: sum(u.size for u in share)).append(unit)
    model = None if config.tokenizer is None else find_model(config.tokenizer)
    context = multiprocessing.get_context("spawn")
    read = context.Value("q", 0)
    ends = []
    cores = max(1, (os.cpu_count() or 1) // processes)
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = before or str(cores)  # for the children, which inherit it
    try:
        for share in shares:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (share, config, model, read, theirs, os.getpid(), shard_tokens)
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            ends.append((worker, ours))
        while any(worker.is_alive() for worker, _ in ends):
            bar.update(read.value - bar.n)
            time.sleep(0.2)
            _raise_failed(ends)
        _raise_failed(ends)
        bar.update(read.value - bar.n)
    finally:
        if before is None:
            del os.environ["RAYON_NUM_THREADS"]
        for worker, _ in ends:
            worker.terminate()
        for worker, _ in ends:
            worker.join()


def _raise_failed(ends: Sequence[tuple[Any, Any]]) -> None:
    for worker, pipe in ends:
        try:
            if pipe.poll():
                raise UserError(pipe.recv())
        except EOFError:  # it has ended and said nothing
            pass
        if worker.exitcode not in (None, 0):
            raise UserError(
                f"a process that tokenises ended (exit status {worker.exitcode}); out of memory? what is "
                "done stays; start again"
            )


def _work(
    units: Sequence[Unit],
    config: DocumentsConfig,
    model: Path | None,
    read: "Synchronized[int]",
    pipe: Any,
    parent: int,
    shard_tokens: int,
) -> None:
    """A process of `_in_processes`."""

    def report(size: int) -> None:
        if os.getppid() != parent:  # it was killed, and nobody waits for this one
            os._exit(1)
        with read.get_lock():
            read.value += size

    try:
        encoders = Encoders(config, lambda _: model or Path())
        for unit in units:
            _prepare(unit, config, encoders.of(unit.data), report, shard_tokens)
    except UserError as error:
        pipe.send(str(error))
    except KeyboardInterrupt:
        pass
