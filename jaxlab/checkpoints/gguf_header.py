"""The GGUF format, read without trust: metadata and tensors that are dequantised when they are read.

Format (ggml-org/ggml, docs/gguf.md): magic, version, numbers of tensors and of keys; the keys, each a string,
a type and a value; the tensors, each a name, a shape with the fastest axis first, a type and an offset; then,
aligned, the bytes of the tensors. The package `gguf` knows the types and dequantises; its own reader follows
whatever sizes a file tells, so the header is read here.
"""

import dataclasses
import functools
import math
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from jaxlab.checkpoints.safetensors_file import MAX_BYTES, Tensor, check_rows, read_into, refuse_pointer
from jaxlab.errors import UserError

MAGIC = b"GGUF"
MAX_HEADER = 200_000_000
"""Bytes; the largest vocabularies take some 15 million."""
MAX_KEYS, MAX_AXES, MAX_ALIGNMENT, MAX_SHARDS = 1 << 16, 4, 1 << 16, 1000
_CHUNK_BYTES = 1 << 26
"""Of float32, dequantised at a time."""

_SCALARS: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("<u1"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
_PLAIN: dict[GGMLQuantizationType, np.dtype] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.I8: np.dtype(np.int8),
    GGMLQuantizationType.I16: np.dtype(np.int16),
    GGMLQuantizationType.I32: np.dtype(np.int32),
    GGMLQuantizationType.I64: np.dtype(np.int64),
}
"""Types that are no quantisation: read as they are."""


@dataclasses.dataclass(frozen=True)
class QuantizedTensor(Tensor):
    """A tensor of a GGUF file; float32 if its type is a quantisation."""

    kind: GGMLQuantizationType
    """As it is stored."""

    @property
    def stored_bytes(self) -> int:
        return bytes_of(self.kind, self.shape)

    @property
    def stored_as(self) -> str:
        return self.kind.name

    @property
    def quantized(self) -> bool:
        return self.kind not in _PLAIN


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """What a file says before its tensors."""

    metadata: dict[str, Any]
    """By key: a number, a string, a list of strings, or an array of numbers."""
    tensors: dict[str, QuantizedTensor]
    """Under llama.cpp's names, axes in numpy's order, none of them read."""
    files: tuple[Path, ...]
    """The file, or all shards of it."""


def read_gguf(path: Path) -> GGUFHeader:
    """The header of a file; of a split one, named by its first shard, that of all of them.

    Raises:
      UserError: it is no GGUF file of a version that is read, not what its header says, or lacks a shard.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_SHARDS:
        raise UserError(f"{path}: split.count is {str(count)[:40]}, not a number of files")
    if count < 2:
        return first
    files = _shards(path, count, first.metadata.get("split.no"))
    tensors = dict(first.tensors)
    for number, file in enumerate(files[1:], 1):
        shard = _read_one(file)
        told = (shard.metadata.get("split.no"), shard.metadata.get("split.count"))
        if told != (number, count):
            raise UserError(f"{file}: says it is shard {told[0]} of {told[1]}, not {number} of {count}")
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise UserError(f"{file}: the tensor {name[:80]!r} is in another shard too")
            tensors[name] = tensor
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(f"{path}: its {count} shards hold {len(tensors)} tensors, the first says {total}")
    return GGUFHeader(first.metadata, tensors, files)


def _shards(path: Path, count: int, number: Any) -> tuple[Path, ...]:
    """The files of a split one, by the name of the first."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count:
        raise UserError(f"{path}: one of {count} shards, but not named -00001-of-{count:05d}.gguf")
    files = tuple(path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1))
    if number != 0 or path != files[0]:
        raise UserError(f"{path}: not the first of {count} shards; name {files[0].name}")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(f"{path}: shards are missing: {', '.join(absent[:3])}{more}")
    return files


