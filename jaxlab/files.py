"""Files appear whole or not at all: written aside, flushed to disk, then renamed."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes `data` to `path`; whatever happens, there is the old file or the new one, never a part."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON, atomically. Numbers that are not finite become null, arrays become lists."""
    write_atomic(path, json.dumps(jsonable(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types. Raises TypeError for what has no such form."""
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
