"""Injection: an expert's skill into the language model of a VLM.

    LM = base + operator(lambda_v (VLM.LM - base), lambda_e (expert - base))

The operator's weights are (lambda_v, lambda_e), nothing is normalised, and its own lambda is 1, whichever
operator it is. linear is then task_arithmetic; slerp takes the fraction lambda_e / (lambda_v + lambda_e) of
the arc between the two task vectors, lambda_v + lambda_e times as long. Vision tower and projector stay the
VLM's, byte for byte.

It runs in two jitted stages that a search and a single merge share: prepare the task vectors, then weight
them. Numbers, keys and lambdas are traced.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxlab.checkpoints import EMBEDDING, HEAD, Entry, SameTokens, from_hf, leaf_at, to_hf, tree_of
from jaxlab.merging.account import MergeAccount
from jaxlab.merging.injection_plan import Embeddings, InjectionPlan, PlannedLeaf, plan_injection
from jaxlab.merging.merge import add_to_base, arithmetic_dtype, each_tensor, gather_totals, statistics_of
from jaxlab.merging.method import Method as Method
from jaxlab.merging.method import Numbers
from jaxlab.merging.numbers import Rule, Scalar, Setting
from jaxlab.merging.numerics import Mode, difference
from jaxlab.merging.random_masks import tensor_key
from jaxlab.merging.schedules import Place, check_rules, value_at
from jaxlab.merging.vocabulary import CommonRows
from jaxlab.models import Params

TensorWeights = dict[str, Float[Array, " tensors"]]
"""By pattern: a lambda for each tensor."""

TASKS = ("vlm", "expert")
"""What the models are called that an operator makes for each task."""


class Given(NamedTuple):
    """What an operator may ask for beside the tensors of a leaf; stacked as they are."""

    key: Any
    """uint32[tensors, 2]"""
    layer: Any
    """int32[tensors], -1 outside of layers"""
    statistics: Any
    totals: Any
    """One for all tensors."""


class Prepared(NamedTuple):
    """One leaf, ready to be weighted; tensors in Hugging Face's shape, stacked."""

    task_vectors: Any
    """What the operator's first stage made of them."""
    base: Float[Array, "tensors ..."]
    numbers: Numbers
    given: Given


Lambda = Scalar | Float[Array, ""] | Sequence[Scalar] | Sequence[Rule | Mapping[str, Any]]
"""A number; a gradient over layers; or a list of patterns, of which the first that matches decides."""


def inject(
    vlm_params: Params,
    expert_params: Params,
    base_params: Params,
    *,
    operator: str = "task_arithmetic",
    lambda_v: Lambda = 1.0,
    lambda_e: Lambda = 1.0,
    embeddings: Embeddings = "vlm",
    common_rows: SameTokens | int | None = None,
    seed: int = 0,
    mode: Mode = "paper",
    family: str = "jaxlab",
    statistics: Mapping[str, Any] | None = None,
    **operator_parameters: Any,
) -> tuple[Any, MergeAccount]:
    """The VLM with the expert merged into its language model, in the VLM's dtypes, and the account of every
    tensor.

    Args:
      operator: any of `jaxlab.merging.OPERATORS`; its parameters (density, rescale) by name.
      lambda_v, lambda_e: a number; a gradient over layers, a list whose first value is for the embedding and
        learned positions too and whose last for the final norm and the head; or a list of {pattern, value}
        over names as in a Hugging Face checkpoint, where the first match decides and every merged tensor
        needs one.
      embeddings, common_rows: see `plan_injection`.
      seed: of random masks, which depend on it and on the tensor's name alone.
      family: `ModelConfig.family` of the VLM, whose names and shapes an operator sees.
      statistics: of data, by the tensor's name, for operators that need them.

    Returns:
      The model, or of operators that make one for each task {"vlm": one, "expert": the other}; the account.

    Raises:
      UserError: language models that differ, an unknown operator or parameter, lambdas that do not fit.
    """
    method = Method.of(operator, mode, **operator_parameters)
    plan = plan_injection(
        vlm_params, expert_params, base_params, embeddings=embeddings, common_rows=common_rows, family=family
    )
    prepared = prepare_task_vectors(
        plan, method, vlm_params, expert_params, base_params, seed=seed, statistics=statistics
    )
    lambdas = layer_weights(plan, lambda_v), layer_weights(plan, lambda_e)
    return weight_task_vectors(plan, method, vlm_params, prepared, *lambdas), plan.account()


