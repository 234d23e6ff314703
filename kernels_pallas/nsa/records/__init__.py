"""Which Hopper kernels were seen to be right on a GPU: records that the check writes, and what they allow.

A record is a JSON file of one kind of device: for each operator, dtype, group size and head dims whether the
check (`kernels_pallas.nsa.checking`) found the kernels right, with the versions and a hash of the kernels'
code. It says nothing about other versions or other code. The first of these that is there counts:

1. the file that the environment variable JAXLAB_KERNEL_RECORD names;
2. the one in the user's cache, $XDG_CACHE_HOME/jaxlab/kernels or ~/.cache/jaxlab/kernels, where the check
   writes it. Several processes do not read it, as their programs must be one and such folders may differ
   between hosts: there, name the file;
3. the one beside this module, which the package ships.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kernels_pallas.nsa.base import ceil_div
from kernels_pallas.nsa.interface import Case
from kernels_pallas.target import current_target

SHIPPED = Path(__file__).parent
VARIABLE = "JAXLAB_KERNEL_RECORD"
HOW = "python -m kernels_pallas.nsa.checking"
"""What makes a record."""
FORMAT = 1
_FEATURES = 64
"""Of hopper.py, which imports Pallas."""
_PACKAGE = Path(__file__).parents[2]
_HASHED = (
    "hopper.py",
    "nsa/mosaic_gpu",
    "nsa/api.py",
    "nsa/base.py",
    "nsa/decode_cache.py",
    "nsa/decoding.py",
    "nsa/importance.py",
    "nsa/support.py",
    "nsa/xla/query_block_pairs.py",
    "nsa/xla/tiling.py",
)
"""What calls of the kernels run: they themselves, what they import, and what gives them their operands."""

_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """What a check says something about."""

    operator: str
    dtype: str
    group: int
    """Query heads that share a key/value head."""
    key_dim: int
    """Padded, as the kernels see it; so are those of values."""
    value_dim: int
    """0 where the operator takes no values."""

    def __str__(self) -> str:
        dims = f"head dims {self.key_dim}/{self.value_dim}" if self.value_dim else f"head dim {self.key_dim}"
        heads = "1 query head" if self.group == 1 else f"{self.group} query heads"
        return f"{self.operator} in {self.dtype} with {heads} a group, {dims}"


def padded(dim: int) -> int:
    """A head dim as the kernels see it."""
    return ceil_div(dim, _FEATURES) * _FEATURES


def key_of(case: Case) -> Key:
    """The key of a call."""
    dims = [0 if x is None else padded(x.shape[3]) for x in (case.q, case.v)]
    if case.operator == "select_blocks":
        dims[1] = 0
    return Key(case.operator, str(case.q.dtype), case.q.shape[2] // case.k.shape[2], *dims)


@dataclasses.dataclass(frozen=True)
class Record:
    """What was seen on one kind of device."""

    device_kind: str
    versions: dict[str, str]
    """Of jax, jaxlib and what else may matter; those of `versions()` must be the same."""
    kernels: str
    """`kernels_hash()` of what was checked."""
    right: dict[Key, bool]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Sizes, errors, time: for people."""

    def merged(self, older: "Record | None") -> "Record":
        """With what an older one of the same device, versions and kernels says of other keys."""
        if older is None or self._of() != older._of():
            return self
        return dataclasses.replace(self, right=older.right | self.right)

    def _of(self) -> tuple[Any, ...]:
        return self.device_kind, self.kernels, *(self.versions.get(name) for name in versions())

    def write(self, path: Path) -> None:
        """Whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{**key._asdict(), "right": right} for key, right in sorted(self.right.items())]
        about = {"format": FORMAT, "device_kind": self.device_kind, "versions": self.versions}
        content = {**about, "kernels": self.kernels, "entries": entries, "facts": self.facts}
        beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(path)


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        ValueError: it is not one; the file is named.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        names = Key._fields
        right = {Key(*(e[name] for name in names)): e["right"] is True for e in content["entries"]}
        kind, made_with, kernels = (content[name] for name in ("device_kind", "versions", "kernels"))
        return Record(kind, made_with, kernels, right, content.get("facts", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no record of kernels: {type(error).__name__}: {error}") from None


def versions() -> dict[str, str]:
    """Those without which a record says nothing."""
    return {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}


@functools.cache
def kernels_hash() -> str:
    """Of the code that calls of the kernels run, and of tile sizes."""
    digest = hashlib.sha256()
    files: list[Path] = []
    for path in (_PACKAGE / name for name in _HASHED):
        files += [p for p in path.rglob("*") if p.suffix in (".py", ".json")] if path.is_dir() else [path]
    for path in sorted(files):
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def file_name(device_kind: str) -> str:
    """Of the record of a kind of device."""
    return f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_')}.json"


def cache_folder() -> Path:
    """Where the check writes, unless it is told."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path("~/.cache").expanduser()) / "jaxlab" / "kernels"


def places(device_kind: str) -> Iterable[Path]:
    """Where a record of the device may be, the first one first."""
    if named := os.environ.get(VARIABLE):
        return [Path(named).expanduser()]
    own = [] if jax.process_count() > 1 else [cache_folder()]
    return [folder / file_name(device_kind) for folder in (*own, SHIPPED)]


@functools.lru_cache(maxsize=64)
def _read_as_it_is(path: Path, changed: int) -> Record:
    return read(path)


def _found(device_kind: str) -> tuple[Path, Record] | None:
    for path in places(device_kind):
        if path.exists():
            return path, _read_as_it_is(path, path.stat().st_mtime_ns)
    return None


def reason_against(case: Case) -> str | None:
    """Why a call on this device that names no implementation does not get the kernels; None if it does.

    Raises:
        ValueError: JAXLAB_KERNEL_RECORD names no record.
    """
    if current_target() != "device":
        return "where nothing runs on a GPU the kernels run if they are named"
    named = os.environ.get(VARIABLE)
    kind, key = jax.devices()[0].device_kind, key_of(case)
    if named and not Path(named).expanduser().exists():
        raise ValueError(f"{VARIABLE}={named}: there is no such file; unset it, or make it with `{HOW}`")
    try:
        found = _found(kind)
    except ValueError as error:
        if named:
            raise
        return f"{error}; remove it or make it anew"
    if found is None:
        return f"nobody has checked the kernels on this {kind} yet"
    path, record = found
    if record.device_kind != kind:
        return f"{path} is the record of a {record.device_kind}, and this is a {kind}"
    for name, here in versions().items():
        if (there := record.versions.get(name)) != here:
            return f"{path} was made with {name} {there}, and this is {here}"
    if record.kernels != kernels_hash():
        return f"{path} was made with other kernels than these"
    if key not in record.right:
        return f"{path} says nothing about {key}"
    return None if record.right[key] else f"by {path} the check failed for {key}"


_said: set[str] = set()


def reason_against_default(case: Case) -> str | None:
    """`reason_against`; on a device each reason is told once, at level WARNING."""
    reason = reason_against(case)
    if reason is not None and current_target() == "device" and reason not in _said:
        _said.add(reason)
        _log.warning(
            "nsa: XLA runs in place of the Hopper kernels: %s. `%s` checks them here in a few minutes; "
            "implementation='mosaic_gpu' runs them unchecked, 'xla' says no more of it.",
            reason,
            HOW,
        )
    return reason
