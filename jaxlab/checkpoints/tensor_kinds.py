"""Kinds of tensors: what a family's table says of the names in a folder, without jax."""

from dataclasses import dataclass

from jaxlab.checkpoints.tensor_table import LeafPath, Row, parse


@dataclass(frozen=True)
class TensorKind:
    """The tensors that hold one leaf of ours, or several that are joined in each."""

    paths: tuple[LeafPath, ...]
    """Of the leaves."""
    pattern: str
    """Their name, with {i} for the layer; see `Entry.pattern`."""
    names: tuple[str, ...]
    """All of them, in the order of our layers, and in a layer of its experts or heads."""
    layers: tuple[int | None, ...]
    """Of each: its layer in our count; None outside of layers."""
    layout: str
    join: int = 0
    runs: str = ""

    @property
    def path(self) -> LeafPath:
        """Of the leaf, or of the first one."""
        return self.paths[0]

    @property
    def is_language(self) -> bool:
        """Whether it belongs to the language model."""
        return self.path[0] not in ("vision", "projector")

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """What a tensor's shape says of the axes of its layout that stand alone in it, by their letter."""
        joined = self.join if len(self.paths) > 1 else None
        groups = parse(self.layout).theirs
        if len(groups) != len(shape):
            return {}
        alone = [
            (group[0], n, i)
            for i, (group, n) in enumerate(zip(groups, shape, strict=True))
            if len(group) == 1
        ]
        return {letter: size for letter, size, axis in alone if axis != joined}

    def lies_as(self, other: "TensorKind") -> bool:
        """Whether both have their numbers in the same places."""
        mine, theirs = ((kind.paths, kind.join, kind.runs) for kind in (self, other))
        return mine == theirs and parse(self.layout) == parse(other.layout)


def kind_of(row: Row, names: tuple[str, ...], numbers: tuple[int, ...], first_layer: int) -> TensorKind:
    """The kind that a row of a family describes.

    Args:
      names: all its tensors.
      numbers: those of its layers on disk; empty where names count none.
      first_layer: ours of the first of them.
    """
    pattern = row.name
    layers: tuple[int | None, ...] = (None,) * len(names)
    if numbers:
        inner = len(names) // len(numbers)
        layers = tuple(first_layer + i for i in range(len(numbers)) for _ in range(inner))
        if row.numbers or row.paths[0].startswith("dense_layers."):  # as `Entry.pattern`
            pattern = pattern.replace("{i}", f"{{{','.join(map(str, numbers))}}}")
    paths = tuple(tuple(path.split(".")) for path in row.paths)
    return TensorKind(paths, pattern, names, layers, row.layout, row.join, row.runs)
