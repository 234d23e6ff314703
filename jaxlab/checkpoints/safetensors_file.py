"""The safetensors format, read without trust: a header that is checked against the file, tensors on demand.

Format: 8 bytes little-endian length of the header, the header (a JSON object from names to dtype, shape and
range of bytes), then the bytes of the tensors, without gaps or overlaps.
"""

import functools
import json
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxlab.errors import UserError

MAX_HEADER = 100_000_000
"""Bytes; what the format's own library allows."""
MAX_BYTES = 1 << 62
"""Of one tensor, and the largest number in a header."""

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_POINTER = b"version https://git-lfs"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read_rows: Callable[[int, int], np.ndarray]
    """Rows start..stop of the first axis (IndexError outside of it); of a scalar always the scalar."""
    file: Path | None = field(default=None, kw_only=True)
    """Where its bytes lie as they are, row-major and without a gap; None: they are computed."""
    offset: int = field(default=0, kw_only=True)
    """Of the first byte in the file."""

    def read(self) -> np.ndarray:
        """The whole tensor; a new array each time."""
        return self.read_rows(0, self.shape[0] if self.shape else 1)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def stored_as(self) -> str:
        """The type that it has in its file; not `dtype` where that is computed."""
        return self.dtype.name

    @property
    def stored_bytes(self) -> int:
        return self.nbytes


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file, by name; only its header is read.

    Raises:
      UserError: the file is not what its header says, or not safetensors at all.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            text, start = _header(file, size, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries, _ = _split(text, path)
    spans = {name: _span(name, entry, path) for name, entry in entries.items()}
    _check_covered({name: span[2:] for name, span in spans.items()}, size - start, path)
    return {
        name: Tensor(
            name,
            dtype,
            shape,
            functools.partial(_read_rows, path, dtype, shape, start + begin),
            file=path,
            offset=start + begin,
        )
        for name, (dtype, shape, begin, _) in spans.items()
    }


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the header of a file says beside its tensors.

    Raises:
      UserError: the file is not safetensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text, _ = _header(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _split(text, path)[1]


def refuse_pointer(start: bytes, path: Path) -> None:
    """Refuses what stands in place of a large file where git has not fetched it.

    Args:
      start: the first bytes of a file that is not what it should be; fewer than four tell nothing.

    Raises:
      UserError: they are those of such a pointer.
    """
    if len(start) >= 4 and _POINTER.startswith(start[: len(_POINTER)]):
        raise UserError(f"{path}: a pointer of Git LFS in place of the file; run git lfs pull there")


def _header(file: Any, size: int, path: Path) -> tuple[str, int]:
    """The header's text, and where the tensors begin."""
    first = file.read(8)
    if len(first) < 8:
        raise UserError(f"{path}: cut off, or not safetensors: {size} bytes hold no header")
    length = int.from_bytes(first, "little")
    if length > min(size - 8, MAX_HEADER):
        # Only here: the length of a good header may begin with the same bytes.
        if first[:2] == b"PK" or (first[0] == 0x80 and first[1] <= pickle.HIGHEST_PROTOCOL):
            raise UserError(f"{path}: a pickle under the name of safetensors; it is not opened")
        refuse_pointer(first, path)
        raise UserError(
            f"{path}: cut off, or not safetensors: its header should have {length} bytes, the file has {size}"
        )
    raw = file.read(length)
    if len(raw) < length:
        raise UserError(f"{path}: cut off inside its header")
    try:
        return raw.decode("utf-8"), 8 + length
    except UnicodeDecodeError:
        raise UserError(f"{path}: not safetensors: its header is no UTF-8") from None


def _split(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The header as an object from names to entries, and its metadata."""
    header = parse_json(text, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ of the header is not an object of strings")
    return header, metadata


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise UserError(f"{where}: the key {twice[:80]!r} is given twice")
    return found


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: it begins with `where`; anything else, a key given twice, text that UTF-8 cannot hold.
    """
    try:
        value = json.loads(text, object_pairs_hook=functools.partial(_unique, where))
        if "\\u" in text:  # half of a surrogate pair can be escaped, but never written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object")
    return value


def _span(name: str, entry: Any, path: Path) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and last byte + 1 of an entry, checked against each other."""
    where = f"{path}: tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: its entry does not hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}: unknown dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
    whole = lambda values: (
        isinstance(values, list) and all(type(v) is int and 0 <= v <= MAX_BYTES for v in values)
    )
    if not whole(shape) or len(shape) > 32:
        raise UserError(f"{where}: its shape is no list of whole numbers")
    if not whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where}: its data_offsets are no range of bytes")
    if math.prod(n or 1 for n in shape) * DTYPES[dtype].itemsize > MAX_BYTES:
        raise UserError(f"{where}: its shape is too large")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != offsets[1] - offsets[0]:
        raise UserError(
            f"{where}: {dtype} {shape} needs {needed} bytes, its data_offsets hold {offsets[1] - offsets[0]}"
        )
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _check_covered(spans: dict[str, tuple[int, int]], size: int, path: Path) -> None:
    """Whether the ranges cover all `size` bytes once.

    Raises:
      UserError: they do not.
    """
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            fault = "overlap the tensor before" if start < end else "leave a gap before them"
            raise UserError(f"{path}: tensor {name[:80]!r}: its bytes {fault}")
        end = stop
    if end != size:
        fault = "cut off" if end > size else "holds more than its header says"
        raise UserError(f"{path}: {fault}: {size} bytes of tensors, {end} by its header")


def _read_rows(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, start: int, stop: int
) -> np.ndarray:
    check_rows(shape, start, stop)
    array = np.empty((stop - start, *shape[1:]) if shape else (), dtype)
    if array.nbytes:
        row = math.prod(shape[1:]) * dtype.itemsize
        read_into(path, array, offset + (start * row if shape else 0))
    return array


def check_rows(shape: tuple[int, ...], start: int, stop: int) -> None:
    """Whether start..stop are rows of the shape: what lies beyond is another tensor.

    Raises:
      IndexError: they are not.
    """
    if shape and not 0 <= start <= stop <= shape[0]:
        raise IndexError(f"rows {start} to {stop} of a tensor {list(shape)}")


def read_into(path: Path, array: np.ndarray, offset: int) -> None:
    """Fill `array`, which is contiguous, with the bytes of a file from `offset` on."""
    buffer = memoryview(array.reshape(-1).view(np.uint8))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done : done + (1 << 30)]], offset + done)
                if count == 0:
                    raise UserError(f"{path}: cut off while it was read")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
