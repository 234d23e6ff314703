"""A Hugging Face folder that is written in place, tensor by tensor and in any order, and taken up again after
its writer was killed.

It stands beside the place where it will be, as `.NAME.partial`. All files take their space before any is
filled. A journal lists the tensors that are complete, each with its digest: a later writer of the same plan
reads them again, keeps those that are what the journal says, and does the others.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.checkpoints.output_folder import MARKER, check_output, put_in_place, remove_empty
from jaxlab.checkpoints.tensor_folder import (
    CHAT_TEMPLATES,
    COMPANIONS,
    CONFIG,
    INDEX,
    Planned,
    begin_file,
    copy_companions,
    shard_index,
    shard_names,
)
from jaxlab.errors import UserError

STATE, JOURNAL = ".jaxlab-partial.json", ".jaxlab-finished.jsonl"
_BLOCK = 1 << 22
_SYNC = 1 << 26
"""So many bytes are written until the disk is asked to take them."""


class ResumableFolder:
    """A folder under way; made by `resumable_folder`."""

    def __init__(self, aside: Path, shards: Sequence[Sequence[Planned]], names: Sequence[str]) -> None:
        self.aside = aside
        self._shards = shards
        self._names = names
        self._places: dict[str, tuple[int, int, int]] = {}
        self._finished: dict[str, dict[str, Any]] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._descriptors: list[int] = []
        self._journal: Any = None
        self._sync: concurrent.futures.ThreadPoolExecutor | None = None
        self._syncing: concurrent.futures.Future[None] | None = None
        self._unsynced = 0

    def _open(self) -> None:
        starts = [begin_file(self.aside / n, s) for n, s in zip(self._names, self._shards, strict=True)]
        for name, shard, start in zip(self._names, self._shards, starts, strict=True):
            descriptor = os.open(self.aside / name, os.O_RDWR | os.O_CLOEXEC)
            self._descriptors.append(descriptor)
            for tensor in shard:
                self._places[tensor.name] = (descriptor, start, tensor.nbytes)
                start += tensor.nbytes
        for record in _journal_records(self.aside / JOURNAL):
            place = self._places.get(record["name"])
            if place is not None and _digest(*place) == record["sha256"]:
                self._finished[record["name"]] = record
        self._journal = open(self.aside / JOURNAL, "w", encoding="utf-8")  # noqa: SIM115
        for record in self._finished.values():
            self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()

    def _close(self) -> None:
        if self._sync is not None:
            self._sync.shutdown()
        for descriptor in self._descriptors:
            os.close(descriptor)
        if self._journal is not None:
            self._journal.close()

    @property
    def finished(self) -> Mapping[str, dict[str, Any]]:
        """What `finish` said of the tensors that are complete, by name."""
        return self._finished

    def write(self, name: str, values: memoryview | np.ndarray, start: int) -> None:
        """Bytes of a tensor from `start` on; from any thread.

        Raises:
          ValueError: beyond its end.
        """
        descriptor, offset, size = self._places[name]
        view = (
            memoryview(values).cast("B")
            if isinstance(values, memoryview)
            else memoryview(values.view(np.uint8))
        )
        if start + len(view) > size:
            raise ValueError(f"{name}: {start + len(view)} bytes are more than the {size} that are planned")
        while len(view):
            with self._writing:  # a file takes one writer at a time, for whom others would wait in the kernel
                count = os.pwrite(descriptor, view, offset + start)
            view, start = view[count:], start + count
            self._sync_early(count)

    def _sync_early(self, count: int) -> None:
        """Lets the disk write what is there while more is computed: the folder is flushed before it takes its
        place, and would wait for all of it then.

        Raises:
          OSError: the disk failed. The system tells that once, here or when the folder is flushed.
        """
        with self._lock:
            self._unsynced += count
            if self._unsynced < _SYNC or not (self._syncing is None or self._syncing.done()):
                return
            before, self._unsynced = self._syncing, 0
            if self._sync is None:
                self._sync = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sync")
            self._syncing = self._sync.submit(self._sync_all)
        if before is not None:
            before.result()

    def _sync_all(self) -> None:
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)

    def finish(self, name: str, **record: Any) -> None:
        """Notes that a tensor is complete; `sha256` of its bytes is in the record."""
        with self._lock:
            self._finished[name] = {"name": name, **record}
            self._journal.write(json.dumps(self._finished[name]) + "\n")
            self._journal.flush()

    def complete(
        self,
        *,
        config: Mapping[str, Any],
        copy_from: Path | None,
        texts: Mapping[str, str],
        without: Collection[str] = (),
    ) -> None:
        """Writes what stands beside the tensors.

        Args:
          copy_from: a folder whose tokenizer and processor files are copied, but for those of `without`.
          texts: files by name, also in place of copied ones.

        Raises:
          ValueError: a tensor is not finished.
        """
        missing = self._places.keys() - self._finished.keys()
        if missing:
            raise ValueError(f"not written: {sorted(missing)[:3]}")
        if self._syncing is not None:
            self._syncing.result()
        if len(self._names) > 1:
            (self.aside / INDEX).write_text(shard_index(self._shards, self._names), encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (self.aside / CONFIG).write_text(text, encoding="utf-8")
        if copy_from is not None:
            copy_companions(copy_from, self.aside, without)
        for name, content in texts.items():
            (self.aside / name).write_text(content, encoding="utf-8")


@contextlib.contextmanager
def resumable_folder(
    path: str | os.PathLike[str],
    shards: Sequence[Sequence[Planned]],
    *,
    digest: str,
    texts: Iterable[str] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Iterator[ResumableFolder]:
    """A folder to fill; it takes the place of `path` when the block ends without an exception.

    After an exception nothing is left of it; after an interrupt or a kill it waits for the same plan, and
    another plan for the same path removes it.

    Args:
      shards: the tensors of each file.
      digest: of all that decides the bytes; only what has the same is taken up.
      texts: names of further files that `complete` will be given.
      inputs: what the tensors are made from, which is never replaced (see `check_output`).

    Raises:
      UserError: `path` may not be written, another process is writing it, or the disk is full.
    """
    inputs = list(inputs)
    path = check_output(path, inputs, overwrite=overwrite)
    names = shard_names(len(shards))
    made = [parent for parent in path.parents if not os.path.exists(parent)]
    aside = path.parent / f".{path.name}.partial"
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    lock = None
    keep = True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _take(aside, digest, [*names, *texts])
        keep = False
        folder = ResumableFolder(aside, shards, names)
        try:
            folder._open()
            yield folder
        finally:
            folder._close()
        put_in_place(aside, path, inputs, overwrite=overwrite)
        for name in (STATE, JOURNAL):
            (path / name).unlink(missing_ok=True)
        keep = True  # there is none any more
    except (KeyboardInterrupt, GeneratorExit):
        keep = True
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{path}: no room for {total} bytes of tensors; nothing was written") from error
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if not keep:
            shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if not os.path.exists(path) and not os.path.exists(aside):
            remove_empty(made)


def _take(aside: Path, digest: str, names: Sequence[str]) -> int:
    """The folder that a writer of the same plan has left, or a new one; a descriptor that holds its lock."""
    if os.path.lexists(aside):
        _check_ours(aside)
    else:
        aside.mkdir()
    descriptor = os.open(aside / STATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _state(aside).get("digest") != digest:
            for entry in aside.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != STATE:
                    entry.unlink()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"digest": digest, "files": list(names)}).encode(), 0)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{aside}: another process is writing it; wait for it") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Removes what a killed writer of `path` has left beside it, if there is something.

    Raises:
      UserError: it is not ours, or a writer is still at it.
    """
    path = Path(path)
    aside = path.parent / f".{path.name}.partial"
    if not os.path.lexists(aside):
        return
    os.close(_take(aside, "", ()))  # empties it
    shutil.rmtree(aside)


def _state(aside: Path) -> dict[str, Any]:
    """What the writer noted; nothing if it was killed before."""
    try:
        found = json.loads((aside / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_ours(aside: Path) -> None:
    """Whether a folder is one that was left here.

    Raises:
      UserError: it is not.
    """
    said = _state(aside).get("files", [])
    ours = {STATE, JOURNAL, MARKER, CONFIG, INDEX, CHAT_TEMPLATES, *COMPANIONS}
    ours |= set(said) if isinstance(said, list) else set()
    plain = aside.is_dir() and not aside.is_symlink()
    foreign = sorted({entry.name for entry in aside.iterdir()} - ours) if plain else ["it"]
    if foreign:
        raise UserError(f"{aside}: in the way, and not left by this tool ({foreign[0]}); move it")


def _journal_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last one that was torn by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"name", "sha256"} <= record.keys():
                records.append(record)
    return records


def _digest(descriptor: int, offset: int, size: int) -> str:
    """SHA-256 of bytes of a file."""
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    done = 0
    while done < size:
        view = memoryview(buffer)[: min(_BLOCK, size - done)]
        count = os.preadv(descriptor, [view], offset + done)
        if count == 0:
            break
        digest.update(view[:count])
        done += count
    return digest.hexdigest()
