"""Rows: which tensor of a Hugging Face folder is which leaf of ours. What they do is in names.py."""

import dataclasses
import itertools

from jaxlab.errors import UserError

LeafPath = tuple[str, ...]
"""Of a leaf in our tree."""
EMBEDDING: LeafPath = ("embedding", "table")
HEAD: LeafPath = ("head", "table")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: its place in our tree, its name, and how its axes lie."""

    path: str | tuple[str, ...]
    """Of our leaf; of several leaves that one tensor of theirs holds, in their order."""
    name: str
    """Theirs, with {i} for the layer, {e} for the expert, {branch} for NSA's branch."""
    layout: str
    """Of one tensor; see layout.py."""
    join: int = 0
    """The axis of theirs along which several leaves are joined."""
    numbers: tuple[int, ...] = ()
    """Theirs of our layers 0, 1, ..., where they are not the same."""
    skips: tuple[int, ...] = ()
    """Numbers of theirs that are none of these layers: others stand in between."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    def layer_numbers(self, count: int, first: int) -> tuple[int, ...]:
        """Theirs of `count` layers of ours, of which `first` others come before. Raises UserError."""
        if self.numbers and len(self.numbers) != count:
            raise UserError(
                f"{self.paths[0]} holds {count} layers, the family names {len(self.numbers)}: {self.numbers}"
            )
        free = (number for number in itertools.count(first) if number not in self.skips)
        return self.numbers or tuple(itertools.islice(free, count))


Rows = tuple[Row, ...]


def in_layers(path: str, name: str, rows: Rows) -> Rows:
    """The rows of one layer as rows of a stack of layers at `path`, named `name`.{i}."""
    place = lambda row: tuple(f"{path}.{p}" for p in row.paths)
    return tuple(
        dataclasses.replace(
            row, path=place(row) if len(row.paths) > 1 else place(row)[0], name=f"{name}.{{i}}.{row.name}"
        )
        for row in rows
    )
