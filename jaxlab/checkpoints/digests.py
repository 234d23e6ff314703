"""Digests beside what is saved: bytes that changed on the disk are found before anybody reads them.

Of several processes each reads its share of the files, and all come to the same answer.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxlab import distributed
from jaxlab.files import write_json

DIGESTS = "digests.json"
_THREADS = 4


def write_digests(folder: Path) -> None:
    """Writes `digests.json`: the SHA-256 of every file in a folder, by its path in it.

    Raises:
      UserError: it cannot be written.
      OSError: a file cannot be read.
    """
    names = distributed.share("names", sorted(_names(folder)) if distributed.is_main() else None)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name), _share_of(names)))
    parts = distributed.gather("digests", dict(zip(_share_of(names), digests, strict=True)))
    if distributed.is_main():
        found = {name: digest for part in parts for name, digest in part.items()}
        write_json(folder / DIGESTS, {"sha256": {name: found[name] for name in names}})


def find_damage(folder: Path) -> str | None:
    """What is not as `write_digests` saw it, the first file; None: nothing. Further files do not matter."""
    said = distributed.share("said", _read_digests(folder) if distributed.is_main() else None)
    if isinstance(said, str):
        return said
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda name: _problem(folder, name, said[name]), _share_of(list(said)))
        first = next((problem for problem in problems if problem is not None), None)
    return next((problem for problem in distributed.gather("damage", first) if problem is not None), None)


def _read_digests(folder: Path) -> dict[str, str] | str:
    """The digests by file, or why there are none."""
    try:
        said = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))["sha256"]
        return {str(name): str(digest) for name, digest in said.items()}
    except FileNotFoundError:
        return f"it has no {DIGESTS}: it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {DIGESTS} is damaged"


def _share_of(names: list[str]) -> list[str]:
    """What this process reads of it."""
    return names[distributed.process_index() :: distributed.process_count()]


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
