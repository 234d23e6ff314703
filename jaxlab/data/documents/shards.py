"""A file of tokenised documents, in safetensors: it is whole or not there, and is mapped, not read.

Tensors: tokens [N] of the smallest unsigned type that holds the vocabulary, ends int64[documents] (of each in
tokens), keys uint64[documents] (of each one's content), and for conversations targets bool[N]. The metadata
says in JSON how far into the source the file goes (`after`, `done`), and what was counted on the way.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.checkpoints import read_header, read_metadata
from jaxlab.errors import UserError
from jaxlab.files import writing

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int32": "I32",
    "int64": "I64",
}


@dataclass(frozen=True)
class Shard:
    """Documents, mapped from a file."""

    path: Path
    tokens: np.ndarray
    """uint[N]"""
    ends: np.ndarray
    """int64[documents]"""
    keys: np.ndarray
    """uint64[documents]"""
    targets: np.ndarray | None
    """bool[N]"""
    facts: dict[str, Any]
    """The metadata."""


def write_arrays(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Writes arrays with what is to be said of them; whatever happens, the file is whole or not there.

    Raises:
      UserError: it cannot be written.
    """
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"jaxlab": json.dumps(facts)}}
    offset = 0
    for name, array in ordered:
        end = offset + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with writing(path):
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for _, array in ordered:
                    file.write(np.ascontiguousarray(array).data)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(aside, 0o666 & ~umask)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise


def read_facts(path: Path) -> dict[str, Any]:
    """What a file of `write_arrays` says of itself; no array is read.

    Raises:
      UserError: it is damaged.
    """
    read_header(path)  # which compares it with the file's size
    try:
        facts: dict[str, Any] = json.loads(read_metadata(path)["jaxlab"])
        return facts
    except (KeyError, ValueError) as error:
        raise damaged(path, "without metadata") from error


def open_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, as one mapping of it.

    Raises:
      UserError: it is damaged.
    """
    header = read_header(path)
    try:
        mapped = np.asarray(np.memmap(path, np.uint8, "r"))  # whose slices cost less
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return {name: mapped[t.offset : t.offset + t.nbytes].view(t.dtype) for name, t in header.items()}


def open_shard(path: Path) -> Shard:
    """A shard, mapped.

    Raises:
      UserError: it is damaged.
    """
    arrays, facts = open_arrays(path), read_facts(path)
    if not {"tokens", "ends", "keys"} <= set(arrays):
        raise damaged(path, f"holds {', '.join(arrays)}")
    found = Shard(path, arrays["tokens"], arrays["ends"], arrays["keys"], arrays.get("targets"), facts)
    lengths = np.diff(found.ends, prepend=0)
    if len(found.keys) != len(found.ends) or (lengths < 0).any() or lengths.sum() != len(found.tokens):
        raise damaged(path, "documents that do not make up its tokens")
    return found


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged ({what}); remove {path.parent}: it is made anew")
