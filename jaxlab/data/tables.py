"""Tables of text from files: CSV, TSV, text with a separator, JSON Lines, Parquet, saved or hub data sets.

Files come from anywhere, so every mistake in one is told with the file and the line.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlab.config import suggestion
from jaxlab.errors import UserError

MOST_BYTES = 1 << 31
_OBJECTS = (".jsonl", ".ndjson", ".json")
_FIELD_LIMIT = 1 << 24
"""Characters in one field: csv's own limit refuses long articles."""


class Row(NamedTuple):
    """The chosen columns of one row, and where it stands, for messages."""

    where: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class TableFormat:
    """How a text file holds a table; None: by the suffix of its name."""

    delimiter: str | None = None
    """Between columns: a comma in .csv, a tab elsewhere."""
    header: bool | None = None
    """Whether the first line names the columns; by default where columns are given by name."""
    quotes: bool | None = None
    """Whether "..." around a field is taken off; by default in .csv."""
    encoding: str = "utf-8"


def read_table(path: str | Path, columns: Sequence[str | int], form: TableFormat | None = None) -> list[Row]:
    """The rows of a file, in their order.

    Args:
      columns: names, or numbers from 0. The last one of a file without quotes holds all that is left of the
        line.

    Raises:
      UserError: the file cannot be read or decoded, lacks a column, or holds no row.
    """
    path, form = Path(path), form or TableFormat()
    if path.suffix == ".parquet":
        rows = _parquet(path, columns)
    else:
        text = _text(path, form.encoding)
        rows = _objects(path, text, columns) if path.suffix in _OBJECTS else _lines(path, text, columns, form)
    found = list(rows)
    if not found:
        raise UserError(f"{path}: holds no row")
    return found


def is_dataset(path: str | Path) -> bool:
    """Whether a folder was saved by Hugging Face's `datasets`."""
    names = ("dataset_dict.json", "dataset_info.json", "state.json")
    return any((Path(path) / name).is_file() for name in names)


