"""Files appear whole or not at all: written aside, flushed to disk, then renamed. Shipped ones are found
from any folder."""

import errno
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError

LONGEST_CONFIG = 16 << 20
"""Bytes of a file that people write at most: configs and recipes."""
_BESIDE = 16
"""Bytes of a name that what is written aside, beside its place, adds to it."""
_PACKAGE = Path(__file__).parent
_SHIPPED = {
    "configs": (_PACKAGE / "configs", _PACKAGE.parent / "configs"),
    "jaxlab/assets": (_PACKAGE / "assets",),
}
"""Folders of a checkout, and where else they may be: a wheel holds the configs inside the package."""


def named(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ and ~user for a home at its beginning, as shells have it: they leave it alone inside YAML
    and behind an =."""
    return Path(os.path.expanduser(path))


def output_path(path: str | os.PathLike[str]) -> Path:
    """`named(path)`, if something may have that name. Nothing is made.

    Raises:
      UserError: nothing can: too long, a null byte, or what leads there is no folder or closed.
    """
    path = named(path)
    shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
    if "\0" in str(path):
        raise UserError(f"{shown!r}: no name for a file or folder: it holds a null byte; choose another one")
    try:
        if os.path.lexists(path):
            return path
        os.lstat(path)
    except FileNotFoundError:
        there = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        most = os.pathconf(there, "PC_NAME_MAX") - _BESIDE if there.exists() else 0
        long = [part for part in path.parts if len(os.fsencode(part)) > most > 0]
        if long:
            raise UserError(
                f"{shown}: a name of {len(os.fsencode(long[0]))} bytes; {most} are possible here"
            ) from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be written: {error.strerror}; choose another place") from None
    return path


def shipped(path: str | os.PathLike[str]) -> Path:
    """`path`, or where nothing is there what is shipped under that name; the first time, stderr says so.

    Configs name each other, and the shipped model, by their paths in a checkout: `configs/...` and
    `jaxlab/assets/...`. So they work from any folder, and a file of the user's own goes first.
    """
    path = named(path)
    if path.is_absolute() or ".." in path.parts or os.path.exists(path):
        return path
    for name, folders in _SHIPPED.items():
        if path.is_relative_to(name):
            for folder in folders:
                found = folder / path.relative_to(name)
                if found.exists():
                    _say_shipped(name, folder)
                    return found
    return path


@functools.cache
def _say_shipped(name: str, folder: Path) -> None:
    print(f"{name}/ is not in this folder: what is shipped is taken, from {folder}", file=sys.stderr)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says where a disk, a share of one or a file may not grow."""


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in one line what keeps the block from writing `path`.

    Raises:
      UserError: no room, no permission, or something else is in the place.
    """
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        remedy = "; make room there" if error.errno in NO_ROOM else ""
        raise UserError(f"{os.fspath(path)}: cannot be written: {what}{remedy}") from error


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes `data` to `path`; whatever happens, there is the old file or the new one, never a part.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    with writing(path):
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(aside, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise


def remove_torn(path: str | os.PathLike[str]) -> None:
    """Removes what writers of `path` that were killed have left beside it; nobody else may be writing it."""
    path = Path(path)
    for aside in path.parent.glob(f".{path.name}.*"):
        if len(aside.name) == len(path.name) + 10 and aside.is_file() and not aside.is_symlink():
            with writing(aside):
                aside.unlink()


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file of any kind, a pipe too.

    Raises:
      UserError: it holds more than `most` bytes.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise UserError(f"{os.fspath(path)}: longer than {most >> 20} MiB; is it the right file?")
    return raw


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON, atomically. Numbers that are not finite become null, arrays become lists."""
    write_atomic(path, json.dumps(jsonable(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types.

    Raises:
      TypeError: what has no such form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")
