"""Injection: an expert's skill into the language model of a VLM.

    LM = base + operator(lambda_v (VLM.LM - base), lambda_e (expert - base))

The operator's weights are (lambda_v, lambda_e), nothing is normalised, and its own lambda is 1, whichever
operator it is. linear is then task_arithmetic; slerp takes the fraction lambda_e / (lambda_v + lambda_e) of
the arc between the two task vectors, lambda_v + lambda_e times as long. Vision tower and projector stay the
VLM's, byte for byte.

It runs in two jitted stages that a search and a single merge share: prepare the task vectors, then weight
them. Numbers, keys and lambdas are traced.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxlab.checkpoints import EMBEDDING, HEAD, Entry, from_hf, leaf_at, to_hf, tree_of
from jaxlab.errors import ConfigError, UserError
from jaxlab.merging.account import MergeAccount
from jaxlab.merging.injection_plan import Embeddings, InjectionPlan, PlannedLeaf, plan_injection
from jaxlab.merging.merge import add_to_base, arithmetic_dtype
from jaxlab.merging.numerics import Mode, Share, difference, kept_count, round_to, tensor_key
from jaxlab.merging.operators import OPERATORS, Operator
from jaxlab.models import Params

TensorWeights = dict[str, Float[Array, " tensors"]]
"""By pattern: a lambda for each tensor."""

Keys = dict[str, UInt32[np.ndarray, "tensors 2"] | UInt32[Array, "tensors 2"]]
Numbers = dict[str, Any]
"""Parameters of an operator that are traced: a scalar, or a `Share` for each of the two task vectors."""

_FIXED = {"lambda": 1.0, "normalize": False}
"""Parameters of operators that an injection does not leave open."""


class Prepared(NamedTuple):
    """One leaf, ready to be weighted; tensors in Hugging Face's shape, stacked."""

    task_vectors: Any
    """What the operator's first stage made of them."""
    base: Float[Array, "tensors ..."]
    numbers: Numbers


@dataclasses.dataclass(frozen=True)
class PatternValue:
    """A value for the tensors whose name matches a pattern."""

    pattern: str
    """Of names in a Hugging Face checkpoint, with * and ?, for example "*.mlp.*"."""
    value: float
    """The value."""


Lambda = float | Float[Array, ""] | Sequence[float] | Sequence[PatternValue | Mapping[str, Any]]
"""A number; a list over layers; or a list of patterns, of which the first that matches decides."""


