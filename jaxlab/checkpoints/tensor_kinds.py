"""What the tensors of a model are, from headers alone and without jax: for merging, which goes tensor by
tensor and never builds a model.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlab.checkpoints.formats.base import OpenModel
from jaxlab.checkpoints.safetensors_file import Tensor, check_rows
from jaxlab.checkpoints.tensor_table import LeafPath, Row, parse

if TYPE_CHECKING:  # a Hugging Face folder needs no jax
    from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder


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
    pattern, layers = row.name, (None,) * len(names)
    if numbers:
        inner = len(names) // len(numbers)
        layers = tuple(first_layer + i for i in range(len(numbers)) for _ in range(inner))
        if row.numbers or row.paths[0].startswith("dense_layers."):  # as `Entry.pattern`
            pattern = pattern.replace("{i}", f"{{{','.join(map(str, numbers))}}}")
    paths = tuple(tuple(path.split(".")) for path in row.paths)
    return TensorKind(paths, pattern, names, layers, row.layout, row.join, row.runs)


@dataclass(frozen=True)
class ModelTensors:
    """All tensors of a model under the names of its family."""

    tensors: Mapping[str, Tensor]
    kinds: tuple[TensorKind, ...]
    """Of the parameters."""
    family: str
    """Whose names they have, with the variant."""
    copies: tuple[str, ...] = ()
    """Heads written out although they are tied: the embedding once more."""
    ignored: tuple[str, ...] = ()
    """No parameters, by a rule of the family."""


def model_tensors(opened: OpenModel, family: str | None = None) -> ModelTensors:
    """The tensors of an opened model. A Hugging Face folder or a GGUF file tells them without jax; a model of
    ours is read whole when the first of its tensors is.

    Args:
      family: of a model of ours: whose names its tensors have, by default its config's.

    Raises:
      UserError: tensors are missing, not known, or not of floating point.
    """
    from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder

    if isinstance(opened, HuggingFaceFolder):
        return _of_folder(opened)
    return _of_parameters(opened, family or opened.config.family)


def tensors_laid_out_as(opened: OpenModel, family: str) -> ModelTensors:
    """The tensors of a model under the names and in the layout of another family that has its leaves; the
    model is read whole when the first of them is.

    Raises:
      UserError: the family has no name for a leaf.
    """
    return _of_parameters(opened, family)


def _of_folder(opened: "HuggingFaceFolder") -> ModelTensors:
    from jaxlab.checkpoints.unexpected_tensors import TensorAccount, is_float

    found = opened.matched
    wrong = tuple(
        f"{name} is {opened.tensors[name].dtype}, expected a floating-point dtype"
        for name in found.paths
        if not is_float(opened.tensors[name].dtype)
    )
    TensorAccount(found.family, (), found.copies, found.ignored, found.missing, found.unmapped, wrong).check(
        opened.path
    )
    return ModelTensors(opened.tensors, found.kinds, found.family, found.copies, found.ignored)


def _of_parameters(opened: OpenModel, family: str) -> ModelTensors:
    from jaxlab.checkpoints.families import rows_of
    from jaxlab.checkpoints.tensor_map import entries, leaf_at, to_hf

    shapes = opened.shapes
    layouts = {row.paths[0]: row.layout for row in rows_of(family)}
    held: list[Any] = []
    lock = threading.Lock()

    def tensor(entry: Any, index: int) -> np.ndarray:
        with lock:
            if not held:
                held.append(opened.read())
        return np.ascontiguousarray(np.asarray(to_hf(held[0], entry)[index]))

    kinds, tensors = [], {}
    for entry in entries(shapes, family):
        kinds.append(
            TensorKind(
                entry.paths,
                entry.pattern,
                entry.names,
                entry.layers,
                layouts[".".join(entry.path)],
                entry.join,
                entry.runs,
            )
        )
        shape, dtype = entry.shape(shapes), np.dtype(leaf_at(shapes, entry.path).dtype)
        for index, name in enumerate(entry.names):
            tensors[name] = whole_tensor(name, dtype, shape, lambda e=entry, i=index: tensor(e, i))
    source = opened.source_files
    copies = () if source is None else source.copies
    embedding = next(kind for kind in kinds if kind.path == ("embedding", "table"))
    for name in copies:
        tensors[name] = dataclasses.replace(tensors[embedding.names[0]], name=name)
    return ModelTensors(tensors, tuple(kinds), family, copies)


def whole_tensor(
    name: str, dtype: np.dtype, shape: tuple[int, ...], read: Callable[[], np.ndarray]
) -> Tensor:
    """A tensor that can only be made whole."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        values = read()
        return values[start:stop] if shape else values

    return Tensor(name, dtype, shape, read_rows)
