"""Bytes on their way through a merge: elements of the inputs' tensors in, those of the output out, hashed."""

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlab.checkpoints import Tensor
from jaxlab.errors import UserError
from jaxlab.merging.plan import Input, Source, dtype_of

COPY = 1 << 22
"""Bytes."""
_PAGE, _EVERY = 1 << 12, 1 << 18
"""Of every 256 kB of an input, 4 kB are in its sampled digest."""
Hashed = Literal["none", "sampled", "full"]
"""Which bytes of the inputs are hashed: none, 4 kB of every 256 kB of each tensor, all that are read."""


class Files:
    """Files that are opened once and read by all threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fills the buffer.

        Raises:
          UserError: the file is shorter, or cannot be read.
        """
        try:
            with self._lock:
                if path not in self._open:
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                descriptor = self._open[path]
            while len(buffer):
                count = os.preadv(descriptor, [buffer], offset)
                if count == 0:
                    raise UserError(f"{path}: cut off while it was read")
                buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class Reader:
    """Reads the elements of tensors in parts and hashes what it reads; any number of threads may use it."""

    def __init__(
        self, inputs: Sequence[Mapping[str, Tensor] | Input], files: Files, hash_inputs: Hashed
    ) -> None:
        self.inputs, self.files, self.hash_inputs = inputs, files, hash_inputs
        self._free = threading.local()

    def tensor(self, source: Source) -> Tensor:
        return self.inputs[source.model][source.name]

    def place(self, source: Source) -> Any:
        """Equal for tensors that are the same bytes."""
        tensor = self.tensor(source)
        if tensor.file is None:
            return id(tensor)
        return tensor.file, tensor.offset, tensor.dtype, tensor.shape

    def parts(
        self,
        source: Source,
        start: int,
        stop: int | None,
        length: int,
        hashes: dict[str, Any] | None,
        read_as: str | None = None,
    ) -> Iterator[np.ndarray]:
        """The elements start..stop of a source, flat, in parts of `length`, the last of them shorter. Of
        several parts each is valid until the next one is asked for.

        Args:
          hashes: digests by input and name, which the bytes are added to; None: they are not hashed.
        """
        tensor = self.tensor(source)
        stop = tensor.size if stop is None else stop
        parts = self._of_file if tensor.file is not None else _of_rows
        digest = None
        if self.hash_inputs != "none" and hashes is not None:
            digest = hashes.setdefault(f"{source.model}:{source.name}", hashlib.sha256())
        at = start * tensor.dtype.itemsize
        for part in parts(tensor, start, stop, length):
            if digest is not None:
                raw = part.view(np.uint8)
                for first, last in _hashed(at, at + raw.nbytes, self.hash_inputs):
                    digest.update(raw[first - at : last - at])
                at += raw.nbytes
            yield part if read_as is None else part.astype(dtype_of(read_as), copy=False)

    def _of_file(self, tensor: Tensor, start: int, stop: int, length: int) -> Iterator[np.ndarray]:
        assert tensor.file is not None
        size, several = tensor.dtype.itemsize, stop - start > length
        nbytes = min(length, max(0, stop - start)) * size
        raw = self._take(nbytes) if several else aligned(nbytes)
        try:
            buffer = raw[:nbytes].view(tensor.dtype)
            for at in range(start, stop, length):
                part = buffer[: stop - at]
                self.files.read(tensor.file, memoryview(part.view(np.uint8)), tensor.offset + at * size)
                yield part
        finally:
            if several:
                self._buffers().append(raw)

    def _buffers(self) -> list[np.ndarray]:
        """Those that this thread has used before: new pages take as long to get as to fill."""
        return vars(self._free).setdefault("buffers", [])

    def _take(self, nbytes: int) -> np.ndarray:
        raw = self._buffers().pop() if self._buffers() else None
        return aligned(nbytes) if raw is None or len(raw) < nbytes else raw

    def read(
        self, source: Source, size: int, hashes: dict[str, Any] | None, read_as: str | None
    ) -> np.ndarray:
        """The first `size` elements, flat."""
        parts = list(self.parts(source, 0, size, max(1, size), hashes, read_as))
        return parts[0] if parts else np.empty(0, self.tensor(source).dtype)

    def sample(self, source: Source, size: int, runs: int, length: int, read_as: str | None) -> np.ndarray:
        """`runs` runs of `length` elements, evenly spaced over the first `size`, one after the other."""
        starts = [i * (size - length) // max(1, runs - 1) for i in range(runs)]
        return np.concatenate(
            [next(self.parts(source, start, start + length, length, None, read_as)) for start in starts]
        )


class Out:
    """Bytes on their way out, hashed and searched for NaN and infinities."""

    def __init__(self, write: Callable[[np.ndarray, int], None]) -> None:
        self.digest = hashlib.sha256()
        self.not_finite = 0
        self._write, self._at = write, 0

    def add(self, values: np.ndarray) -> None:
        """Flat values, in their order."""
        self.not_finite += count_not_finite(values)
        raw = values.view(np.uint8)
        self.digest.update(raw)
        self._write(raw, self._at)
        self._at += raw.nbytes


class AmongKeptRows:
    """Merged rows on their way out, with those that are kept put between them."""

    def __init__(
        self,
        out: Out,
        runs: Sequence[tuple[int, int]],
        width: int,
        kept: Callable[[int, int], Iterator[np.ndarray]],
    ) -> None:
        """
        Args:
          runs: of merged rows: the first of them in the output, and how many.
          width: elements of a row.
          kept: gives elements of the tensor from which the others come, flat, in parts.
        """
        self._out, self._runs, self._width, self._kept = out, iter(runs), width, kept
        self._row = self._left = 0

    def add(self, values: np.ndarray) -> None:
        """Merged values, flat, in the order of the runs."""
        while len(values):
            if not self._left:
                start, count = next(self._runs)
                self.keep_to(start)
                self._row, self._left = start + count, count * self._width
            count = min(len(values), self._left)
            self._out.add(values[:count])
            values, self._left = values[count:], self._left - count

    def keep_to(self, row: int) -> None:
        """The kept rows from the last one on, up to this one."""
        for part in self._kept(self._row * self._width, row * self._width):
            self._out.add(part)
        self._row = row


def _hashed(start: int, stop: int, what: Hashed) -> Iterator[tuple[int, int]]:
    """The bytes of a tensor between two that are hashed, as ranges."""
    if what == "full":
        yield start, stop
        return
    for page in range(start // _EVERY * _EVERY, stop, _EVERY):
        if page + _PAGE > start:
            yield max(page, start), min(page + _PAGE, stop)


_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def count_not_finite(values: np.ndarray) -> int:
    """How many NaN and infinities there are; integers have none."""
    exponent = _EXPONENTS.get(values.dtype.name)
    if exponent is not None:
        if values.size == 0:
            return 0
        unsigned, signed = ("u2", "i2") if values.dtype.itemsize == 2 else ("u4", "i4")
        bits, sign = values.view(unsigned), 1 << (8 * values.dtype.itemsize - 1)
        # Largest positive and largest negative bits: no array in between, much faster than counting.
        if values.view(signed).max() < exponent and bits.max() < exponent | sign:
            return 0
        return int(np.count_nonzero((bits & (sign - 1)) >= exponent))
    if values.dtype.kind != "f" and not values.dtype.name.startswith("float8"):
        return 0
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def aligned(nbytes: int) -> np.ndarray:
    """Bytes that a compiled program takes without copying them: 64 of them are a unit of memory to XLA."""
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def keep_freed_pages() -> None:
    """Has the C library keep up to 128 MB of what was freed. By default glibc hands the pages of every chunk
    back to the system and gets them anew for the next one, which takes a third of a merge's CPU time.
    Elsewhere nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 1 << 27)
        mallopt(_MMAP_THRESHOLD, 1 << 25)  # the largest that it takes


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values if values.dtype == dtype else values.astype(dtype)


def padded(part: np.ndarray, length: int) -> np.ndarray:
    """With zeros at its end, so that one program serves all parts."""
    if len(part) == length:
        return part
    longer = aligned(length * part.dtype.itemsize).view(part.dtype)
    longer[: len(part)] = part
    longer[len(part) :] = 0
    return longer


def _of_rows(tensor: Tensor, start: int, stop: int, length: int) -> Iterator[np.ndarray]:
    """The same of a tensor that is computed as it is read, by rows."""
    if not tensor.shape or tensor.size == 0:
        if start < stop:
            yield np.ascontiguousarray(tensor.read()).reshape(-1)
        return
    row = tensor.size // tensor.shape[0]
    step = max(1, length // row)
    held = np.empty(0, tensor.dtype)
    at = start // row
    skip = start - at * row
    last = -(-stop // row)
    left = stop - start
    while left:
        while len(held) < min(length, left):
            rows = tensor.read_rows(at, min(at + step, last)).reshape(-1)[skip:]
            skip, at = 0, min(at + step, last)
            held = np.concatenate([held, rows]) if len(held) else np.ascontiguousarray(rows)
        count = min(length, left)
        yield held[:count]
        held, left = held[count:], left - count