@dataclasses.dataclass(frozen=True)
class Method:
    """An operator with its parameters, all but the lambdas; hashable. Made by `Method.of`."""

    operator: str
    mode: Mode
    parameters: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, operator: str, mode: Mode = "paper", **parameters: Any) -> "Method":
        """Parameters by name; None is as good as absent, a list has one value for each task vector.

        Raises:
          ConfigError: no such operator; a parameter that it does not have, or must be told, or of a value
            that it cannot have.
        """
        if operator not in OPERATORS:
            raise ConfigError(f"no operator {operator!r}; there are {', '.join(OPERATORS)}", key="operator")
        given = {name: value for name, value in parameters.items() if value is not None}
        known = OPERATORS[operator].for_injection.parameters
        for name in given:
            if name not in known or name in _FIXED:
                raise ConfigError(f"{operator} has none", key=name)
        for name, parameter in known.items():
            if parameter.per_model and name not in given:
                raise ConfigError(
                    f"{operator} needs it: one value, or one for the VLM and one for the expert", key=name
                )
            value = given.get(name)
            if isinstance(value, list | tuple):
                given[name] = value = tuple(value)
                if len(value) not in (1, 2):
                    raise ConfigError(
                        f"one value, or one for the VLM and one for the expert, not {len(value)}", key=name
                    )
            if name in given and (problem := parameter.problem(value)):
                raise ConfigError(problem, key=name)
        return cls(operator, mode, tuple(sorted(given.items())))

    def replace(self, **parameters: Any) -> "Method":
        """The same with other values of parameters; None leaves one as it is."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return Method.of(self.operator, self.mode, **{**dict(self.parameters), **given})

    @property
    def switches(self) -> "Method":
        """What a compiled program depends on: the method without its numbers, which are traced."""
        kept = tuple((name, value) for name, value in self.parameters if isinstance(value, bool))
        return Method(self.operator, self.mode, kept)

    def numbers(self, size: int) -> Numbers:
        """The rest, for tensors of `size` elements."""
        known = OPERATORS[self.operator].for_injection.parameters
        numbers: Numbers = {}
        for name, value in self.parameters:
            if known[name].per_model:
                pair = np.broadcast_to(np.asarray(value, float), 2).tolist()
                numbers[name] = [Share(jnp.float32(x), jnp.int32(kept_count(x, size))) for x in pair]
            elif not isinstance(value, bool):
                numbers[name] = jnp.float32(value)
        return numbers

    def values(self, numbers: Numbers) -> dict[str, Any]:
        """Every parameter of the operator, with its traced numbers."""
        operator = OPERATORS[self.operator].for_injection
        fixed = {name: value for name, value in _FIXED.items() if name in operator.parameters}
        return operator.resolve({**dict(self.parameters), **numbers, **fixed}, 2, self.mode)


def inject(
    vlm_params: Params,
    expert_params: Params,
    base_params: Params,
    *,
    operator: str = "task_arithmetic",
    lambda_v: Lambda = 1.0,
    lambda_e: Lambda = 1.0,
    embeddings: Embeddings = "vlm",
    common_rows: int | None = None,
    seed: int = 0,
    mode: Mode = "paper",
    family: str = "jaxlab",
    **operator_parameters: Any,
) -> tuple[Params, MergeAccount]:
    """The VLM with the expert merged into its language model, in the VLM's dtypes, and the account of every
    tensor.

    Args:
      operator: any of `jaxlab.merging.OPERATORS`; its parameters (density, rescale) by name.
      lambda_v, lambda_e: a number; a list over layers, whose first value is for the embedding and learned
        positions too and whose last for the final norm and the head; or a list of {pattern, value} over names
        as in a Hugging Face checkpoint, where the first match decides and every merged tensor needs one.
      embeddings, common_rows: see `plan_injection`.
      seed: of random masks, which depend on it and on the tensor's name alone.
      family: `ModelConfig.family` of the VLM, whose names and shapes an operator sees.

    Raises:
      UserError: language models that differ, an unknown operator or parameter, lambdas that do not fit.
    """
    method = Method.of(operator, mode, **operator_parameters)
    plan = plan_injection(
        vlm_params, expert_params, base_params, embeddings=embeddings, common_rows=common_rows, family=family
    )
    prepared = prepare_task_vectors(plan, method, vlm_params, expert_params, base_params, seed=seed)
    lambdas = layer_weights(plan, lambda_v), layer_weights(plan, lambda_e)
    return weight_task_vectors(plan, method, vlm_params, prepared, *lambdas), plan.account()


def layer_weights(plan: InjectionPlan, value: Lambda) -> TensorWeights:
    """A lambda of a recipe as one weight for each tensor to be merged, by pattern; a number may be traced."""
    if isinstance(value, list | tuple):
        return {entry.pattern: jnp.asarray(_listed(plan, entry, value), jnp.float32) for entry in plan.merged}
    number = jnp.asarray(value).astype(jnp.float32)
    return {entry.pattern: jnp.broadcast_to(number, (len(entry.names),)) for entry in plan.merged}


def _listed(plan: InjectionPlan, entry: Entry, values: Sequence[Any]) -> list[float]:
    if values and isinstance(values[0], PatternValue | Mapping):
        rules = [
            rule if isinstance(rule, PatternValue) else PatternValue(rule["pattern"], float(rule["value"]))
            for rule in values
        ]
        return [_first_match(name, rules) for name in entry.names]
    if len(values) != plan.num_layers:
        raise UserError(f"a lambda lists {len(values)} values for {plan.num_layers} layers")
    end = values[0] if entry.path[0] in ("embedding", "position") else values[-1]
    return [end if layer is None else values[layer] for layer in entry.layers]


def _first_match(name: str, rules: Sequence[PatternValue]) -> float:
    for rule in rules:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule.value
    raise UserError(f"no pattern of the lambda matches {name}; end the list with the pattern '*'")


def prepare_task_vectors(
    plan: InjectionPlan, method: Method, vlm: Params, expert: Params, base: Params, *, seed: int = 0
) -> dict[str, Prepared]:
    """Task vectors, trimmed or masked, by pattern: all that the lambdas have no part in."""
    merged = [leaf for leaf in plan.leaves if leaf.action == "merged"]
    keys = {p.entry.pattern: np.stack([tensor_key(seed, name) for name in p.entry.names]) for p in merged}
    numbers = {p.entry.pattern: method.numbers(_size(vlm, p)) for p in merged}
    return _prepare(plan, method.switches, vlm, expert, base, keys, numbers)


def weight_task_vectors(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    prepared: dict[str, Prepared],
    lambda_v: TensorWeights,
    lambda_e: TensorWeights,
) -> Params:
    """The VLM with its language model merged by the given weights, element by element."""
    return _weight(plan, method.switches, vlm, prepared, lambda_v, lambda_e)


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def _prepare(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    expert: Params,
    base: Params,
    keys: Keys,
    numbers: dict[str, Numbers],
) -> dict[str, Prepared]:
    operator = OPERATORS[method.operator].for_injection
    result = {}
    for leaf in plan.leaves:
        if leaf.action == "merged":
            x, y, origin = (_merged_part(params, leaf.entry, leaf.rows) for params in (vlm, expert, base))
            own = numbers[leaf.entry.pattern]
            dtype, values = arithmetic_dtype(operator, method.mode, x.dtype), method.values(own)
            one = functools.partial(_prepare_one, operator, method.mode, dtype, values)
            vectors = jax.vmap(one)(x, y, origin, jnp.asarray(keys[leaf.entry.pattern]))
            result[leaf.entry.pattern] = Prepared(vectors, origin, own)
    return result


def _prepare_one(
    operator: Operator,
    mode: Mode,
    dtype: jnp.dtype,
    values: dict[str, Any],
    vlm: Array,
    expert: Array,
    base: Array,
    key: UInt32[Array, "2"],
) -> Any:
    vectors = [difference(model, base, dtype) for model in (vlm, expert)]
    return operator.prepare(vectors, values, mode=mode, dtype=dtype, key=key)


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def _weight(
    plan: InjectionPlan,
    method: Method,
    vlm: Params,
    prepared: dict[str, Prepared],
    lambda_v: TensorWeights,
    lambda_e: TensorWeights,
) -> Params:
    operator = OPERATORS[method.operator].for_injection
    leaves: dict[tuple[str, ...], Any] = {}
    for leaf in plan.leaves:
        entry, stored = leaf.entry, leaf_at(vlm, leaf.entry.path).dtype
        if leaf.action == "merged":
            vectors, base, numbers = prepared[entry.pattern]
            dtype, values = arithmetic_dtype(operator, method.mode, stored), method.values(numbers)
            one = functools.partial(_weight_one, operator, method.mode, dtype, values)
            merged = jax.vmap(one)(vectors, base, lambda_v[entry.pattern], lambda_e[entry.pattern])
            merged = merged.astype(stored)
            if leaf.rows is not None:
                merged = jnp.concatenate([merged, to_hf(vlm, entry)[:, leaf.rows :]], axis=1)
            leaves |= from_hf(merged, entry, vlm)
        else:
            leaves |= {path: leaf_at(vlm, path) for path in entry.paths}
    return tree_of(leaves)


def _weight_one(
    operator: Operator,
    mode: Mode,
    dtype: jnp.dtype,
    values: dict[str, Any],
    vectors: Any,
    base: Array,
    lambda_v: Array,
    lambda_e: Array,
) -> Array:
    weights = [round_to(lambda_v, dtype), round_to(lambda_e, dtype)]
    return add_to_base(base, operator.combine(vectors, weights, values, mode=mode, dtype=dtype))


def _size(params: Params, leaf: PlannedLeaf) -> int:
    """Elements of one tensor of a leaf, as far as it is merged."""
    view = functools.partial(_merged_part, entry=leaf.entry, rows=leaf.rows)
    return int(jax.eval_shape(view, params).size) // len(leaf.entry.names)


def _merged_part(params: Params, entry: Entry, rows: int | None) -> Float[Array, "N ..."]:
    if entry.path == HEAD and "head" not in params:  # tied: the head is the embedding
        return leaf_at(params, EMBEDDING)[None, :rows]
    tensors = jnp.asarray(to_hf(params, entry))
    return tensors if rows is None else tensors[:, :rows]
