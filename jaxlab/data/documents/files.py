"""Which files a data set is, and what is in them: digests of whole files, kept by size and time of change."""

import glob
import hashlib
import json
import os
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from jaxlab.data.documents.config import DataSet
from jaxlab.data.tables import is_dataset, open_dataset
from jaxlab.errors import UserError
from jaxlab.files import named, write_json

Format = Literal["text", "jsonl", "parquet", "dataset"]
TEXT = (".txt", ".text", ".md", ".rst")
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
_OF_DATASETS = (".arrow", ".parquet", ".json", ".jsonl", ".csv", ".tsv", ".txt", *COMPRESSED)
_SETTLED = 2.0
"""Seconds after which a file that changes gets another time of change."""
_SHOWN = 1 << 30
"""Bytes to digest that are worth a bar."""
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_TABLES = {
    ".json": "is JSON, and rows are read of JSON Lines, one object a line (.jsonl, or format: jsonl)",
    ".csv": "is CSV, and rows are read of JSON Lines or Parquet",
    ".tsv": "is TSV, and rows are read of JSON Lines or Parquet",
}
"""By suffix, what is wrong with tables that would be taken for text."""
_ABOUT = {"readme", "license", "licence"}
"""Texts that tell of those beside them."""
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class DataFile:
    """A file of a data set; or all of a set that `datasets` saved."""

    path: Path
    format: Format
    size: int
    changed: int
    """Time of its last change (ns)."""
    split: str = ""
    """Of a set that `datasets` reads."""
    subset: str = ""


def find_files(data: DataSet) -> tuple[list[DataFile], list[str]]:
    """The files of a data set, in order of their names; and what of its folder is passed by, for notes.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    notes: list[str] = []
    if data.format == "dataset" and not named(data.path).exists():
        return [DataFile(Path(data.path), "dataset", 0, 0, data.split, data.subset)], notes  # a hub id
    if data.path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts)]
        return [_data_file(path, "text") for path in sorted(paths)], notes
    root = named(data.path)
    try:
        if root.is_dir():
            if data.format == "dataset" or (data.format == "auto" and is_dataset(root)):
                return [_dataset_folder(root, data)], notes
            paths = [p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root))]
            kinds = {p: _format_of(p, data, None) for p in paths}
            if {"jsonl", "parquet"} & set(kinds.values()) and data.format == "auto":
                # A text beside tables tells of them.
                kinds = {p: None if kind == "text" else kind for p, kind in kinds.items()}
            notes += _of_other_forms(root, [p for p, kind in kinds.items() if kind is None])
            kinds = _of_split(root, kinds, data, notes)
        elif root.exists():
            kinds = {root: _format_of(root, data, "text")}
        else:
            paths = [Path(p) for p in glob.glob(str(root), recursive=True) if os.path.isfile(p)]
            kinds = {p: _format_of(p, data, "text") for p in paths}
            if not paths:
                hint = "" if glob.has_magic(data.path) else _hub_hint(data.path)
                raise UserError(f"{root}: no such file or folder{hint}; set data.sources path")
        if data.format == "auto" and not root.is_dir() and all(_suffix(p) in _TABLES for p in kinds):
            one = min(kinds)
            raise UserError(f"{one}: {_TABLES[_suffix(one)]}; set format: text to read it as it stands")
        found = [_data_file(path, kind) for path, kind in sorted(kinds.items()) if kind is not None]
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read: {error.strerror}") from error
    if not found:
        names = ", ".join(sorted({p.suffix or p.name for p in kinds})[:5]) or "nothing"
        raise UserError(
            f"{root}: none of its files is text, JSON Lines or Parquet by its name (it holds {names}); set "
            "format: text, or path to a pattern like folder/**/*.py"
        )
    if not any(file.size for file in found):
        what = f"all {len(found)} files are empty" if len(found) > 1 else "the file is empty"
        raise UserError(f"{root}: {what}")
    for file in found:
        if data.content == "chat" and file.format == "text":
            raise UserError(f"{file.path}: conversations are rows of JSON Lines or Parquet, not text")
    return found, notes


def _of_other_forms(root: Path, passed_by: Sequence[Path]) -> list[str]:
    """A note on tables that are not read: they may be what is meant, and a text beside them is not."""
    tables = sorted(path for path in passed_by if _suffix(path) in _TABLES)
    if not tables:
        return []
    more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
    return [f"{tables[0]}{more}: passed by: {_TABLES[_suffix(tables[0])]}"]


def _hub_hint(path: str) -> str:
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None
    return " (a data set of the hub: set format: dataset)" if is_id else ""


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format_of(path: Path, data: DataSet, otherwise: Format | None) -> Format | None:
    if data.format != "auto":
        return data.format
    suffix = _suffix(path)
    if suffix in JSON_LINES:
        return "jsonl"
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix == ".arrow":
        raise UserError(f"{path}: a file of a saved data set; name its folder, the one with state.json")
    return "text" if suffix in TEXT else otherwise


def _suffix(path: Path) -> str:
    """Of a file's name, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _data_file(path: Path, kind: Format) -> DataFile:
    found = path.stat()
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    return DataFile(path, kind, found.st_size, found.st_mtime_ns)


