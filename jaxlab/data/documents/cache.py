"""Where tokens are kept, and what belongs together there.

A data set is tokenised in units, each of which is one large file or several small ones in a row. A unit has a
folder of shards, named by the digests of its files and of all that decides its tokens: the same content is
never tokenised twice, wherever it lies and whatever it is called.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlab.data.documents.config import DataSet
from jaxlab.data.documents.document import Counts, Encoder
from jaxlab.data.documents.files import DataFile
from jaxlab.data.documents.readers import Place
from jaxlab.data.documents.shards import damaged, read_facts
from jaxlab.errors import UserError
from jaxlab.files import output_path, writing

VARIABLE = "JAXLAB_DATA_CACHE"
FORMAT = 1
"""Of shards and of what is in them: another number makes all tokens anew."""
UNIT_BYTES = 1 << 26
"""Small files are joined up to this."""


def cache_folder() -> Path:
    """`jaxlab/data` in the user's cache folder, or where JAXLAB_DATA_CACHE says. It is made.

    Raises:
      UserError: it cannot be.
    """
    said, home = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError:
        raise UserError(f"no folder to keep tokens in: there is no home; set {VARIABLE}") from None
    folder = output_path(said) if said else cache / "jaxlab" / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; set {VARIABLE}") from error
    return folder


@dataclass(frozen=True)
class Unit:
    """Files that are tokenised together, and the folder of their shards."""

    files: tuple[DataFile, ...]
    folder: Path
    data: DataSet

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def shards(self) -> list[Path]:
        """The shards that are there, in order, from the first one without a gap."""
        found: list[Path] = []
        while (path := self.folder / f"{len(found):05}.safetensors").exists():
            found.append(path)
        return found

    @property
    def done(self) -> bool:
        """Whether all of it is tokenised.

        Raises:
          UserError: its last shard is damaged.
        """
        there = self.shards()
        return bool(there) and bool(read_facts(there[-1])["done"])

    def reached(self) -> tuple[int, int, Place]:
        """(number of shards, file, place in it) to go on from.

        Raises:
          UserError: its last shard is damaged.
        """
        there = self.shards()
        if not there:
            return 0, 0, Place()
        try:
            file, *place = read_facts(there[-1])["after"]
            return len(there), int(file), Place(*map(int, place))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(there[-1], "metadata") from error

    def counts(self) -> Counts:
        """What became of its rows, so far.

        Raises:
          UserError: a shard is damaged.
        """
        total = Counts()
        for path in self.shards():
            try:
                total.add(Counts.from_json(read_facts(path)["counts"]))
            except (KeyError, TypeError) as error:
                raise damaged(path, "metadata") from error
        return total


def make_units(
    data: DataSet, files: Sequence[DataFile], digests: Sequence[str], encoder: Encoder, cache: Path
) -> list[Unit]:
    """The units of a data set."""
    units = []
    for group in _groups(files):
        options = {
            "format": FORMAT,
            "encoder": encoder.identity,
            "content": data.content,
            "column": data.column,
            "separator": data.separator,
            "split": data.split if files[group[0]].format == "dataset" else None,
            **({"subset": data.subset} if data.subset else {}),
            "kind": files[group[0]].format,
            "files": [digests[i] for i in group],
        }
        name = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:32]
        units.append(Unit(tuple(files[i] for i in group), cache / "tokens" / name, data))
    return units


def _groups(files: Sequence[DataFile]) -> Iterator[list[int]]:
    group: list[int] = []
    size = 0
    for number, file in enumerate(files):
        if group and (size + file.size > UNIT_BYTES or files[group[0]].format != file.format):
            yield group
            group, size = [], 0
        group.append(number)
        size += file.size
    yield group


def make_folder(folder: Path) -> None:
    """Makes a folder of the cache.

    Raises:
      UserError: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
