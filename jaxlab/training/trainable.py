"""What of a model is trained: all of it, some of its leaves, adapters beside others; the rest is frozen.

What is trained is a tree of its own: a leaf of the model stands at its place, and in the place of a leaf that
has an adapter {"lora_a": ..., "lora_b": ...}. Optimizer and checkpoints know this tree alone.
"""

import dataclasses
import functools
from collections.abc import Callable
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
from jaxlab.training.patterns import matches, pattern_hint

A, B = "lora_a", "lora_b"
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

    @property
    def names(self) -> list[str]:
        """The dotted names of what is trained."""
        return [".".join(path) for path in _leaves(self.abstract())]

    @property
    def frozen_names(self) -> list[str]:
        """The dotted names of the parameters that are not."""
        return [".".join(path) for path in _leaves(self.frozen(self.shapes))]

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

    def pair(self, trained: Params, path: LeafPath) -> tuple[Any, Any]:
        """a and b of the adapter beside a leaf."""
        return leaf_at(trained, (*path, A)), leaf_at(trained, (*path, B))

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
            a, b = self.pair(trained, path)
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


def find_trainable(
    model: ModelConfig, lora: LoraConfig | None = None, is_frozen: Callable[[str], bool] = lambda name: False
) -> Trainable:
    """What is trained of a model.

    Args:
      lora: adapters beside its matrices, which are trained with the parameters that `lora.also` names, and no
        others.
      is_frozen: without `lora`, whether a parameter stays as it is, by its dotted name.

    Raises:
      UserError: a target or a pattern matches nothing, a matrix would be trained twice, or cannot have
        dropout; or nothing is trained.
    """
    shapes = abstract_params(model)
    names = {".".join(path): path for path in _leaves(shapes)}
    if lora is None:
        whole = frozenset(path for name, path in names.items() if not is_frozen(name))
        if not whole:
            raise UserError("optimizer: every parameter is frozen; raise a learning rate")
        return Trainable(model, whole)
    chosen: set[LeafPath] = set()
    for pattern in lora.also:
        hits = {path for name, path in names.items() if matches(pattern, name)}
        if not hits:
            raise UserError(f"lora.also: no parameter matches {pattern!r}; {pattern_hint(pattern, names)}")
        chosen |= hits
    targets = find_targets(matrices(shapes, model), lora.targets, lora.parts)
    for matrix in targets:
        for path in matrix.entry.paths:
            if path in chosen:
                raise UserError(
                    f"lora.also and lora.targets both name {'.'.join(path)}; leave it out of one of them"
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


def _leaves(tree: Params) -> dict[LeafPath, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(key.key) for key in path): leaf for path, leaf in found}