def inject_tensor(
    method: Method,
    numbers: Numbers,
    models: Sequence[Float[Array, "*shape"]],
    base: Float[Array, "*shape"],
    lambdas: Sequence[Float[Array, ""]],
    given: Given,
    *,
    num_layers: int,
    offset: int | UInt32[Array, "2"] = 0,
) -> Any:
    """One tensor of an injection, float32: what `inject` makes of it, bit for bit.

    Args:
      method, numbers: `Method.switches` and `Method.numbers` of the whole tensor.
      models: of the VLM and of the expert; their dtype is the one that mode mergekit rounds to.
      given: of this tensor, not stacked.
      offset: see `merge_tensors`.

    Returns:
      The merged tensor; of operators that make a model for each task a list.
    """
    operator, values = method.of_injection, method.values(numbers)
    dtype = arithmetic_dtype(operator, method.mode, models[0].dtype)
    supplied = {**_supplied(num_layers, method, dtype, given), "offset": offset}
    vectors = [difference(model, base, dtype) for model in models]
    prepared = operator.prepare(vectors, values, **supplied)
    return _weighted(method, values, supplied, prepared, base, lambdas)


def layer_weights(plan: InjectionPlan, value: Lambda) -> TensorWeights:
    """A lambda of a recipe as one weight for each tensor to be merged, by pattern; a number may be traced."""
    if isinstance(value, list | tuple):
        names = [name for entry in plan.merged for name in entry.names]
        kept = [leaf for leaf in plan.leaves if leaf.action != "merged"]
        copied = {name: leaf.reason for leaf in kept for name in leaf.entry.names}
        check_rules("the lambda", Setting.of(value), names, copied, {}, "vlm")
        return {entry.pattern: jnp.asarray(_listed(plan, entry, value), jnp.float32) for entry in plan.merged}
    number = jnp.asarray(value).astype(jnp.float32)
    return {entry.pattern: jnp.broadcast_to(number, (len(entry.names),)) for entry in plan.merged}


def _listed(plan: InjectionPlan, entry: Entry, values: Sequence[Any]) -> list[float]:
    before = entry.path[0] in ("embedding", "position")
    places = (
        Place(name, layer, plan.num_layers, before)
        for name, layer in zip(entry.names, entry.layers, strict=True)
    )
    setting = Setting.of(values)
    return [value_at("the lambda", setting, place) for place in places]


def prepare_task_vectors(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    expert: Params,
    base: Params,
    *,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
) -> dict[str, Prepared]:
    """Task vectors, trimmed or masked, by pattern: all that the lambdas have no part in.

    Raises:
      UserError: statistics that the operator needs are missing.
    """
    given, numbers = given_to_leaves(plan, method, vlm, expert, base, seed=seed, statistics=statistics)
    return _prepare(plan, method.switches, vlm, expert, base, given, numbers)


def given_to_leaves(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    expert: Params,
    base: Params,
    *,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Given], dict[str, Numbers]]:
    """What an operator may ask for, and its numbers, by the pattern of every leaf that is merged."""
    operator = method.of_injection
    given, numbers = {}, {}
    for leaf in plan.leaves:
        if leaf.action == "merged":
            entry = leaf.entry
            given[entry.pattern] = Given(
                np.stack([tensor_key(seed, name) for name in entry.names]),
                np.array([-1 if layer is None else layer for layer in entry.layers], np.int32),
                statistics_of(operator, statistics, entry.names),
                None,
            )
            numbers[entry.pattern] = method.numbers(_size(vlm, leaf))
    if operator.gather is not None:
        measure = functools.partial(_measure, plan, method.switches, vlm, expert, base, given, numbers)
        totals = gather_totals(operator.gather, measure, method.chosen)
        given = {pattern: own._replace(totals=totals) for pattern, own in given.items()}
    return given, numbers


