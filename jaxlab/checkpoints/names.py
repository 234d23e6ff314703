"""Our parameter tree and the names and shapes of Hugging Face checkpoints: one table, both ways, bit for bit.

Llama's names where Llama has the tensor, names of our own elsewhere (NSA's compression and gates, the vision
tower).
A leaf of ours may hold many tensors of a checkpoint: layers are stacked on a leading axis, and NSA's keys and
values on a second one, its branches. A tensor in Hugging Face's shape is viewed with those axes flattened
into one, N. Rotary embeddings pair the same halves in both, so that nothing is permuted.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlab.errors import UserError

Path = tuple[str, ...]
Leaf = Float[Array, "..."] | Float[np.ndarray, "..."]
Stack = Float[Array, "N ..."] | Float[np.ndarray, "N ..."]
"""Tensors of one kind in Hugging Face's shape."""

BRANCHES = ("compression", "selection", "window")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: its place in our tree, its name, and how its axes are laid out there."""

    path: str
    name: str
    rank: int
    """Axes of one tensor of ours, without layers and branches."""
    inputs: int | None = None
    """A matrix, Hugging Face's [outputs, inputs]: how many of our leading axes are its inputs. 0: the axes
    flattened into a vector. None: as it is."""


# Inside a layer; the same for the decoder and the vision tower.
_LAYER = [
    Row("attention_norm.scale", "input_layernorm.weight", 1),
    Row("attention_norm.bias", "input_layernorm.bias", 1),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", 1),
    Row("mlp_norm.bias", "post_attention_layernorm.bias", 1),
    Row("attention.query", "self_attn.q_proj.weight", 3, inputs=1),
    Row("attention.query_bias", "self_attn.q_proj.bias", 2, inputs=0),
    Row("attention.key", "self_attn.k_proj.weight", 3, inputs=1),
    Row("attention.key_bias", "self_attn.k_proj.bias", 2, inputs=0),
    Row("attention.value", "self_attn.v_proj.weight", 3, inputs=1),
    Row("attention.value_bias", "self_attn.v_proj.bias", 2, inputs=0),
    Row("attention.output", "self_attn.o_proj.weight", 3, inputs=2),
    Row("attention.output_bias", "self_attn.o_proj.bias", 1),
    *(
        row
        for kind in ("key", "value")
        for row in (
            Row(f"attention.compress_{kind}.position", f"self_attn.compress_{kind}.position.weight", 2),
            Row(f"attention.compress_{kind}.hidden", f"self_attn.compress_{kind}.fc1.weight", 3, inputs=2),
            Row(f"attention.compress_{kind}.hidden_bias", f"self_attn.compress_{kind}.fc1.bias", 1),
            Row(f"attention.compress_{kind}.output", f"self_attn.compress_{kind}.fc2.weight", 2, inputs=1),
            Row(f"attention.compress_{kind}.output_bias", f"self_attn.compress_{kind}.fc2.bias", 1),
        )
    ),
    Row("attention.gate.hidden", "self_attn.gate.fc1.weight", 2, inputs=1),
    Row("attention.gate.output", "self_attn.gate.fc2.weight", 3, inputs=1),
    Row("attention.gate.bias", "self_attn.gate.fc2.bias", 2, inputs=0),
    Row("mlp.gate", "mlp.gate_proj.weight", 2, inputs=1),
    Row("mlp.gate_bias", "mlp.gate_proj.bias", 1),
    Row("mlp.up", "mlp.up_proj.weight", 2, inputs=1),
    Row("mlp.up_bias", "mlp.up_proj.bias", 1),
    Row("mlp.down", "mlp.down_proj.weight", 2, inputs=1),
    Row("mlp.down_bias", "mlp.down_proj.bias", 1),
]


def _layers(path: str, name: str) -> list[Row]:
    return [dataclasses.replace(r, path=f"{path}.{r.path}", name=f"{name}.{{i}}.{r.name}") for r in _LAYER]


TABLE: tuple[Row, ...] = (
    Row("embedding.table", "model.embed_tokens.weight", 2),
    Row("position.table", "model.embed_positions.weight", 2),
    *_layers("layers", "model.layers"),
    Row("final_norm.scale", "model.norm.weight", 1),
    Row("final_norm.bias", "model.norm.bias", 1),
    Row("head.table", "lm_head.weight", 2, inputs=1),
    Row("vision.patch.table", "vision_tower.patch_embedding.weight", 2, inputs=1),
    Row("vision.patch.bias", "vision_tower.patch_embedding.bias", 1),
    Row("vision.position.table", "vision_tower.position_embedding.weight", 2),
    *_layers("vision.layers", "vision_tower.layers"),
    Row("vision.final_norm.scale", "vision_tower.norm.weight", 1),
    Row("vision.final_norm.bias", "vision_tower.norm.bias", 1),
    Row("projector.hidden", "multi_modal_projector.linear_1.weight", 2, inputs=1),
    Row("projector.hidden_bias", "multi_modal_projector.linear_1.bias", 1),
    Row("projector.output", "multi_modal_projector.linear_2.weight", 2, inputs=1),
    Row("projector.output_bias", "multi_modal_projector.linear_2.bias", 1),
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = {row.path: row for row in TABLE}


@dataclasses.dataclass(frozen=True)
class Entry:
    """The tensors of a checkpoint that one leaf of ours holds."""

    path: Path
    """Of the leaf."""
    pattern: str
    """Their name, with {i} for the layer and {branch} for NSA's branch."""
    names: tuple[str, ...]
    """All N of them, in the order of the leaf's leading axes."""
    layers: tuple[int | None, ...]
    """Of each: its layer."""
    stacked: int
    """Leading axes of the leaf that tell them apart: 0, 1 (layers) or 2 (layers and branches)."""
    inputs: int | None

    @property
    def is_language(self) -> bool:
        """Whether it belongs to the language model."""
        return self.path[0] not in ("vision", "projector")


