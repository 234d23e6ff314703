"""Rows of files, one after the other, in bounded memory, from any place on."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxlab.config import suggestion
from jaxlab.data.tables import open_dataset
from jaxlab.errors import UserError

LONGEST_ROW = 1 << 28
"""Bytes of a line of JSON."""
LONGEST_TEXT = 1 << 20
"""Letters: a longer plain text is read in parts."""
CHAT_COLUMNS = ("messages", "conversations")
TOOLS = "tools"
"""The column of the functions that the assistant of a conversation may call."""
_CHUNK = 1 << 20
_ROWS = 1000
"""That are taken from a table at once."""


class Place(NamedTuple):
    """Where the next row begins."""

    offset: int = 0
    """Bytes, of what a compressed file holds; of tables, rows."""
    number: int = 0
    """Rows before it."""
    inside: int = 0
    """1: inside a text, of which parts were read."""


class Row(NamedTuple):
    """One row of a file, or a part of a text."""

    value: Any
    """A text, or what a table holds; None: nothing."""
    after: Place
    """Where the next one begins."""
    problem: str = ""
    """What is wrong with it; then it has no value."""
    first: bool = True
    """Whether a text begins here."""
    last: bool = True
    """Whether it ends here."""
    tools: Any = None
    """Of a conversation: what stands beside it in the column TOOLS."""


class Progress:
    """How many bytes of a file were read."""

    def __init__(self) -> None:
        self.read = 0


Reader = Callable[[Place, Progress], Iterator[Row]]
"""The rows of a file from a place on."""


def read_text(path: Path, start: Place, progress: Progress, separator: str | None = None) -> Iterator[Row]:
    """The documents of a file of plain text: those that `separator` ends, or all of it.

    A document of more than LONGEST_TEXT letters comes in parts that end with a line.

    Raises:
      UserError: the file is damaged or cannot be read.
    """
    mark = b"" if separator is None else separator.encode()
    with _opened(path) as (file, told):
        file.seek(start.offset)
        offset, number, inside = start
        text, begin, ended = b"", 0, False
        while True:
            # How a text is cut depends on what follows its beginning alone, not on where reading began.
            while not ended and len(text) - begin <= LONGEST_TEXT + len(mark):
                chunk = file.read(_CHUNK)
                text, begin, ended = text[begin:] + chunk, 0, not chunk
                progress.read = told()
            left = len(text) - begin
            at = text.find(mark, begin, begin + LONGEST_TEXT + len(mark)) if mark else -1
            if at >= 0:
                end, skip, last = at, len(mark), True
            elif left > LONGEST_TEXT:
                end, skip, last = _line_end(text, begin, begin + LONGEST_TEXT), 0, False
            elif inside or text[begin:].strip() or not (number or mark):
                end, skip, last = len(text), 0, True
            else:
                return
            offset, number = offset + end + skip - begin, number + 1
            after = Place(offset, number, int(not last))
            yield _text(text[begin:end], path, after, skip, not inside)
            begin, inside = end + skip, int(not last)


def read_json_lines(
    path: Path, start: Place, progress: Progress, column: str | None, *, chat: bool = False
) -> Iterator[Row]:
    """What the rows of a file of JSON Lines hold in a column; None: the first of CHAT_COLUMNS that is there.

    Args:
      chat: whether it is a conversation, which may have tools beside it.

    Raises:
      UserError: the file is damaged or cannot be read.
    """
    with _opened(path) as (file, told):
        file.seek(start.offset)
        offset, number, _ = start
        while line := file.readline(LONGEST_ROW + 1):
            if len(line) > LONGEST_ROW:
                raise UserError(f"{path} line {number + 1}: longer than {LONGEST_ROW >> 20} MiB; split it")
            offset, number = offset + len(line), number + 1
            progress.read = told()
            if line.strip():
                yield _of_line(line, number, path, Place(offset, number), column, chat)


def read_parquet(
    path: Path, start: Place, progress: Progress, column: str | None, *, chat: bool = False
) -> Iterator[Row]:
    """What a column of a Parquet file holds, a group of rows after the other; see `read_json_lines`.

    Raises:
      UserError: the file is damaged or cannot be read, has no such column, or pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'jaxlab[data]'") from None
    with _readable(path), parquet.ParquetFile(path) as file:
        names = _columns(column, list(file.schema_arrow.names), str(path), chat)
        size = path.stat().st_size
        before, total = 0, max(file.metadata.num_rows, 1)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if before + rows > start.offset:
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=names):
                    skip = min(max(start.offset - before, 0), len(batch))
                    before += skip
                    for row in _rows_of(batch.slice(skip), names):
                        before += 1
                        yield row._replace(after=Place(before, before))
                    progress.read = size * before // total
            else:
                before += rows


