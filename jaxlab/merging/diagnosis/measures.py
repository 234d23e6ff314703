"""What models changed of the one they come from, measured tensor by tensor from disk: norms and cosines of
task vectors, signs, elements that moved, NaN. A model is never held: tensors are read by rows, in chunks.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlab.checkpoints import (
    EMBEDDING,
    HEAD,
    LeafPath,
    ModelTensors,
    OpenModel,
    Tensor,
    TensorKind,
    model_tensors,
    tensors_laid_out_as,
)
from jaxlab.errors import UserError

CHUNK = 1 << 18
"""Elements that are compared at once."""
SKETCH = 1 << 12
"""Elements of a tensor that are kept, so that layers can be compared with other layers."""


@dataclass(frozen=True)
class Sums:
    """Sums over elements, of which norms and cosines follow; those of several tensors are added.

    With b the reference and d_i = x_i - b for the n other models; NaN and infinities count as zeros.
    """

    size: int
    reference: float
    """b . b"""
    along: np.ndarray
    """float64[n]: b . d_i"""
    products: np.ndarray
    """float64[n, n]: d_i . d_j"""
    changed: np.ndarray
    """int64[n]: elements where d_i is not 0"""
    agree: np.ndarray
    """int64[n, n]: elements where d_i d_j > 0"""
    conflict: np.ndarray
    """int64[n, n]: elements where d_i d_j < 0"""
    not_finite: np.ndarray
    """int64[n + 1]: NaN and infinities in the x_i, and in b last"""

    @classmethod
    def zero(cls, n: int) -> "Sums":
        count = lambda *shape: np.zeros(shape, np.int64)
        return cls(0, 0.0, np.zeros(n), np.zeros((n, n)), count(n), count(n, n), count(n, n), count(n + 1))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            *(getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(Sums))
        )

    @property
    def norms(self) -> np.ndarray:
        """float64[n]: |d_i|"""
        return np.sqrt(np.diag(self.products))

    @property
    def relative(self) -> np.ndarray:
        """float64[n]: |d_i| / |b|; NaN where b is 0 and d_i is not."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.norms / math.sqrt(self.reference) if self.reference else self.norms * np.nan
        return np.where(self.norms == 0, 0.0, ratio)

    @property
    def squares(self) -> np.ndarray:
        """float64[n]: x_i . x_i"""
        return np.maximum(0.0, self.reference + 2 * self.along + np.diag(self.products))

    @property
    def to_reference(self) -> np.ndarray:
        """float64[n]: the cosine of x_i and b; NaN where one is 0."""
        return _cosine(self.reference + self.along, self.squares * self.reference)

    @property
    def cosines(self) -> np.ndarray:
        """float64[n, n]: of d_i and d_j; NaN where one is 0."""
        squares = np.diag(self.products)
        return _cosine(self.products, np.outer(squares, squares))

    @property
    def between(self) -> np.ndarray:
        """float64[n, n]: of x_i and x_j; NaN where one is 0."""
        dots = self.reference + self.along[:, None] + self.along[None] + self.products
        return _cosine(dots, np.outer(self.squares, self.squares))

    @property
    def conflicts(self) -> np.ndarray:
        """float64[n, n]: of the elements that both change, the share where signs differ; NaN: there are none.
        Half of them is what chance gives."""
        with np.errstate(invalid="ignore"):
            return self.conflict / (self.agree + self.conflict)


