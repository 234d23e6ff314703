"""From a recipe's data group to the statistics that its operator takes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.checkpoints import EMBEDDING, HEAD, Entry, entries, from_hf, leaf_at, tree_of
from jaxlab.errors import UserError
from jaxlab.losses import target_mask
from jaxlab.merging.memory import run_in_memory
from jaxlab.merging.operators.data import learn_coefficients
from jaxlab.merging.plan import Input, MergePlan
from jaxlab.merging.recipe import MergeRecipe, Recipe
from jaxlab.merging.statistics import (
    MergeData,
    Statistics,
    by_name,
    gradient_statistics,
    gram_matrices,
    of_tensors,
    text_batches,
)
from jaxlab.models import Batch, ModelConfig, Params, forward


class Measured(NamedTuple):
    """The models of a merge in memory, without the base, each with the texts of its task."""

    plan: MergePlan
    inputs: Sequence[Input]
    models: list[Params]
    configs: list[ModelConfig]
    batches: list[list[Batch]]
    base: int | None
    """Which input is the base."""
    data: MergeData
    seed: int

    def known(self, params: Params) -> tuple[Entry, ...]:
        """The tensors of a language model under the names of the first model."""
        parts = {name: leaf for name, leaf in params.items() if name not in ("vision", "projector")}
        return entries(parts, self.inputs[0].found.family)

    def read_base(self, operator: str) -> Params:
        """The base in memory.

        Raises:
          UserError: there is none.
        """
        if self.base is None:
            raise UserError(f"{operator} measures at the base, and there is none")
        return self.inputs[self.base].model.read()


def measure_statistics(
    recipe: Recipe, plan: MergePlan, inputs: Sequence[Input], data: MergeData
) -> Statistics:
    """What the recipe's operator takes, measured on its data: fisher, regmean, regmean_plusplus, adamerging,
    trust_region.

    Raises:
      UserError: data that cannot be read or do not fit; an operator that none of these is.
    """
    name = recipe.operator.partition("+")[0]
    if name not in _MEASURES:
        known = ", ".join(_MEASURES)
        raise UserError(f"{name} is not measured on data here ({known} are); give it statistics: file")
    with_base = not isinstance(recipe, MergeRecipe) or recipe.base is not None
    models = list(inputs[:-1] if with_base else inputs)
    batches = [text_batches(one.model, data, data.file_of(one.role)) for one in models]
    measured = Measured(
        plan,
        inputs,
        [one.model.read() for one in models],
        [one.model.config for one in models],
        batches,
        len(models) if with_base else None,
        data,
        recipe.seed,
    )
    return _MEASURES[name](measured)


def _with_head(known: Sequence[Entry], found: dict[str, Any], first: Input) -> dict[str, Any]:
    """A head that is the embedding has what the embedding has."""
    heads = [kind for kind in first.found.kinds if kind.path == HEAD]
    if heads and heads[0].names[0] not in found:
        embedding = next(entry for entry in known if entry.path == EMBEDDING)
        found[heads[0].names[0]] = found[embedding.names[0]]
    return found


def _fisher(m: Measured) -> Statistics:
    each = []
    for params, config, batches in zip(m.models, m.configs, m.batches, strict=True):
        diagonal = gradient_statistics(params, config, batches, squared=True, seed=m.seed)
        known = m.known(params)
        each.append(_with_head(known, by_name(diagonal, known), m.inputs[0]))
    return of_tensors(m.plan, each)


def _trust_region(m: Measured) -> Statistics:
    base = m.read_base("trust_region")
    config, each = m.inputs[-1].model.config, []
    for batches in m.batches:
        gradient = gradient_statistics(base, config, batches, squared=False)
        known = m.known(base)
        each.append(_with_head(known, by_name(gradient, known), m.inputs[0]))
    return of_tensors(m.plan, each)


def _regmean(m: Measured) -> Statistics:
    each = []
    for params, config, batches in zip(m.models, m.configs, m.batches, strict=True):
        each.append(gram_matrices(params, config, batches, m.known(params)))
    return of_tensors(m.plan, each)


def _regmean_plusplus(m: Measured) -> Statistics:
    """Layer by layer: the inputs of a layer are those behind the merged layers before it."""
    tensors = [by_name(params, m.known(params)) for params in m.models]
    grams: list[dict[str, Any]] = [{} for _ in m.models]
    merging = [tensor for tensor in m.plan.tensors if tensor.merging is not None]
    first = m.inputs[0].holders[EMBEDDING].names[0]
    steps: list[tuple[int | None, list[str]]] = [(None, [first])]
    for number in range(m.plan.num_layers):
        names = [t.name for t in merging if t.merging is not None and t.merging.layer == number]
        steps.append((number, names))
    for layer, names in steps:
        for i, (params, config, batches) in enumerate(zip(m.models, m.configs, m.batches, strict=True)):
            if layer is not None:
                known = m.known(params)
                tree = _with_tensors(params, known, tensors[i])
                grams[i] |= gram_matrices(tree, config, batches, known, layers=[layer])
        part = [tensor for tensor in merging if tensor.name in names]
        if part:
            sub = dataclasses.replace(m.plan, tensors=tuple(part), refused=())
            done = run_in_memory(sub, m.inputs, statistics=of_tensors(sub, grams))
            for own in tensors:
                own |= {n: x for n, x in done.items() if n in own and own[n].shape == x.shape}
    for i, (params, config, batches) in enumerate(zip(m.models, m.configs, m.batches, strict=True)):
        tree = _with_tensors(params, m.known(params), tensors[i])
        head = [entry for entry in m.known(params) if entry.path == HEAD]
        grams[i] |= gram_matrices(tree, config, batches, head)
    return of_tensors(m.plan, grams)


def _with_tensors(params: Params, known: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> Params:
    """The tree with these tensors in place of its own."""
    leaves = {
        tuple(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for entry in known:
        stacked = np.stack([tensors[name] for name in entry.names])
        leaves |= {path: jnp.asarray(leaf) for path, leaf in from_hf(stacked, entry, params).items()}
    return tree_of(leaves)


def _adamerging(m: Measured) -> Statistics:
    """For each task and layer its coefficient, and one for all that stands in no layer: where the merged
    model's predictions on all texts have the least entropy (arXiv 2310.02575, layer-wise).
    """
    base, layers = m.read_base("adamerging"), m.plan.num_layers
    first, config = m.models[0], m.configs[0]
    planned = {tensor.name: tensor for tensor in m.plan.tensors}
    merged = []
    for entry in m.known(first):
        step = planned[entry.names[0]].merging
        if step is None or entry.path in (EMBEDDING, HEAD):
            continue
        at = np.array([layers if layer is None else layer for layer in entry.layers])
        weights = np.array([planned[name].merging.weights for name in entry.names], np.float32)  # type: ignore[union-attr]
        for path in entry.paths:
            lead = leaf_at(first, path).shape[: entry.lead]
            merged.append((path, at.reshape(lead), weights.reshape(*lead, -1)))

    def model(coefficients: Float[Array, "models layers"]) -> Params:
        leaves = {
            tuple(str(key.key) for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(first)
        }
        for path, at, weights in merged:
            origin = leaf_at(base, path).astype(jnp.float32)
            total = origin
            for i, params in enumerate(m.models):
                factor = coefficients[i][at] * weights[..., i]
                spread = factor.reshape(*at.shape, *(1,) * (origin.ndim - at.ndim))
                total = total + spread * (leaf_at(params, path).astype(jnp.float32) - origin)
            leaves[path] = total.astype(leaf_at(first, path).dtype)
        return tree_of(leaves)

    def loss(coefficients: Float[Array, "models layers"]) -> Float[Array, ""]:
        params, total, count = model(coefficients), jnp.float32(0), jnp.float32(0)
        for batches in m.batches:
            for batch in batches:
                log_p = jax.nn.log_softmax(forward(params, batch, config)[0][:, :-1], axis=-1)
                mask = target_mask(batch)
                total += jnp.sum(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), where=mask)
                count += jnp.sum(mask, dtype=jnp.float32)
        return total / jnp.maximum(count, 1.0)

    start = [[0.3] * (layers + 1)] * len(m.models)
    learn = jax.jit(
        lambda: learn_coefficients(loss, start, steps=m.data.steps, learning_rate=m.data.learning_rate)
    )
    found = np.asarray(learn())
    at_layer = lambda step: layers if step.layer is None else step.layer
    return {
        tensor.name: [found[i][at_layer(tensor.merging)] for i in range(len(m.models))]
        for tensor in m.plan.tensors
        if tensor.merging is not None
    }


_MEASURES: dict[str, Callable[[Measured], Statistics]] = {
    "fisher": _fisher,
    "regmean": _regmean,
    "regmean_plusplus": _regmean_plusplus,
    "adamerging": _adamerging,
    "trust_region": _trust_region,
}
