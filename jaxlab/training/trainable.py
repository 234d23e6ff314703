"""What of a model is trained: all of it, some of its leaves, adapters beside others; the rest is frozen.

What is trained is a tree of its own: a leaf of the model stands at its place, and in the place of a leaf that
has an adapter {"lora_a": ..., "lora_b": ...}. Optimizer and checkpoints know this tree alone.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxlab.checkpoints import (
    EMBEDDING,
    AdapterSettings,
    LeafPath,
    Matrix,
    find_targets,
    leaf_at,
    matrices,
    tree_of,
)
from jaxlab.errors import UserError
from jaxlab.models import LowRank, ModelConfig, Params, abstract_params, logical_axes, shardings_by_axes
from jaxlab.training.lora import LoraConfig

A, B = "lora_a", "lora_b"
_PARTS = ("language", "vision", "projector")
_WITH_DROPOUT = ("query", "key", "value", "output", "gate", "up", "down", "hidden")
"""Leaves of attention, MLPs and projectors by whose matrices their modules multiply."""


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The parts of a model that are trained."""

    model: ModelConfig
    whole: frozenset[LeafPath]
    """Leaves that are trained themselves."""
    targets: tuple[Matrix, ...] = ()
    """Matrices that have adapters."""
    adapters: AdapterSettings | None = None

    @property
    def everything(self) -> bool:
        """Whether nothing is frozen."""
        return len(self.whole) == len(jax.tree.leaves(self.shapes))

    @functools.cached_property
    def shapes(self) -> Params:
        """Of the whole model."""
        return abstract_params(self.model)

    @property
    def adapted(self) -> tuple[tuple[LeafPath, Matrix], ...]:
        """The leaves that have an adapter."""
        return tuple((path, matrix) for matrix in self.targets for path in matrix.entry.paths)

    def abstract(self) -> Params:
        """Shapes and dtypes of what is trained: float32."""
        assert self.adapters is not None or not self.targets
        rank = 0 if self.adapters is None else self.adapters.rank
        make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        return self._tree(
            lambda path: leaf_at(self.shapes, path),
            lambda path, matrix: map(make, matrix.shapes(leaf_at(self.shapes, path).shape, rank)),
        )

    def axes(self) -> Params:
        """Logical axes of what is trained."""
        all_axes = logical_axes(self.model)
        same = type(jax.tree.leaves(all_axes)[0])
        return self._tree(
            lambda path: leaf_at(all_axes, path),
            lambda path, matrix: map(same, matrix.axes(leaf_at(all_axes, path))),
        )

    def shardings(self, mesh: Mesh) -> Params:
        """Where what is trained lives.

        Raises:
          UserError: a size that the mesh cannot split.
        """
        return shardings_by_axes(self.abstract(), self.axes(), mesh)

    def begin(self, params: Params, key: Key[Array, ""]) -> Params:
        """What is trained, before the first step: the leaves of `params`, and adapters that change nothing.

        a is drawn from the uniform distribution of Kaiming's initialisation as PEFT has it, within
        1 / sqrt(inputs) of zero; b is zero. For an embedding a is zero and b is normal, as in PEFT.
        """
        shapes = self.abstract()

        def adapter(path: LeafPath, matrix: Matrix) -> tuple[Array, Array]:
            a, b = (leaf_at(shapes, (*path, name)).shape for name in (A, B))
            number = [leaf for leaf, _ in self.adapted].index(path)
            drawn = jax.random.fold_in(key, number)
            if matrix.kind == "embedding":
                return jnp.zeros(a, jnp.float32), jax.random.normal(drawn, b, jnp.float32)
            lead = matrix.entry.lead
            inputs = 1
            for size in a[lead:-1]:
                inputs *= size
            bound = inputs**-0.5
            return jax.random.uniform(drawn, a, jnp.float32, -bound, bound), jnp.zeros(b, jnp.float32)

        return self._tree(lambda path: leaf_at(params, path), adapter)

    def frozen(self, params: Params) -> Params:
        """The leaves of a tree like the model that are not trained themselves."""
        return tree_of({path: leaf for path, leaf in _leaves(params).items() if path not in self.whole})

    def join(self, trained: Params, frozen: Params, key: Key[Array, ""] | None = None) -> Params:
        """The parameters as `forward` takes them.

        Args:
          key: of dropout in adapters; None: nothing is dropped.
        """
        if not frozen:
            return trained
        found = _leaves(frozen) | {path: leaf_at(trained, path) for path in self.whole}
        for number, (path, matrix) in enumerate(self.adapted):
            assert self.adapters is not None
            keys = None
            if key is not None and self.adapters.dropout:
                keys = jax.random.fold_in(key, number)
                keys = jax.random.split(keys, found[path].shape[0]) if matrix.entry.lead else keys
            a, b = leaf_at(trained, (*path, A)), leaf_at(trained, (*path, B))
            found[path] = LowRank(found[path], a, b, keys, self.adapters.scale, self.adapters.dropout)
        return tree_of(found)

    def _tree(
        self,
        of_leaf: Callable[[LeafPath], Any],
        of_adapter: Callable[[LeafPath, Matrix], Any],
    ) -> Params:
        leaves: dict[LeafPath, Any] = {}
        for path in sorted(self.whole):
            leaves[path] = of_leaf(path)
        for path, matrix in self.adapted:
            leaves[(*path, A)], leaves[(*path, B)] = of_adapter(path, matrix)
        return tree_of(leaves)