def _cosine(dots: np.ndarray, squares: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares > 0, np.clip(dots / np.sqrt(squares), -1.0, 1.0), np.nan)


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of all models."""

    name: str
    """In the first model."""
    module: str
    """Its name without layer and prefix: self_attn.q_proj."""
    layer: int | None
    matrix: bool
    """Whether it has two axes or more."""
    sums: Sums
    table: LeafPath | None = None
    """EMBEDDING or HEAD; None: neither."""


@dataclass(frozen=True)
class Rows:
    """The rows of the embedding, by token id, as far as all models have them."""

    relative: np.ndarray
    """float64[n, rows]: |d_i| / |b|; NaN where b is 0"""
    cosines: np.ndarray
    """float64[n, rows]: of x_i and b; NaN where one is 0"""


@dataclass(frozen=True)
class Side:
    """An opened model and its tensors."""

    name: str
    model: OpenModel
    found: ModelTensors

    @functools.cached_property
    def holders(self) -> dict[LeafPath, TensorKind]:
        return {path: kind for kind in self.found.kinds for path in kind.paths}


@dataclass(frozen=True)
class Compared:
    """A tensor and those that stand for it in the other models, none of them read."""

    name: str
    module: str
    layer: int | None
    table: LeafPath | None
    tensors: tuple[Tensor, ...]
    """In the order of the models."""

    @property
    def rows(self) -> int:
        """Of the first axis, as far as all have them."""
        return min((tensor.shape[0] for tensor in self.tensors), default=0) if self.tensors[0].shape else 1


def open_sides(models: Mapping[str, OpenModel]) -> list[Side]:
    """The models with their tensors.

    Raises:
      UserError: tensors that are not those of a model's family.
    """
    return [Side(name, model, model_tensors(model)) for name, model in models.items()]


def match_tensors(sides: Sequence[Side]) -> tuple[list[Compared], list[str]]:
    """The tensors of the language models, by their places in it, and what does not fit."""
    first, found, problems = sides[0], list[Compared](), list[str]()
    views: dict[int, ModelTensors] = {}
    for kind in first.found.kinds:
        if not kind.is_language:
            continue
        held: list[tuple[TensorKind, Mapping[str, Tensor]]] = []
        for index, side in enumerate(sides):
            tied = kind.path == HEAD and HEAD not in side.holders
            own = side.holders.get(EMBEDDING if tied else kind.path)
            if own is None:
                problems.append(f"{side.name} has no {kind.pattern}")
                break
            tensors = side.found.tensors
            if index and not tied and not own.lies_as(kind):
                try:
                    if index not in views:
                        views[index] = tensors_laid_out_as(side.model, first.found.family)
                    own = next(k for k in views[index].kinds if k.paths == kind.paths)
                except (UserError, StopIteration):
                    problems.append(f"{kind.pattern} lies otherwise in {side.name}")
                    break
                tensors = views[index].tensors
            if len(own.names) != len(kind.names):
                problems.append(
                    f"{kind.pattern} is {len(kind.names)} tensors in {first.name}, "
                    f"{len(own.names)} in {side.name}"
                )
                break
            held.append((own, tensors))
        if len(held) < len(sides):
            continue
        table = kind.path if kind.path in (EMBEDDING, HEAD) else None
        shapes = {
            side.name: tensors[own.names[0]].shape for side, (own, tensors) in zip(sides, held, strict=True)
        }
        if len({shape[1:] if table else shape for shape in shapes.values()}) > 1:
            told = ", ".join(f"{list(shape)} in {name}" for name, shape in shapes.items())
            problems.append(f"{kind.pattern} is {told}")
            continue
        for i, name in enumerate(kind.names):
            sources = tuple(tensors[own.names[i]] for own, tensors in held)
            found.append(Compared(name, module_of(kind.pattern), kind.layers[i], table, sources))
    mine = first.holders
    for side in sides[1:]:
        for kind in side.found.kinds:
            if kind.is_language and not any(path in mine for path in (*kind.paths, HEAD)):
                problems.append(f"only {side.name} has {kind.pattern}")
    return found, problems


def module_of(pattern: str) -> str:
    """A pattern of names without prefix, layer and `.weight`: language_model.model.layers.{i}.mlp.up.weight
    is mlp.up."""
    inner = re.split(r"\.\{[^}]*\}\.", pattern, maxsplit=1)
    name = inner[1] if len(inner) > 1 else pattern
    name = name.removesuffix(".weight")
    return name if len(inner) > 1 else name.rpartition(".")[2] if not name.endswith(".bias") else name


@dataclass
class Measured:
    """What `measure` found."""

    tensors: list[TensorDifference]
    rows: Rows | None
    """Of the embedding; None: it does not fit."""
    sketches: dict[tuple[str, int], np.ndarray]
    """By module and layer, of matrices: float32[models, at most SKETCH], their first elements."""


def measure(
    compared: Sequence[Compared],
    reference: int,
    *,
    chunk: int = CHUNK,
    threads: int | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> Measured:
    """Reads all tensors once.

    Args:
      reference: the model that the others are compared with, in the order of their tensors.
      chunk: elements at once.
      progress: called with the bytes of each tensor.

    Raises:
      UserError: a file that is damaged.
    """
    measured = Measured([], None, {})

    def one(item: Compared) -> tuple[TensorDifference, Rows | None, np.ndarray | None]:
        found = _measure_one(item, reference, chunk)
        progress(sum(tensor.stored_bytes for tensor in item.tensors))
        return found

    with concurrent.futures.ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
        for item, (difference, rows, sketch) in zip(compared, pool.map(one, compared), strict=True):
            measured.tensors.append(difference)
            if rows is not None:
                measured.rows = rows
            if sketch is not None and item.layer is not None:
                measured.sketches.setdefault((item.module, item.layer), sketch)
    return measured


def _measure_one(
    item: Compared, reference: int, chunk: int
) -> tuple[TensorDifference, Rows | None, np.ndarray | None]:
    n = len(item.tensors) - 1
    total, sketch = Sums.zero(n), None
    relative, cosines = list[np.ndarray](), list[np.ndarray]()
    for values in _chunks(item, chunk):
        order = [*(i for i in range(n + 1) if i != reference), reference]
        values = [values[i] for i in order]
        total += _sums(values)
        if sketch is None and item.layer is not None and len(item.tensors[0].shape) > 1:
            sketch = np.stack([x.reshape(-1)[:SKETCH] for x in values])
        if item.table == EMBEDDING:
            for parts, found in zip((relative, cosines), _row_wise(values), strict=True):
                parts.append(found)
    rows = Rows(np.concatenate(relative, 1), np.concatenate(cosines, 1)) if relative else None
    is_matrix = len(item.tensors[0].shape) > 1
    return TensorDifference(item.name, item.module, item.layer, is_matrix, total, item.table), rows, sketch


def _chunks(item: Compared, chunk: int) -> Iterator[list[np.ndarray]]:
    """The same rows of all models, float32, whole rows at once."""
    shape = item.tensors[0].shape
    each = max(1, chunk // max(1, math.prod(shape[1:])))
    for start in range(0, item.rows, each):
        stop = min(item.rows, start + each)
        yield [
            np.atleast_1d(tensor.read_rows(start, stop)).astype(np.float32, copy=False)
            for tensor in item.tensors
        ]


def _sums(values: Sequence[np.ndarray]) -> Sums:
    """Of one chunk; the reference is the last of them."""
    flat = [x.reshape(-1) for x in values]
    *models, base = flat
    n, size = len(models), base.size
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = [x - base for x in models]
        found = _products(vectors, base)
    bad = np.zeros(n + 1, np.int64)
    if not np.isfinite(found[0]).all():
        finite = [np.isfinite(x) for x in flat]
        bad[:] = [size - np.count_nonzero(mask) for mask in finite]
        wide = [np.where(mask, x, 0).astype(np.float64) for mask, x in zip(finite, flat, strict=True)]
        vectors, base = [x - wide[-1] for x in wide[:-1]], wide[-1]
        found = _products(vectors, base)
    everything, agree, conflict = found
    changed = np.array([np.count_nonzero(d) for d in vectors], np.int64)
    return Sums(
        size, float(everything[n, n]), everything[n, :n], everything[:n, :n], changed, agree, conflict, bad
    )


def _products(vectors: Sequence[np.ndarray], base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner products of task vectors and base, and how often signs of task vectors agree and differ."""
    n, everything = len(vectors), [*vectors, base]
    products = np.zeros((n + 1, n + 1))
    agree, conflict = np.zeros((n, n), np.int64), np.zeros((n, n), np.int64)
    for i in range(n + 1):
        for j in range(i, n + 1):
            products[i, j] = products[j, i] = float(np.dot(everything[i], everything[j]))
            if i < j < n:
                both = everything[i] * everything[j]
                agree[i, j] = agree[j, i] = np.count_nonzero(both > 0)
                conflict[i, j] = conflict[j, i] = np.count_nonzero(both < 0)
    return products, agree, conflict


