"""A tree of arrays as a folder of Orbax, with digests beside its files."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxlab.checkpoints.digests import write_digests
from jaxlab.errors import UserError
from jaxlab.files import writing

_NO_ROOM = ("No space left", "Disk quota exceeded", "File too large")


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a tree of arrays as a new folder; a kill on the way leaves one that is not whole.

    Raises:
      UserError: there is no room, or no permission.
    """
    with _one_line(folder), writing(folder):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), tree)
        write_digests(folder)


def restore_tree(folder: Path, target: Any) -> Any:
    """Reads a tree of arrays of the shapes, dtypes and shardings of `target`.

    Raises:
      UserError: it is damaged, or holds another tree.
    """
    with unreadable(folder), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), target)


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """What Orbax raises on files that are missing, cut off or changed, as one line for the user."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the parameters cannot be read: {error}"[:400]) from error


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What the threads of Orbax say of a disk that takes no more: its reason comes in other classes too, and
    the traceback that they log of it besides is left out."""
    log, without = logging.getLogger("absl"), lambda record: not record.exc_info
    log.addFilter(without)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = next((reason for reason in _NO_ROOM if reason in str(error)), None)
        if reason is None:
            raise
        raise UserError(f"{path}: cannot be written: {reason}; make room there") from error
    finally:
        log.removeFilter(without)
