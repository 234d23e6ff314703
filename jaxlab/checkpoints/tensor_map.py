"""Our parameter tree and the names and shapes of Hugging Face folders: one table a family, both ways.

A leaf of ours holds many tensors of a folder: layers are stacked on a leading axis, and experts, or NSA's
branches, on a second one. A tensor of a folder may also hold several leaves of ours (GPT-2's queries, keys
and values), joined along one of its axes. Both are told by the rows of a family (families/).
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlab.checkpoints.fused_qkv import fused_shape, join_fused, split_fused
from jaxlab.checkpoints.tensor_table import Layout, LeafPath, Row, parse
from jaxlab.errors import UserError
from jaxlab.models import BRANCHES

Leaf = Float[Array, "..."] | Float[np.ndarray, "..."]
Stack = Float[Array, "N ..."] | Float[np.ndarray, "N ..."]
"""Tensors of one kind in Hugging Face's shape."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The tensors of a folder that hold one leaf of ours, or several that are joined there."""

    paths: tuple[LeafPath, ...]
    """Of the leaves."""
    pattern: str
    """Their name, with {i} for the layer, {e} for the expert, {h} for the head and {branch} for NSA's branch;
    layers that are told one by one, or are dense before others with experts, are listed, {3,8}."""
    names: tuple[str, ...]
    """All N of them, in the order of the leaves' leading axes."""
    layers: tuple[int | None, ...]
    """Of each: its layer, in our count."""
    lead: int
    """Leading axes of a leaf that tell them apart."""
    layout: Layout
    join: int
    runs: str

    @property
    def path(self) -> LeafPath:
        """Of the leaf, or of the first one."""
        return self.paths[0]

    @property
    def is_language(self) -> bool:
        """Whether it belongs to the language model."""
        return self.path[0] not in ("vision", "projector")

    def shape(self, params: Mapping[str, Any]) -> tuple[int, ...]:
        """Of one tensor in the folder."""
        shapes = [leaf_at(params, path).shape[self.lead :] for path in self.paths]
        return fused_shape(self.layout, self.join, shapes)


def entries(params: Mapping[str, Any], family: str = "jaxlab") -> tuple[Entry, ...]:
    """An entry for every leaf of a tree of arrays or shapes, with the names of a family.

    Raises:
      UserError: a leaf has no name in the family, or a shape that its row does not fit.
    """
    from jaxlab.checkpoints import families

    rows = {row.paths[0]: row for row in families.rows_of(family)}
    joined = {path for row in rows.values() for path in row.paths[1:]}
    dotted = lambda path: ".".join(str(key.key) for key in path)
    leaves = {dotted(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    # Layers that stand before others, with an MLP where those have experts, are numbered first.
    before = next((shape[0] for path, shape in leaves.items() if path.startswith("dense_layers.")), 0)
    found = []
    for path, shape in leaves.items():
        if path in joined:
            continue
        if path not in rows:
            raise UserError(
                f"the parameter {path} has no name in a folder of the family {family}; see docs/families.md"
            )
        found.append(_entry(rows[path], path, shape, before if path.startswith("layers.") else 0))
    return tuple(found)


def _entry(row: Row, path: str, shape: tuple[int, ...], first_layer: int) -> Entry:
    layout, counted = parse(row.layout), re.findall(r"\{(\w+)\}", row.name)
    lead = len(shape) - layout.rank
    pattern = row.name
    of_heads = path.endswith("_norm.scale")  # norms with a scale for each head
    if lead == len(counted) + 1 and "i" in counted and (of_heads or shape[1] == len(BRANCHES)):
        axis = "h" if of_heads else "branch"  # NSA's keys and values: those of its branches
        end = row.name.rpartition(".")[2]
        pattern, counted = f"{row.name.removesuffix(end)}{{{axis}}}.{end}", ["i", axis]
    if lead != len(counted):
        raise UserError(f"the parameter {path} has shape {shape}; {row.name} does not fit it")
    ranges: list[Sequence[int] | tuple[str, ...]] = []
    theirs: tuple[int, ...] = ()
    ours: dict[Any, int] = {}
    for axis, size in zip(counted, shape, strict=False):
        ranges.append(BRANCHES if axis == "branch" else range(size))
        if axis == "i":
            theirs = row.layer_numbers(size, first_layer)
            ours = {number: first_layer + i for i, number in enumerate(theirs)}
            ranges[-1] = theirs
    numbers = [dict(zip(counted, values, strict=True)) for values in itertools.product(*ranges)]
    names = tuple(pattern.format(**number) for number in numbers)
    if row.numbers or path.startswith("dense_layers."):  # patterns stay different from those of other layers
        pattern = pattern.replace("{i}", f"{{{','.join(map(str, theirs))}}}")
    return Entry(
        paths=tuple(tuple(p.split(".")) for p in row.paths),
        pattern=pattern,
        names=names,
        layers=tuple(ours.get(number.get("i")) for number in numbers),
        lead=lead,
        layout=layout,
        join=row.join,
        runs=row.runs,
    )


def to_hf(params: Mapping[str, Any], entry: Entry) -> Stack:
    """The tensors of an entry in Hugging Face's shape, stacked on one leading axis N."""
    parts = []
    for path in entry.paths:
        leaf = leaf_at(params, path)
        flat = leaf.reshape(len(entry.names), *leaf.shape[entry.lead :])
        parts.append(entry.layout.to_theirs(flat, lead=1))
    shapes = [leaf_at(params, path).shape[entry.lead :] for path in entry.paths]
    module = np if all(isinstance(part, np.ndarray) for part in parts) else jax.numpy
    return join_fused(parts, entry.layout, entry.join, shapes, runs=entry.runs, lead=1, module=module)


def from_hf(tensors: Stack, entry: Entry, template: Mapping[str, Any]) -> dict[LeafPath, Leaf]:
    """The inverse of `to_hf`: leaves with the shapes that they have in `template`."""
    shapes = [leaf_at(template, path).shape for path in entry.paths]
    own = [shape[entry.lead :] for shape in shapes]
    parts = split_fused(tensors, entry.layout, entry.join, own, runs=entry.runs, lead=1)
    return {
        path: entry.layout.to_ours(part, shape[entry.lead :], lead=1).reshape(shape)
        for path, shape, part in zip(entry.paths, shapes, parts, strict=True)
    }


def leaf_at(params: Mapping[str, Any], path: LeafPath) -> Any:
    """The leaf of a nested dict at a path."""
    for key in path:
        params = params[key]
    return params


def tree_of(leaves: Mapping[LeafPath, Any]) -> dict[str, Any]:
    """The nested dict with the given leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def host_tensors(params: Mapping[str, Any], family: str = "jaxlab") -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint by its own name, on the host, row-major."""
    for entry in entries(params, family):
        values = np.asarray(to_hf(params, entry))
        for name, value in zip(entry.names, values, strict=True):
            yield name, np.ascontiguousarray(value)
