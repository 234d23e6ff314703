"""Digests beside what is saved: bytes that changed on the disk are found before anybody reads them."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxlab.files import write_json

DIGESTS = "digests.json"
_THREADS = 4


def write_digests(folder: Path) -> None:
    """Writes `digests.json`: the SHA-256 of every file in a folder, by its path in it.

    Raises:
      UserError: it cannot be written.
      OSError: a file cannot be read.
    """
    names = sorted(_names(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name), names))
    write_json(folder / DIGESTS, {"sha256": dict(zip(names, digests, strict=True))})


def find_damage(folder: Path) -> str | None:
    """What is not as `write_digests` saw it, the first file; None: nothing. Further files do not matter."""
    try:
        said = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))["sha256"]
        digests = {str(name): str(digest) for name, digest in said.items()}
    except FileNotFoundError:
        return f"it has no {DIGESTS}: it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {DIGESTS} is damaged"
    with ThreadPoolExecutor(_THREADS) as pool:
        for problem in pool.map(lambda name: _problem(folder, name, digests[name]), digests):
            if problem is not None:
                return problem
    return None


def _problem(folder: Path, name: str, digest: str) -> str | None:
    path = folder / name
    try:
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            return f"its file {name} is gone"
        return None if _digest(path) == digest else f"its file {name} does not hold what was written"
    except OSError as error:
        return f"its file {name} cannot be read: {error.strerror}"


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != DIGESTS:
            yield path.relative_to(folder).as_posix()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