def _read_one(path: Path) -> GGUFHeader:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _Reader(path, file, size).header()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Reader:
    """Reads a header from its beginning; a number in it is compared with what is left before it is used."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file = path, file
        self.size, self.limit, self.at = size, min(size, MAX_HEADER), 0

    def header(self) -> GGUFHeader:
        magic = self.take(4) if self.size >= 24 else b""
        if magic != MAGIC:
            refuse_pointer(magic, self.path)
            raise self.wrong("not a GGUF file" if self.size >= 24 else "cut off, or not a GGUF file")
        version = self.whole("<I")
        if version & 0xFFFF == 0:
            raise self.wrong("a big-endian GGUF file; convert it to little-endian")
        if version not in (2, 3):
            raise self.wrong(f"version {version} of GGUF; only 2 and 3 are read")
        tensors, keys = self.whole("<Q"), self.whole("<Q")
        if keys > MAX_KEYS or tensors * 24 > self.limit:  # of a tensor: two lengths, a type, an offset
            raise self.wrong(f"cut off, or not GGUF: {tensors} tensors and {keys} keys in {self.size} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text("a key")
            if key in metadata:
                raise self.wrong(f"the key {key[:80]!r} is given twice")
            metadata[key] = self.value(key)
        found: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.text("the name of a tensor")
            if name in found:
                raise self.wrong(f"the tensor {name[:80]!r} is there twice")
            found[name] = self.tensor(name)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {str(alignment)[:40]}, not a small power of two")
        start = _aligned(self.at, alignment)
        self.check_places(found, start, alignment)
        placed = {
            name: _tensor(self.path, name, kind, shape, start + offset)
            for name, (kind, shape, offset) in found.items()
        }
        return GGUFHeader(metadata, placed, (self.path,))

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.limit - self.at:
            what = "cut off inside its header" if self.limit == self.size else "its header is too large"
            raise self.wrong(f"{what}: {count} bytes are told at {self.at} of {self.limit}")
        raw = self.file.read(count)
        if len(raw) < count:
            raise self.wrong("cut off while it was read")
        self.at += count
        return raw

    def whole(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, what: str) -> str:
        raw = self.take(self.whole("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is no UTF-8") from None

    def texts(self, what: str, count: int) -> list[str]:
        """Many of them, read without a call for each."""
        if 8 * count > self.limit - self.at:
            raise self.wrong(f"cut off inside its header: {what} has {count} strings")
        read, at, found = self.file.read, self.at, []
        for _ in range(count):
            size = int.from_bytes(read(8), "little")
            at += 8 + size
            if at > self.limit:
                raise self.wrong(f"cut off inside its header: a string of {what} has {size} bytes")
            found.append(read(size))
        self.at = at
        try:
            return [raw.decode("utf-8") for raw in found]
        except UnicodeDecodeError:
            raise self.wrong(f"{what} holds a string that is no UTF-8") from None

    def kind(self, key: str) -> GGUFValueType:
        number = self.whole("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.wrong(f"{key[:80]!r} has a value of type {number}, which GGUF has not") from None

    def value(self, key: str) -> Any:
        kind = self.kind(key)
        if kind == GGUFValueType.STRING:
            return self.text(repr(key[:80]))
        if kind != GGUFValueType.ARRAY:
            return self.numbers(kind, 1)[0].item()
        inner, count = self.kind(key), self.whole("<Q")
        if inner == GGUFValueType.ARRAY:
            raise self.wrong(f"{key[:80]!r} is an array of arrays, which is not read")
        if inner == GGUFValueType.STRING:
            return self.texts(repr(key[:80]), count)
        return self.numbers(inner, count)

    def numbers(self, kind: GGUFValueType, count: int) -> np.ndarray:
        dtype = _SCALARS[kind]
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return values != 0 if kind == GGUFValueType.BOOL else values

    def tensor(self, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
        """Type, shape in numpy's order, and offset, checked against each other."""
        where = f"tensor {name[:80]!r}"
        axes = self.whole("<I")
        if not 0 < axes <= MAX_AXES:
            raise self.wrong(f"{where} has {axes} axes; GGUF has 1 to {MAX_AXES}")
        shape = struct.unpack(f"<{axes}Q", self.take(8 * axes))[::-1]
        number, offset = self.whole("<I"), self.whole("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self.wrong(f"{where} is of type {number}, which is not known") from None
        block, _ = GGML_QUANT_SIZES[kind]
        if 0 in shape or math.prod(shape) * 8 > MAX_BYTES:
            raise self.wrong(f"{where}: its shape {list(shape)} is empty or too large")
        if shape[-1] % block:
            raise self.wrong(f"{where}: rows of {shape[-1]} are not whole blocks of {kind.name}, {block}")
        return kind, shape, offset

    def check_places(
        self, found: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]], start: int, alignment: int
    ) -> None:
        """Whether the tensors follow each other and lie inside the file.

        Raises:
          UserError: they do not.
        """
        end = 0
        for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            if offset != end:
                fault = "overlap the tensor before" if offset < end else "leave a gap before them"
                raise self.wrong(f"tensor {name[:80]!r}: its bytes {fault}")
            stop = offset + bytes_of(kind, shape)
            if start + stop > self.size:
                raise self.wrong(
                    f"cut off: the tensor {name[:80]!r} ends at {start + stop}, the file at {self.size}"
                )
            end = _aligned(stop, alignment)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def bytes_of(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """What a tensor takes in a file."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


@functools.cache
def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether the package knows how."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def check_kinds(tensors: Iterable[QuantizedTensor], where: object) -> None:
    """Whether all tensors can be read.

    Raises:
      UserError: the types that cannot, each with how many tensors have it.
    """
    counts: dict[str, int] = {}
    for tensor in tensors:
        if tensor.quantized and not can_dequantize(tensor.kind):
            counts[tensor.kind.name] = counts.get(tensor.kind.name, 0) + 1
    if counts:
        told = ", ".join(f"{name} ({count} tensors)" for name, count in counts.items())
        raise UserError(f"{where}: holds types that cannot be dequantised: {told}; take another quantisation")


def _tensor(
    path: Path, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int
) -> QuantizedTensor:
    dtype = _PLAIN.get(kind, np.dtype(np.float32))
    return QuantizedTensor(name, dtype, shape, _rows_reader(path, kind, shape, offset), kind)


def _rows_reader(
    path: Path, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int
) -> Callable[[int, int], np.ndarray]:
    """Rows of the first axis. A vector is one row of blocks: it is read whole."""
    block, size = GGML_QUANT_SIZES[kind]
    dtype = _PLAIN.get(kind, np.dtype(np.float32))
    row = math.prod(shape[1:]) // block * size if len(shape) > 1 else bytes_of(kind, shape)

    def values(first: int, count: int) -> np.ndarray:
        """The values of `count` rows, as they come."""
        raw = np.empty((count, row), np.uint8)
        read_into(path, raw, offset + first * row)
        return raw.view(dtype) if kind in _PLAIN else dequantize(raw, kind)

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        if len(shape) == 1:
            return values(0, 1).reshape(shape)[start:stop].copy()
        out = np.empty((stop - start, *shape[1:]), dtype)
        step = max(1, _CHUNK_BYTES // max(1, 4 * math.prod(shape[1:])))
        for first in range(start, stop, step):
            count = min(step, stop - first)
            out[first - start : first - start + count] = values(first, count).reshape(count, *shape[1:])
        return out

    return read_rows
