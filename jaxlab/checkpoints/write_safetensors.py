"""Writing a Hugging Face folder: sizes known before the first byte, the folder whole or absent."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.checkpoints.output_folder import write_aside
from jaxlab.checkpoints.safetensors_file import NAMES
from jaxlab.checkpoints.source_files import copy_companions
from jaxlab.checkpoints.tensor_folder import CONFIG, INDEX, SINGLE
from jaxlab.errors import UserError

SHARD_BYTES = 5_000_000_000

class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]
    """Its values, in this dtype and shape; asked for once, shard by shard, in each the widest dtype first.

    It is let go when they are written, and with it what it keeps for the tensors after it.
    """

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    path: str | os.PathLike[str],
    tensors: Iterable[Planned],
    *,
    config: Mapping[str, Any],
    copy_from: Path | None = None,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write a folder aside, then rename it.

    Args:
      config: what config.json holds.
      copy_from: a folder whose tokenizer and processor files (COMPANIONS) are copied.
      texts: files besides, by name, where none was copied.
      shard_bytes: most bytes of tensors in one file.
      inputs: what the tensors were made from, which is never replaced (see `write_aside`).
      progress: called with the bytes of each tensor that is written.

    Raises:
      UserError: `path` may not be written, the disk is full, or two tensors have one name.
    """
    shards = _shards(list(tensors), shard_bytes)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    try:
        with write_aside(path, inputs, overwrite=overwrite) as folder:
            names = [SINGLE]
            if len(shards) > 1:
                count = len(shards)
                names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
                _write_text(folder / INDEX, _index(shards, names))
            # All files take their space before any is filled: a full disk shows at once.
            starts = [_begin(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
            for name, shard, start in zip(names, shards, starts, strict=True):
                _fill(folder / name, shard, start, progress)
            _write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            if copy_from is not None:
                copy_companions(copy_from, folder)
            for name, content in (texts or {}).items():
                if not (folder / name).exists():
                    _write_text(folder / name, content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{path}: no room for {total} bytes of tensors; nothing was written") from error
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _shards(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """The tensors in their order, cut so that no shard exceeds `shard_bytes` unless one tensor does.

    In a shard wider dtypes come first, as the format's own library has them: then all begin at a multiple of
    their size and can be mapped.
    """
    seen: set[str] = set()
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise UserError(f"two tensors are named {tensor.name}")
        seen.add(tensor.name)
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _index(shards: Sequence[Sequence[Planned]], names: Sequence[str]) -> str:
    places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    metadata = {
        "total_parameters": sum(math.prod(t.shape) for shard in shards for t in shard),
        "total_size": sum(t.nbytes for shard in shards for t in shard),
    }
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def _begin(path: Path, shard: Sequence[Planned]) -> int:
    """Write a shard's header and take the space of its tensors; returns where they begin."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        span = [end, end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        end = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    start = 8 + len(text)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, start + end)
        file.write(len(text).to_bytes(8, "little") + text)
    return start


def _fill(path: Path, shard: list[Planned], start: int, progress: Callable[[int], Any]) -> None:
    """Write the tensors of a shard behind its header; leaves the list empty."""
    shard.reverse()
    with open(path, "r+b") as file:
        file.seek(start)
        while shard:
            tensor = shard.pop()
            values = tensor.get()
            if values.dtype != tensor.dtype or values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} is {values.dtype} {values.shape}, not as planned")
            if values.nbytes:
                file.write(memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8)))
            progress(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
