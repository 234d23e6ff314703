"""A folder that this tool writes: aside first, then put in place; what it did not write is never replaced."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxlab import distributed
from jaxlab.errors import UserError
from jaxlab.files import output_path

MARKER = ".jaxlab-output.json"
"""In every folder written here: the names of all files that were put into it."""


def check_output(
    path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (), *, overwrite: bool = False
) -> Path:
    """The absolute path of a folder to write, if it may be written. Reads nothing but the marker.

    Args:
      inputs: files and folders that are read to make it.
      overwrite: whether a folder that was written here may be replaced.

    Raises:
      UserError: `path` is no possible name; it is an input, holds one or lies in one; it is a link or a file;
        or it is a folder that holds something, and `overwrite` is not set or not all of it was written here.
    """
    path = Path(os.path.abspath(output_path(path)))
    if path.is_symlink():
        raise UserError(f"{path}: a link; name the folder itself")
    real = path.resolve()
    for source in inputs:
        found = Path(source).resolve()
        if real == found:
            raise UserError(f"{path}: is an input; choose another place")
        if found.is_relative_to(real):
            raise UserError(f"{path}: holds the input {source}; choose another place")
        if real.is_relative_to(found):
            raise UserError(f"{path}: lies in the input {source}; choose another place")
    if not os.path.lexists(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path}: exists already, and is no folder; choose another place")
    if _empty(path):
        if path.is_mount():
            raise UserError(f"{path}: a mount point, which no folder can replace; name a folder in it")
        return path
    if not overwrite:
        raise UserError(f"{path}: exists already; choose another place or use --overwrite")
    foreign = _foreign(path)
    if foreign is not None:
        raise UserError(f"{path}: {foreign}; --overwrite replaces only what it wrote itself")
    return path


def _empty(folder: Path) -> bool:
    with os.scandir(folder) as found:
        return next(found, None) is None


def _foreign(folder: Path) -> str | None:
    """What tells that a folder, or something in it, was not written here; None: nothing."""
    marker = folder / MARKER
    try:
        if marker.is_symlink() or not marker.is_file():
            return f"not a folder that this tool wrote (no {MARKER} in it)"
        written = json.loads(marker.read_text(encoding="utf-8"))["written"]
        added = sorted(files_below(folder) - {MARKER, *map(str, written)})
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    return f"holds {added[0]}, which this tool did not write" if added else None


def files_below(folder: Path) -> set[str]:
    """All that a folder holds, at any depth, but the folders themselves."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


@contextlib.contextmanager
def write_aside(
    path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (), *, overwrite: bool = False
) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `path` when the block ends without an exception.

    Until then an older folder at `path` stays as it is; it is removed last. After an exception nothing is
    left of the new one. Of several processes all come here and fill the folder that process 0 makes.

    Raises:
      UserError: as `check_output`, before the block and once more after it.
    """
    if not distributed.is_main():
        yield Path(distributed.share("aside"))
        for name in ("filled", "placed"):
            distributed.wait_for_all(name)
        return
    inputs = list(inputs)
    path = check_output(path, inputs, overwrite=overwrite)
    aside = lock = None
    made = [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(path)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        lock = _begin(aside)
        distributed.share("aside", str(aside))
        yield aside
        distributed.wait_for_all("filled")
        put_in_place(aside, path, inputs, overwrite=overwrite)
        distributed.wait_for_all("placed")
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if not os.path.exists(path):
            remove_empty(made)


def put_in_place(
    aside: Path, path: Path, inputs: Iterable[str | os.PathLike[str]], *, overwrite: bool
) -> None:
    """A folder that is complete, marked and flushed to disk, takes the place of `path`.

    Raises:
      UserError: as `check_output`: something came there meanwhile.
    """
    text = json.dumps({"written": sorted(files_below(aside) - {MARKER})}) + "\n"
    (aside / MARKER).write_text(text, encoding="utf-8")
    os.chmod(aside, 0o755)
    _sync(*aside.rglob("*"), aside)
    check_output(path, inputs, overwrite=overwrite)  # what came there meanwhile stays, too
    _swap(aside, path)
    _sync(path.parent)


def _begin(aside: Path) -> int:
    """Marks a new folder as one that is being written; whoever lives holds the lock that this returns."""
    descriptor = os.open(aside / MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, b'{"writing": true}\n')
    return descriptor


def _remove_orphans(path: Path) -> None:
    """Removes what writers of `path` that were killed have left: folders marked as being written, and nobody
    writes them any more. An old folder that was moved away and never replaced comes back.
    """
    for aside in sorted(path.parent.iterdir()):
        if not aside.name.startswith(f".{path.name}-") or aside.is_symlink() or not aside.is_dir():
            continue
        if aside.name.endswith("-old") and _foreign(aside) is None:
            if os.path.lexists(path):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.rename(aside, path)
        elif _abandoned(aside):
            shutil.rmtree(aside, ignore_errors=True)


def _abandoned(aside: Path) -> bool:
    """Whether a folder was being written here, or was about to be put in place, by a process that is gone."""
    marker = aside / MARKER
    if marker.is_symlink() or not marker.is_file():
        return False
    descriptor = os.open(marker, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        said = json.loads(os.read(descriptor, 1 << 24) or b"{}")
        return isinstance(said, dict) and ("writing" in said or _foreign(aside) is None)
    except (BlockingIOError, ValueError):
        return False
    finally:
        os.close(descriptor)


def _swap(aside: Path, path: Path) -> None:
    """Put the folder in place; one that is there moves away first, so that a failure loses neither."""
    if not path.exists() or _empty(path):  # which a folder may replace in one step
        os.rename(aside, path)
        return
    old = aside.with_name(f"{aside.name}-old")
    os.rename(path, old)
    try:
        os.rename(aside, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(*paths: Path) -> None:
    """Wait until files, and what folders list, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, as far as nobody has put anything into them."""
    for folder in folders:
        with contextlib.suppress(OSError):  # never made, or in use by now
            folder.rmdir()