def open_dataset(name: str, split: str, subset: str = "") -> Any:
    """One split of a folder that `datasets` saved, of a folder laid out as on the hub, or of a hub id: a
    `datasets.Dataset`.

    Raises:
      UserError: `datasets` is not installed, or cannot read it; no such split.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: a data set of the hub's form needs the package datasets (pip install "
            "'jaxlab[datasets]'); or give the folder of the set's text files as data.path"
        ) from None
    saved = is_dataset(name)
    if saved and subset:
        raise UserError(f"{name}: datasets saved it, as one set; leave subset out")
    try:
        if saved:
            table = datasets.load_from_disk(name)
        else:
            table = datasets.load_dataset(name, subset or None, split=split)
        if isinstance(table, dict):
            if split not in table:
                raise UserError(
                    f"{name}: no split {split!r}; there are {', '.join(map(str, table))}; set split"
                )
            table = table[split]
        elif saved and split != "train" and table.split is not None and str(table.split) != split:
            raise UserError(f"{name}: no split {split!r}, but {str(table.split)!r} alone; set split")
    except UserError:
        raise
    except Exception as error:  # it raises whatever its many readers raise
        here = "" if Path(name).exists() else "no such folder here, and "
        raise UserError(f"{name}: {here}datasets cannot read it ({type(error).__name__}: {error})") from error
    return table


def read_dataset(name: str, split: str, columns: Sequence[str | int], subset: str = "") -> list[Row]:
    """The rows of one split of a folder that `datasets` saved, or of a hub id.

    Raises:
      UserError: as `open_dataset` says, or there is no such column.
    """
    table = open_dataset(name, split, subset)
    names = list(table.column_names)
    chosen = [_named(column, names, f"{name} {split}") for column in columns]
    lists = [table[column] for column in chosen]
    return [
        Row(
            f"{name} {split} row {number}",
            tuple(_plain(value, f"{name} {split} row {number}") for value in row),
        )
        for number, row in enumerate(zip(*lists, strict=True), 1)
    ]


def _text(path: Path, encoding: str) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: too large for a table of prompts; take a part of it")
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if encoding == "utf-8":
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: is UTF-16, not UTF-8; set its encoding to utf-16")
        encoding = "utf-8-sig"
    try:
        return raw.decode(encoding)
    except LookupError:
        raise UserError(f"{path}: no encoding {encoding!r}; the usual ones are utf-8 and latin-1") from None
    except UnicodeError as error:
        line = raw.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise UserError(
            f"{path} line {line}: not valid {encoding.removesuffix('-sig').upper()}; convert the file, or "
            "set its encoding (latin-1, utf-16, ...)"
        ) from None


def _lines(path: Path, text: str, columns: Sequence[str | int], form: TableFormat) -> Iterator[Row]:
    of_commas = path.suffix == ".csv"
    delimiter = form.delimiter if form.delimiter is not None else "," if of_commas else "\t"
    quotes = form.quotes if form.quotes is not None else of_commas
    records = _quoted(path, text, delimiter) if quotes else _plain_lines(text, delimiter, columns)
    named = any(isinstance(column, str) for column in columns)
    header = form.header if form.header is not None else named
    if header:
        number, names = next(records, (1, []))
        if not names:
            raise UserError(f"{path}: the file is empty")
        names = [name.strip() for name in names]
        places = [
            column if isinstance(column, int) else names.index(_named(column, names, f"{path} line {number}"))
            for column in columns
        ]
    elif named:
        raise UserError(f"{path}: columns are given by name, so it needs a header; set header to true")
    else:
        places = [int(column) for column in columns]
    for number, fields in records:
        if max(places) >= len(fields):
            raise UserError(
                f"{path} line {number}: {len(fields)} column{'s' * (len(fields) != 1)} by the delimiter "
                f"{delimiter!r}, and column {max(places)} is asked for, counted from 0; mend the line, or "
                "set delimiter, quotes or the columns"
            )
        if header and any(field.strip() for field in fields[len(names) :]):
            raise UserError(
                f"{path} line {number}: {len(fields)} columns by the delimiter {delimiter!r}, and the header "
                f"names {len(names)}; put a text that holds the delimiter in quotes, or set delimiter"
            )
        yield Row(f"{path} line {number}", tuple(fields[place] for place in places))


def _plain_lines(text: str, delimiter: str, columns: Sequence[str | int]) -> Iterator[tuple[int, list[str]]]:
    numbers = [column for column in columns if isinstance(column, int)]
    # By number, the last column that is asked for holds the rest: a text may hold the delimiter.
    most = max(numbers) if len(numbers) == len(columns) and delimiter != "\t" else -1
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.removesuffix("\r"):
            yield number, line.split(delimiter, most)


def _quoted(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    if len(delimiter) != 1:
        raise UserError(f"{path}: a file with quotes needs a delimiter of one letter, not {delimiter!r}")
    before = csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first = 1
    try:
        for fields in reader:
            if fields:
                yield first, fields
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path} line {first}: {error}; mend its quotes, or set quotes to false if they are of the text"
        ) from None
    finally:
        csv.field_size_limit(before)


def _objects(path: Path, text: str, columns: Sequence[str | int]) -> Iterator[Row]:
    if path.suffix == ".json":
        value = _parsed(text, str(path))
        entries = value if isinstance(value, list) else [value]
        placed: Iterable[tuple[str, Any]] = ((f"{path} entry {n}", x) for n, x in enumerate(entries, 1))
    else:
        numbered = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        placed = ((f"{path} line {n}", _parsed(line, f"{path} line {n}")) for n, line in numbered)
    for where, value in placed:
        if not isinstance(value, dict):
            raise UserError(f'{where}: not an object like {{"text": "...", "label": 0}}')
        chosen = [_named(column, list(value), where) for column in columns]
        yield Row(where, tuple(_plain(value[column], where) for column in chosen))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that anybody wrote: nested too deep") from None


def _parquet(path: Path, columns: Sequence[str | int]) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'jaxlab[datasets]'") from None
    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
        chosen = [_named(column, names, str(path)) for column in columns]
        table = file.read(columns=list(dict.fromkeys(chosen)))
    except UserError:
        raise
    except Exception as error:  # pyarrow has errors of its own for each way to be damaged
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error
    lists = [table.column(name).to_pylist() for name in chosen]
    for number, row in enumerate(zip(*lists, strict=True), 1):
        where = f"{path} row {number}"
        yield Row(where, tuple(_plain(value, where) for value in row))


def _named(column: str | int, names: Sequence[str], where: str) -> str:
    if isinstance(column, int) and 0 <= column < len(names):
        return names[column]
    if column in names:
        return str(column)
    shown = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    hint = suggestion(column, names) if isinstance(column, str) else ""
    raise UserError(f"{where}: no column {column!r}{hint}; its columns are {shown}")


def _plain(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"{where}: a column holds {type(value).__name__}, not text or a number")
