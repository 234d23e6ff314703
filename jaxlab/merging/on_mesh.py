"""Merging on the devices of a mesh, for models that one device does not hold: each is read straight to the
places of its parts, and the merged one stays there, placed as the models are.

Every leaf is one compiled program in which an operator that works element by element is one loop: no device
sees another's elements, and nothing is held beside the inputs and the output.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from jaxlab.checkpoints import LeafPath, OpenModel, leaf_at, same_tokens, tree_of
from jaxlab.errors import UserError
from jaxlab.merging.account import MergeAccount
from jaxlab.merging.architecture import check_same_architecture
from jaxlab.merging.injection import (
    Given,
    Lambda,
    Method,
    Numbers,
    given_to_leaves,
    layer_weights,
    prepared_leaves,
    weighted_leaf,
)
from jaxlab.merging.injection_plan import Embeddings, InjectionPlan, PlannedLeaf, plan_injection
from jaxlab.merging.merge import Placement, merge_models, placed, placement_of
from jaxlab.merging.numerics import Mode, rounding_by
from jaxlab.merging.recipe import InjectRecipe, Recipe, injection_options
from jaxlab.models import Params, param_shardings


def merge_on_mesh(recipe: Recipe, models: Sequence[OpenModel], mesh: Mesh) -> tuple[Params, MergeAccount]:
    """What a recipe makes of its models, opened in the order of `recipe.references()`: parameters on the mesh
    with the bits of `write_merge`, for `generate`, `evaluate` and a search; and the account.

    Args:
      mesh: of `make_mesh`.

    Raises:
      UserError: models that are damaged or cannot be merged; a recipe that only a plan can carry out, with
        several experts or parameters that are not the same for all tensors.
    """
    check_same_architecture(models)
    read = [model.read(shardings=param_shardings(model.config, mesh)) for model in models]
    first = models[0]
    if isinstance(recipe, InjectRecipe):
        return inject_on_mesh(
            *read,
            operator=recipe.operator,
            lambda_v=recipe.lambda_v,
            lambda_e=recipe.lambda_e,
            embeddings=recipe.embeddings,
            common_rows=same_tokens([model.tokenizer for model in models]),
            seed=recipe.seed,
            mode=recipe.mode,
            family=first.config.family,
            **injection_options(recipe),
        )
    weights = list(recipe.weights().values())
    options = recipe.options()
    for name, value in {"weight": weights, **options}.items():
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(isinstance(number, tuple) for number in numbers):
            raise UserError(f"{name} is not the same for all tensors; only `merge` to a folder can do that")
    given: dict[str, Any] = {"weight": weights} if weights else {}
    given |= {k: list(v.values()) if isinstance(v, dict) else v for k, v in options.items()}
    return merge_models(
        recipe.operator,
        read if recipe.base is None else read[:-1],
        base=None if recipe.base is None else read[-1],
        mode=recipe.mode,
        seed=recipe.seed,
        family=first.config.family,
        **given,
    )


def inject_on_mesh(
    vlm: Params,
    expert: Params,
    base: Params,
    *,
    operator: str = "task_arithmetic",
    lambda_v: Lambda = 1.0,
    lambda_e: Lambda = 1.0,
    embeddings: Embeddings = "vlm",
    common_rows: Any = None,
    seed: int = 0,
    mode: Mode = "paper",
    family: str = "jaxlab",
    statistics: Mapping[str, Any] | None = None,
    **operator_parameters: Any,
) -> tuple[Params, MergeAccount]:
    """`inject`, with its bits, leaf by leaf: task vectors of one leaf at a time exist, if at all. The result
    lies where the VLM does. What is not named below is as for `inject`.

    Args:
      vlm, expert, base: parameters on a mesh (`OpenModel.read(shardings=)`), or anywhere.

    Raises:
      UserError: as for `inject`.
    """
    method = Method.of(operator, mode, **operator_parameters)
    method.check_one_model()
    plan = plan_injection(vlm, expert, base, embeddings=embeddings, common_rows=common_rows, family=family)
    given, numbers = given_to_leaves(plan, method, vlm, expert, base, seed=seed, statistics=statistics)
    weights = layer_weights(plan, lambda_v), layer_weights(plan, lambda_e)
    placement = placement_of(vlm)
    leaves: dict[LeafPath, Any] = {}
    for leaf in plan.leaves:
        if leaf.action != "merged":
            leaves |= {path: leaf_at(vlm, path) for path in leaf.entry.paths}
            continue
        pattern = leaf.entry.pattern
        own = tuple(lambdas[pattern] for lambdas in weights)
        models = (vlm, expert, base)
        mine = given[pattern], numbers[pattern]
        leaves |= inject_leaf(plan, method.switches, leaf, placement, models, *mine, own, np.uint32(0))
    return tree_of(leaves), plan.account()


@functools.partial(jax.jit, static_argnames=("plan", "method", "leaf", "placement"))
def inject_leaf(
    plan: InjectionPlan,
    method: Method,
    leaf: PlannedLeaf,
    placement: Placement,
    models: tuple[Params, Params, Params],
    given: Given,
    numbers: Numbers,
    lambdas: tuple[Array, Array],
    zero: UInt32[Array, ""],
) -> dict[LeafPath, Array]:
    """One leaf of an injection; of the models it takes what it needs."""
    pattern = leaf.entry.pattern
    with rounding_by(zero):
        prepared = prepared_leaves(plan, method, *models, {pattern: given}, {pattern: numbers}, leaves=[leaf])
        weights = ({pattern: one} for one in lambdas)
        (merged,) = weighted_leaf(plan, method, models[0], leaf, prepared, *weights)
    return placed(merged, placement)
