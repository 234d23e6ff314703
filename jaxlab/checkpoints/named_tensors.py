"""All tensors of a model by name, from headers alone: for merging, which goes tensor by tensor and builds no
model.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlab.checkpoints.formats.base import OpenModel
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.checkpoints.safetensors_file import Tensor, check_rows
from jaxlab.checkpoints.tensor_kinds import TensorKind
from jaxlab.checkpoints.tensor_table import EMBEDDING
from jaxlab.checkpoints.unexpected_tensors import TensorAccount, check_tied_head, is_float

if TYPE_CHECKING:  # names of a folder are matched without jax
    from jaxlab.models import Params


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


def check_tied_heads(found: ModelTensors) -> None:
    """Whether every tied head that is written out is the embedding.

    Raises:
      UserError: one is not, bit for bit.
    """
    for kind in found.kinds:
        if kind.path == EMBEDDING:
            for copy in found.copies:
                check_tied_head(found.tensors[copy], found.tensors[kind.names[0]])


def _of_folder(opened: HuggingFaceFolder) -> ModelTensors:
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


def tensors_of_shapes(shapes: "Params", family: str) -> ModelTensors:
    """The tensors that a tree of arrays, or of shapes, has under the names of a family; none can be read.

    Raises:
      UserError: the family has no name for a leaf.
    """

    def unread(entry: Any, index: int) -> np.ndarray:
        raise AssertionError("shapes hold no values")

    return _of_tree(shapes, family, unread)


def _of_parameters(opened: OpenModel, family: str) -> ModelTensors:
    from jaxlab.checkpoints.tensor_map import to_hf

    held: list[Any] = []
    lock = threading.Lock()

    def tensor(entry: Any, index: int) -> np.ndarray:
        with lock:
            if not held:
                held.append(opened.read())
        return np.ascontiguousarray(np.asarray(to_hf(held[0], entry)[index]))

    found = _of_tree(opened.shapes, family, tensor)
    copies = () if opened.source_files is None else opened.source_files.copies
    embedding = next(kind for kind in found.kinds if kind.path == EMBEDDING)
    original = found.tensors[embedding.names[0]]
    tensors = {**found.tensors, **{name: dataclasses.replace(original, name=name) for name in copies}}
    return dataclasses.replace(found, tensors=tensors, copies=copies)


def _of_tree(shapes: "Params", family: str, read: Callable[[Any, int], np.ndarray]) -> ModelTensors:
    from jaxlab.checkpoints.families import rows_of
    from jaxlab.checkpoints.tensor_map import entries, leaf_at

    layouts = {row.paths[0]: row.layout for row in rows_of(family)}
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
            tensors[name] = whole_tensor(name, dtype, shape, functools.partial(read, entry, index))
    return ModelTensors(tensors, tuple(kinds), family)


def whole_tensor(
    name: str, dtype: np.dtype, shape: tuple[int, ...], read: Callable[[], np.ndarray]
) -> Tensor:
    """A tensor that can only be made whole."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        values = read()
        return values[start:stop] if shape else values

    return Tensor(name, dtype, shape, read_rows)