def read_saved(
    name: str,
    split: str,
    start: Place,
    progress: Progress,
    column: str | None,
    *,
    subset: str = "",
    chat: bool = False,
) -> Iterator[Row]:
    """What a column of a data set holds that `datasets` reads; see `read_json_lines`.

    Raises:
      UserError: as `open_dataset` says, or there is no such column.
    """
    table = open_dataset(name, split, subset)
    chosen = _columns(column, list(table.column_names), f"{name} {split}", chat)
    arrow = table.select_columns(chosen).with_format("arrow")
    for at in range(start.offset, len(table), _ROWS):
        with _readable(Path(name)):
            rows = list(_rows_of(arrow[at : at + _ROWS], chosen))
        for number, row in enumerate(rows, at + 1):
            yield row._replace(after=Place(number, number))
        progress.read = int(table.data.nbytes * min(at + _ROWS, len(table)) / max(len(table), 1))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """A file, decompressed by its name, and how many of its bytes were read.

    Raises:
      UserError: it is damaged or cannot be read.
    """
    with _readable(path), open(path, "rb") as raw:
        told = raw.tell
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as file:
                yield io.BufferedReader(file, _CHUNK), told
        elif path.suffix == ".zst":
            try:
                import zstandard
            except ImportError:
                raise UserError(f"{path}: needs zstandard: pip install 'jaxlab[data]'") from None
            yield _Forward(_Zstd(raw, zstandard.ZstdDecompressor()), _CHUNK), told
        else:
            yield raw, told


class _Zstd(io.RawIOBase):
    """What is in zstd frames; unlike the library's own reader it says where one is cut short."""

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._rest = b""
        """Read, of the next frame."""
        self._waiting = b""
        """Decompressed."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            chunk = self._rest or self._raw.read(_CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._waiting = frame.decompress(chunk)
            self._frame, self._rest = (None, frame.unused_data) if frame.eof else (frame, b"")
        size = min(len(buffer), len(self._waiting))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
        return size


class _Forward(io.BufferedReader):
    """A stream that can be read from its beginning on only: seeking reads."""

    def seek(self, offset: int, whence: int = 0) -> int:
        left = offset
        while left and (chunk := self.read(min(left, _CHUNK))):
            left -= len(chunk)
        return offset


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What keeps a file from being read is one line.

    Raises:
      UserError: it cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged: {error}; fetch it again") from error
    except OSError as error:
        if error.errno is None:  # pyarrow's
            raise UserError(f"{path}: damaged, or of another format: {error}") from error
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # pyarrow and zstandard have errors of their own
        if type(error).__module__.partition(".")[0] not in ("pyarrow", "zstandard", "zstd"):
            raise
        raise UserError(f"{path}: damaged, or of another format: {error}") from error


def _line_end(text: bytes, begin: int, most: int) -> int:
    """Where to cut between two places: after the last line that no blank follows, else before a space, else
    between two letters."""
    least = begin + (most - begin) // 2
    cut = most
    while (cut := text.rfind(b"\n", least, cut)) >= 0:
        if not text[cut + 1 : cut + 2].isspace():
            return cut + 1
    if (cut := text.rfind(b" ", least, most)) > 0:
        return cut
    cut = most
    while cut > most - 4 and text[cut] & 0xC0 == 0x80:  # inside a letter
        cut -= 1
    return cut


def _text(raw: bytes, path: Path, after: Place, skipped: int, first: bool) -> Row:
    begin = after.offset - skipped - len(raw)
    if not begin:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            return Row(None, after, f"{path}: is UTF-16, not UTF-8; convert it")
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    last = not after.inside
    try:
        return Row(raw.decode(), after, "", first, last)
    except UnicodeDecodeError as error:
        at = begin + error.start + 1
        return Row(None, after, f"{path}: not valid UTF-8 (at its byte {at}); convert it", first, last)


def _rows_of(table: Any, names: Sequence[str]) -> Iterator[Row]:
    """The rows of a table of arrow: a text, or a conversation and its tools. There all objects of a column
    have the keys of all of them, null where one has not."""
    columns = [table.column(name).to_pylist() for name in names]
    for value, *tools in zip(*columns, strict=True):
        yield Row(_without_nulls(value), Place(), tools=_without_nulls(tools[0]) if tools else None)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _of_line(line: bytes, number: int, path: Path, after: Place, column: str | None, chat: bool) -> Row:
    where = f"{path} line {number}"
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Row(None, after, f"{where}: not valid UTF-8 (at its byte {error.start + 1}); convert the file")
    except ValueError as error:
        return Row(None, after, f"{where}: not JSON: {error}")
    except RecursionError:
        return Row(None, after, f"{where}: not JSON that anybody wrote: nested too deep")
    if not isinstance(value, dict):
        return Row(None, after, f'{where}: not an object like {{"text": "..."}}')
    names = CHAT_COLUMNS if column is None else (column,)
    for name in names:
        if name in value:
            return Row(value[name], after, tools=value.get(TOOLS) if chat else None)
    return Row(None, after, _missing(names, list(value), where))


def _columns(column: str | None, names: list[str], where: str, chat: bool) -> list[str]:
    """The column of a table to read, and that of the tools if it has one.

    Raises:
      UserError: there is none.
    """
    wanted = CHAT_COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return [name, TOOLS] if chat and TOOLS in names and name != TOOLS else [name]
    raise UserError(_missing(wanted, names, where))


def _missing(wanted: tuple[str, ...], names: list[str], where: str) -> str:
    shown = ", ".join(repr(name)[:60] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    hint = suggestion(wanted[0], names)
    asked = " or ".join(map(repr, wanted))
    return f"{where}: no column {asked}{hint}; its columns are {shown or 'none'}; set column"