def entries(params: Mapping[str, Any]) -> tuple[Entry, ...]:
    """An entry for every leaf of a tree of arrays or shapes. Raises UserError for a leaf without a name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return tuple(_entry(tuple(key.key for key in path), leaf.shape) for path, leaf in leaves)


def _entry(path: Path, shape: tuple[int, ...]) -> Entry:
    dotted = ".".join(path)
    if dotted not in _ROWS:
        raise UserError(
            f"the parameter {dotted} has no name in a Hugging Face checkpoint; add it to checkpoints/names.py"
        )
    row = _ROWS[dotted]
    stacked = len(shape) - row.rank
    by_layer = "{i}" in row.name
    branched = stacked == 2 and by_layer and shape[1:2] == (len(BRANCHES),)
    if stacked != int(by_layer) and not branched:
        raise UserError(f"the parameter {dotted} has shape {shape}; {row.name} does not fit it")
    pattern, end = row.name, row.name.rpartition(".")[2]
    if branched:
        pattern = f"{row.name.removesuffix(end)}{{branch}}.{end}"
    layers: list[int | None] = list(range(shape[0])) if by_layer else [None]
    branches = BRANCHES if branched else ("",)
    names = tuple(pattern.format(i=i, branch=branch) for i in layers for branch in branches)
    return Entry(path, pattern, names, tuple(i for i in layers for _ in branches), stacked, row.inputs)


def to_hf(leaf: Leaf, entry: Entry) -> Stack:
    """The tensors of a leaf in Hugging Face's shape, stacked on one leading axis N."""
    own = leaf.shape[entry.stacked :]
    flat = leaf.reshape(len(entry.names), *own)
    if entry.inputs is None:
        return flat
    if entry.inputs == 0:
        return flat.reshape(len(entry.names), math.prod(own))
    return flat.reshape(len(entry.names), *_matrix(own, entry.inputs)).swapaxes(1, 2)


def from_hf(tensors: Stack, entry: Entry, shape: tuple[int, ...]) -> Leaf:
    """The inverse of `to_hf`, for a leaf of the given shape."""
    if entry.inputs:
        own = shape[entry.stacked :]
        outputs_inputs = _matrix(own, entry.inputs)[::-1]
        tensors = tensors.reshape(len(entry.names), *outputs_inputs).swapaxes(1, 2)
    return tensors.reshape(shape)


def _matrix(own: tuple[int, ...], inputs: int) -> tuple[int, int]:
    return math.prod(own[:inputs]), math.prod(own[inputs:])


def hf_tensors(params: Mapping[str, Any]) -> Iterator[tuple[Entry, Stack]]:
    """Every leaf of a parameter tree with its entry, in Hugging Face's shape and stacked on one axis N."""
    for entry in entries(params):
        yield entry, to_hf(leaf_at(params, entry.path), entry)


def from_hf_tensors(tensors: Mapping[str, Stack], template: Mapping[str, Any]) -> dict[str, Any]:
    """The tree shaped like `template` whose leaves are given by the patterns of their entries.

    Raises:
      UserError: a pattern of the template is missing from `tensors`, or one of `tensors` is not in the
        template.
    """
    wanted = entries(template)
    surplus = set(tensors) - {entry.pattern for entry in wanted}
    missing = [entry.pattern for entry in wanted if entry.pattern not in tensors]
    if surplus or missing:
        raise UserError(
            f"tensors and parameters differ: missing {missing[:3]}, not used {sorted(surplus)[:3]}"
        )
    shape = lambda entry: leaf_at(template, entry.path).shape  # noqa: E731
    return tree_of({entry.path: from_hf(tensors[entry.pattern], entry, shape(entry)) for entry in wanted})


def leaf_at(params: Mapping[str, Any], path: Path) -> Any:
    """The leaf of a nested dict at a path."""
    for key in path:
        params = params[key]
    return params


def tree_of(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict with the given leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def host_tensors(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a checkpoint by its own name, on the host, row-major."""
    for entry, stacked in hf_tensors(params):
        values = np.asarray(stacked)
        for name, value in zip(entry.names, values, strict=True):
            yield name, np.ascontiguousarray(value)