def weight_task_vectors(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    prepared: dict[str, Prepared],
    lambda_v: TensorWeights,
    lambda_e: TensorWeights,
) -> Any:
    """The VLM with its language model merged by the given weights; of operators that make a model for each
    task {"vlm": one, "expert": the other}.
    """
    return _weight(plan, method.switches, vlm, prepared, lambda_v, lambda_e)


def _task_vectors(
    leaves: Sequence[PlannedLeaf], method: Method, vlm: Params, expert: Params, base: Params
) -> Iterator[tuple[str, list[Array], Array, jnp.dtype]]:
    """By leaf that is merged: its pattern, stacked task vectors, the base and the dtype to compute in."""
    for leaf in leaves:
        if leaf.action == "merged":
            trees = enumerate((vlm, expert, base))
            x, y, origin = (_merged_part(params, leaf.entry, leaf.rows, i) for i, params in trees)
            dtype = arithmetic_dtype(method.of_injection, method.mode, x.dtype)
            yield leaf.entry.pattern, [difference(m, origin, dtype) for m in (x, y)], origin, dtype


def _stacked(method: Method, function: Callable[..., Any], given: Given, *arrays: Any) -> Any:
    """The function for each tensor of a leaf, given what belongs to it."""
    totals = given.totals  # one for all
    stacked = jax.tree.map(jnp.asarray, given._replace(totals=None))
    one = lambda own, *rest: function(own._replace(totals=totals), *rest)
    apply = each_tensor(method.of_injection, method.mode, dict(method.parameters))
    return apply(one, stacked, *arrays)


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def _measure(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    expert: Params,
    base: Params,
    given: dict[str, Given],
    numbers: dict[str, Numbers],
    totals: Any,
) -> list[Any]:
    """One round of what an operator on whole models gathers, leaf by leaf, each stacked by tensor."""
    operator, result = method.of_injection, []
    for pattern, vectors, _, dtype in _task_vectors(plan.leaves, method, vlm, expert, base):
        values = method.values(numbers[pattern])

        def one(own: Given, *vectors: Array, values: Any = values, dtype: Any = dtype) -> Any:
            supplied = {"dtype": dtype, "statistics": own.statistics, "totals": totals}
            return operator.measure(list(vectors), values, **supplied)

        result.append(_stacked(method, one, given[pattern], *vectors))
    return result


def prepared_leaves(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    expert: Params,
    base: Params,
    given: dict[str, Given],
    numbers: dict[str, Numbers],
    *,
    leaves: Sequence[PlannedLeaf] | None = None,
) -> dict[str, Prepared]:
    """The operator's first stage, by pattern; of some leaves, or of all."""
    operator, result = method.of_injection, {}
    leaves = plan.leaves if leaves is None else leaves
    for pattern, vectors, origin, dtype in _task_vectors(leaves, method, vlm, expert, base):
        values = method.values(numbers[pattern])

        def one(own: Given, *vectors: Array, values: Any = values, dtype: Any = dtype) -> Any:
            return operator.prepare(list(vectors), values, **_supplied(plan.num_layers, method, dtype, own))

        prepared = _stacked(method, one, given[pattern], *vectors)
        result[pattern] = Prepared(prepared, origin, numbers[pattern], given[pattern])
    return result


_prepare = jax.jit(prepared_leaves, static_argnames=("plan", "method"))