def _dataset_folder(root: Path, data: DataSet) -> DataFile:
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    inside = [p.stat() for p in files]
    if not any(p.suffix in _OF_DATASETS and not _hidden(p.relative_to(root)) for p in files):
        raise UserError(
            f"{root}: not a folder that datasets saved, and holds nothing that it reads; set format, or name "
            "its files"
        )
    if scripts := sorted(root.glob("*.py")):
        raise UserError(f"{scripts[0]}: the data set comes with code, which is not run; name its files")
    size, changed = sum(s.st_size for s in inside), max(s.st_mtime_ns for s in inside)
    return DataFile(root, "dataset", size, changed, data.split, data.subset)


def _of_split(
    root: Path, kinds: dict[Path, Format | None], data: DataSet, notes: list[str]
) -> dict[Path, Format | None]:
    """Without the files of other splits, where names of tables tell of some: a test set is not trained on
    because it lies beside. Where no name tells of `train`, it is what tells of none. Of texts every name has
    to tell of a split, `train` among them: in a tree of code or pages `test` is a word like others."""
    splits = {p: split_of(p.relative_to(root)) for p, kind in kinds.items() if kind in ("jsonl", "parquet")}
    if not splits:
        splits = {p: split_of(Path(p.name)) for p, kind in kinds.items() if kind == "text"}
        telling = {split for p, split in splits.items() if p.stem.lower() not in _ABOUT}
        if "train" not in telling or "" in telling or len(telling) < 2:
            splits = {}
    there = sorted({split for split in splits.values() if split})
    if "train" not in there and not all(splits.values()):
        splits = {p: split or "train" for p, split in splits.items()}
    wanted = _SPLIT_OF_WORD.get(data.split, data.split)
    if wanted not in splits.values():
        if data.split == "train" and len(there) < 2:
            return kinds
        told = f"but of {', '.join(there)}" if there else "by their names"
        raise UserError(
            f"{root}: holds no files of the split {data.split}, {told}; set split, or path to a pattern"
        )
    others = Counter(split for split in splits.values() if split != wanted)
    if others:
        told = ", ".join(f"{n} of {split or 'none'}" for split, n in sorted(others.items(), reverse=True))
        read = len(splits) - others.total()
        notes.append(
            f"{root}: reads {read} of {len(splits)} files, of the split {data.split}, and not {told}"
        )
    return {p: kind for p, kind in kinds.items() if splits.get(p) == wanted}


def split_of(path: Path) -> str:
    """The split that the name of a file or of a folder around it tells of, as on the hub:
    train-00000-of-00002, train_sft-00000-of-00001, test.jsonl, validation/a.parquet; empty: none."""
    if sharded := re.match(r"(.+?)[-._]\d{5}-of-\d{5}", path.name):
        first, *others = re.split(r"[-._]", sharded[1])
        if others and first in _SPLIT_OF_WORD:
            return sharded[1]
    for part in (path.name, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return ""


class Digests:
    """SHA-256 of files, in the order of their contents; what is known is kept in a file of the cache."""

    def __init__(self, cache: Path, title: str) -> None:
        name = hashlib.sha256(title.encode()).hexdigest()[:16]
        self._path = cache / "digests" / f"{name}.json"
        self._known: dict[str, list[int | str]] = {}
        try:
            told = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {str(k): list(v) for k, v in told.items() if len(v) == 3}
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # made anew: it holds nothing that cannot be found again

    def unknown(self, files: Sequence[DataFile]) -> int:
        """How many bytes have to be read for the digests of files."""
        return sum(file.size for file in files if self._of(file) is None)

    def read(self, files: Sequence[DataFile], title: str) -> list[str]:
        """The digests of files; those that are not known are read.

        Raises:
          UserError: one cannot be read.
        """
        missing = [file for file in files if self._of(file) is None]
        found: dict[str, str] = {}
        total = sum(file.size for file in missing)
        with (
            ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
            tqdm(
                total=total, desc=f"digest {title}", unit="B", unit_scale=True, disable=total < _SHOWN
            ) as bar,
        ):
            saved = time.monotonic()
            for file, digest in zip(missing, pool.map(_digest, missing), strict=True):
                found[str(file.path)] = digest
                if time.time() - file.changed / 1e9 > _SETTLED and file.size:
                    self._known[_key(file)] = [file.size, file.changed, digest]
                bar.update(file.size)
                if time.monotonic() - saved > 30:
                    self._save()
                    saved = time.monotonic()
        if missing:
            self._save()
        return [self._of(file) or found[str(file.path)] for file in files]

    def _of(self, file: DataFile) -> str | None:
        size, changed, digest = self._known.get(_key(file), (-1, -1, ""))
        return str(digest) if (size, changed) == (file.size, file.changed) else None

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._known)


def _key(file: DataFile) -> str:
    return str(file.path.absolute())


def _digest(file: DataFile) -> str:
    if file.format == "dataset" and not file.path.is_dir():
        table = open_dataset(str(file.path), file.split, file.subset)
        return hashlib.sha256(f"{file.path} {table._fingerprint}".encode()).hexdigest()
    try:
        if not file.path.is_dir():
            with open(file.path, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256()
        for inner in sorted(p for p in file.path.rglob("*") if p.is_file()):
            with open(inner, "rb") as opened:
                digest.update(str(inner.relative_to(file.path)).encode())
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename or file.path}: cannot be read: {error.strerror}") from error
