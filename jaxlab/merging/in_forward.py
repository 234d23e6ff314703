"""An injection inside the forward pass: each layer's weights are made in the scan over layers, where they
run, so that no merged copy of the layers ever exists, and the loss has a gradient for every layer's lambdas.

It computes what `weight_task_vectors` followed by `forward` computes, with the same operators on the same
prepared task vectors. What stands outside the layers (embedding, final norm, head) is merged first.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.checkpoints import Entry, leaf_at, tree_of
from jaxlab.errors import UserError
from jaxlab.merging.injection import Method, Prepared, TensorWeights, weighted_leaf
from jaxlab.merging.injection_plan import InjectionPlan, PlannedLeaf
from jaxlab.models import Batch, MadeLayers, ModelConfig, Output, Params, forward

STACKS = ("dense_layers", "layers")
"""Names of the stacked layers in the tree of parameters."""

LayerLambdas = Float[Array, "2 L"]
"""(lambda_v, lambda_e) of every layer of the language model."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["vlm", "prepared", "lambdas"],
    meta_fields=["plan", "method"],
)
@dataclasses.dataclass(frozen=True)
class MergedInForward:
    """A VLM, what is to be merged into it, and with which lambdas. A pytree."""

    plan: InjectionPlan
    method: Method
    vlm: Params
    prepared: dict[str, Prepared]
    """Of `prepare_task_vectors`."""
    lambdas: LayerLambdas


def tensor_weights(plan: InjectionPlan, lambdas: Float[Array, " L"]) -> TensorWeights:
    """A lambda for each layer as one for each tensor to be merged, by pattern; what is before the layers has
    the first one's, what is after them the last one's. Differentiable."""
    return {entry.pattern: lambdas[np.array(_layers_of(plan, entry))] for entry in plan.merged}


def _layers_of(plan: InjectionPlan, entry: Entry) -> list[int]:
    end = 0 if entry.path[0] in ("embedding", "position") else plan.num_layers - 1
    return [end if layer is None else layer for layer in entry.layers]


def forward_merged(model: MergedInForward, batch: Batch, config: ModelConfig) -> Output:
    """The output of the VLM with its language model merged, layer by layer as they run.

    Args:
      config: the VLM's; with `remat: layer` a gradient keeps no layer's weights either.

    Raises:
      UserError: the operator makes a model for each task.
    """
    if model.method.of_injection.per_task:
        raise UserError(f"{model.method.operator} makes a model for each task, not one")
    plan, vlm, method = model.plan, model.vlm, model.method.switches
    weights = tuple(tensor_weights(plan, model.lambdas[i]) for i in range(2))
    inside = [leaf for leaf in plan.leaves if leaf.action == "merged" and leaf.entry.path[0] in STACKS]
    patterns = {leaf.entry.pattern for leaf in inside}
    leaves: dict[Any, Any] = {}
    for leaf in plan.leaves:
        if leaf.entry.pattern in patterns:  # its shapes: what the layers hold is not read
            leaves |= {path: leaf_at(vlm, path) for path in leaf.entry.paths}
        else:
            (own,) = weighted_leaf(plan, method, vlm, leaf, model.prepared, *weights)
            leaves |= own
    by_stack: dict[str, list[PlannedLeaf]] = {name: [] for name in STACKS if name in vlm}
    for leaf in inside:
        by_stack[leaf.entry.path[0]].append(leaf)
    counts = {name: jax.tree.leaves(vlm[name])[0].shape[0] for name in by_stack}
    # Only the lambdas are scanned. The tensors are sliced in the layers: XLA copies a scanned input that is
    # reshaped first.
    inputs = {
        name: (
            jnp.arange(count, dtype=jnp.int32),
            [[w[leaf.entry.pattern].reshape(count, -1) for w in weights] for leaf in by_stack[name]],
        )
        for name, count in counts.items()
    }

    def make(stack: str, params: Params, own: Any) -> Params:
        """One layer's parameters: merged, in the shapes and dtypes that it has in the VLM."""
        layer, lambdas = own
        one = {stack: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params)}
        found: dict[Any, Any] = {}
        for leaf, of_leaf in zip(by_stack[stack], lambdas, strict=True):
            pattern = leaf.entry.pattern
            prepared = _of_layer(model.prepared[pattern], layer, of_leaf[0].shape[0])
            as_weights = ({pattern: values} for values in of_leaf)
            (merged,) = weighted_leaf(plan, method, one, leaf, {pattern: prepared}, *as_weights)
            found |= merged
        rest = {
            (stack, *(key.key for key in path)): leaf[None]
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        tree = tree_of({**rest, **found})[stack]
        return jax.tree.map(lambda x: x[0], tree)

    return forward(tree_of(leaves), batch, config, made=MadeLayers(make, inputs))


def _of_layer(whole: Prepared, layer: Int[Array, ""], count: int) -> Prepared:
    """A layer's part of a leaf, which has `count` tensors in each."""
    part = lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), layer * count, count)
    vectors, base, given = jax.tree.map(
        part, (whole.task_vectors, whole.base, whole.given._replace(totals=None))
    )
    return Prepared(vectors, base, whole.numbers, given._replace(totals=whole.given.totals))