def _supplied(num_layers: int, method: Method, dtype: jnp.dtype, given: Given) -> dict[str, Any]:
    own = given._asdict()
    return {"mode": method.mode, "dtype": dtype, "num_layers": num_layers, **own}


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def _weight(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    prepared: dict[str, Prepared],
    lambda_v: TensorWeights,
    lambda_e: TensorWeights,
) -> Any:
    per_task = method.of_injection.per_task
    models: list[dict[tuple[str, ...], Any]] = [{} for _ in range(2 if per_task else 1)]
    for leaf in plan.leaves:
        merged = weighted_leaf(plan, method, vlm, leaf, prepared, lambda_v, lambda_e)
        for leaves, own in zip(models, merged, strict=True):
            leaves |= own
    trees = [tree_of(leaves) for leaves in models]
    return dict(zip(TASKS, trees, strict=True)) if per_task else trees[0]


def weighted_leaf(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    leaf: PlannedLeaf,
    prepared: dict[str, Prepared],
    lambda_v: TensorWeights,
    lambda_e: TensorWeights,
) -> list[dict[tuple[str, ...], Any]]:
    """The leaves of ours that hold one planned leaf's tensors, merged or copied, by path; of operators that
    make a model for each task one dict for each.

    Args:
      vlm: the VLM; of a leaf that is merged whole, shapes and dtypes are enough.
    """
    entry, operator = leaf.entry, method.of_injection
    count = 2 if operator.per_task else 1
    if leaf.action != "merged":
        return [{path: leaf_at(vlm, path) for path in entry.paths}] * count
    stored = leaf_at(vlm, entry.path).dtype
    vectors, base, numbers, given = prepared[entry.pattern]
    dtype = arithmetic_dtype(operator, method.mode, stored)
    one = functools.partial(_weight_one, plan, method, method.values(numbers), dtype)
    merged = _stacked(method, one, given, vectors, base, lambda_v[entry.pattern], lambda_e[entry.pattern])
    result = []
    for tensors in merged if operator.per_task else [merged]:
        tensors = tensors.astype(stored)
        if leaf.rows is not None:
            tensors = jnp.asarray(to_hf(vlm, entry)).at[:, leaf.rows.index(0)].set(tensors)
        result.append(from_hf(tensors, entry, vlm))
    return result


def _weight_one(
    plan: InjectionPlan,
    method: Method,
    values: dict[str, Any],
    dtype: jnp.dtype,
    given: Given,
    vectors: Any,
    base: Array,
    lambda_v: Array,
    lambda_e: Array,
) -> Any:
    supplied = _supplied(plan.num_layers, method, dtype, given)
    return _weighted(method, values, supplied, vectors, base, [lambda_v, lambda_e])


def _weighted(
    method: Method,
    values: dict[str, Any],
    supplied: Mapping[str, Any],
    prepared: Any,
    base: Array,
    lambdas: Sequence[Array],
) -> Any:
    """What was prepared with its lambdas: the merged tensor."""
    operator = method.of_injection
    weights = operator.rounded(lambdas, supplied["dtype"])
    origin = base.astype(jnp.float32)
    merged = operator.combine(prepared, weights, values, **{**supplied, "base": origin})
    if operator.makes_tensor:
        return merged
    if operator.per_task:
        return [add_to_base(base, one) for one in merged]
    return add_to_base(base, merged)


def _size(params: Params, leaf: PlannedLeaf) -> int:
    """Elements of one tensor of a leaf, as far as it is merged."""
    view = functools.partial(_merged_part, entry=leaf.entry, rows=leaf.rows, model=0)
    return int(jax.eval_shape(view, params).size) // len(leaf.entry.names)


def merged_tensors(params: Params, leaf: PlannedLeaf, model: int) -> Float[Array, "N ..."]:
    """The tensors of one model that go into a leaf, as far as they are merged, as a folder has them.

    Args:
      model: which of the plan's inputs it is.
    """
    return _merged_part(params, leaf.entry, leaf.rows, model)


def _merged_part(params: Params, entry: Entry, rows: CommonRows | None, model: int) -> Float[Array, "N ..."]:
    if entry.path == HEAD and "head" not in params:  # tied: the head is the embedding
        tensors = leaf_at(params, EMBEDDING)[None]
    else:
        tensors = jnp.asarray(to_hf(params, entry))
    return tensors if rows is None else tensors[:, rows.index(model)]