def find_trainable(model: ModelConfig, lora: LoraConfig | None, train_only: Sequence[str] = ()) -> Trainable:
    """What is trained of a model.

    Args:
      lora: adapters beside its matrices; None: there are none.
      train_only: leaves that are trained themselves, by parts of the model (language, vision, projector) or
        patterns of their names (layers.mlp.*). Empty: all of them, or with `lora` none.

    Raises:
      UserError: a target or a pattern matches nothing, a matrix would be trained twice, or cannot have
        dropout.
    """
    shapes = abstract_params(model)
    leaves = _leaves(shapes)
    chosen: set[LeafPath] = set()
    for pattern in train_only:
        hits = {path for path in leaves if matches(pattern, path)}
        if not hits:
            raise UserError(f"train_only: no parameter matches {pattern!r}; {_hint(pattern, leaves)}")
        chosen |= hits
    if lora is None:
        return Trainable(model, frozenset(chosen if train_only else leaves))
    targets = find_targets(matrices(shapes, model), lora.targets, lora.parts)
    for matrix in targets:
        for path in matrix.entry.paths:
            if path in chosen:
                raise UserError(
                    f"train_only and lora.targets both name {'.'.join(path)}; leave it out of one of them"
                )
            if path == EMBEDDING and model.tie_embeddings:
                raise UserError(
                    f"lora.targets: {matrix.ends} is the head too (tie_embeddings), where an adapter would "
                    "be another model in PEFT than here; leave it out"
                )
            known = path[-1] in _WITH_DROPOUT and path[-2] in ("attention", "mlp", "projector")
            if lora.dropout and not (known and (model.latent is None or path[-2] != "attention")):
                raise UserError(
                    f"lora.dropout is not known to {matrix.module}; set it to 0, or leave that out"
                )
    return Trainable(model, frozenset(chosen), targets, lora.settings)


def matches(pattern: str, path: LeafPath) -> bool:
    """Whether a leaf is meant: by a part of the model, by how its name begins, or by * and ? in it."""
    if pattern in _PARTS:
        return pattern == (path[0] if path[0] in _PARTS else "language")
    name = ".".join(path)
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _hint(pattern: str, leaves: dict[LeafPath, Any]) -> str:
    names = [*_PARTS, *sorted({".".join(path[:n]) for path in leaves for n in range(1, len(path) + 1)})]
    close = get_close_matches(pattern, names, 1)
    listed = ", ".join(sorted({path[0] for path in leaves}))
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(_PARTS)}, {listed}"


def _leaves(tree: Params) -> dict[LeafPath, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(key.key) for key in path): leaf for path, leaf in found}