def _row_wise(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """float64[n, rows] |d| / |b|, and the cosine of x and b."""
    *models, base = (np.nan_to_num(x, posinf=0, neginf=0).astype(np.float64) for x in values)
    dot = lambda x, y: np.einsum("rd,rd->r", x, y)
    squares = dot(base, base)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.stack([np.sqrt(dot(x - base, x - base) / squares) for x in models])
    cosines = np.stack([_cosine(dot(x, base), dot(x, x) * squares) for x in models])
    return np.where(squares > 0, relative, np.nan), cosines


def by_layer(tensors: Sequence[TensorDifference]) -> dict[int, Sums]:
    """Sums of each layer."""
    return _grouped(tensors, lambda t: t.layer)


def by_module(tensors: Sequence[TensorDifference]) -> dict[str, Sums]:
    """Sums of each module over its layers."""
    return _grouped(tensors, lambda t: t.module)


def _grouped(tensors: Sequence[TensorDifference], key: Callable[[TensorDifference], Any]) -> dict[Any, Sums]:
    groups: dict[Any, Sums] = {}
    for tensor in tensors:
        if (group := key(tensor)) is not None:
            groups[group] = groups[group] + tensor.sums if group in groups else tensor.sums
    return dict(sorted(groups.items())) if groups and isinstance(next(iter(groups)), int) else groups


def in_other_order(one: Tensor, base: Tensor, limit: int = 64) -> str | None:
    """Whether a matrix has the rows, or the columns, of another one in another order, by a sample of them.

    Returns:
      "rows" or "columns"; None: neither.

    Raises:
      UserError: a file that is damaged.
    """
    if len(one.shape) != 2 or min(one.shape) < 4 or one.shape != base.shape:
        return None
    x, b = (tensor.read().astype(np.float32) for tensor in (one, base))
    for axis, said in ((0, "rows"), (1, "columns")):
        theirs, ours = (m if axis == 0 else m.T for m in (b, x))
        step = max(1, len(ours) // limit)
        sample = np.arange(0, len(ours), step)
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = lambda m: np.nan_to_num(m / np.linalg.norm(m, axis=1, keepdims=True))
            best = unit(ours[sample]) @ unit(theirs).T
        place = best.argmax(1)
        if np.median(best.max(1)) > 0.9 and np.mean(place != sample) > 0.25:
            return said
    return None
