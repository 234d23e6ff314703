"""Injection: an expert's skill into the language model of a VLM.

    LM = base + operator(lambda_v (VLM.LM - base), lambda_e (expert - base))

The operator's weights are (lambda_v, lambda_e), nothing is normalised, and its own lambda is 1, whichever
operator it is. linear is then task_arithmetic; slerp takes the fraction lambda_e / (lambda_v + lambda_e) of
the arc between the two task vectors, lambda_v + lambda_e times as long. Vision tower and projector stay the
VLM's, byte for byte.
"""

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxlab.checkpoints.names import HEAD, Entry, from_hf, leaf_at, to_hf, tree_of
from jaxlab.errors import ConfigError, UserError
from jaxlab.merging.account import Account
from jaxlab.merging.arithmetic import Mode, difference, step
from jaxlab.merging.operators import OPERATORS, Operator, Prepared, Settings, add_to_base, settings_for
from jaxlab.merging.plan import Embeddings, Plan, plan_injection
from jaxlab.merging.randomness import tensor_key

Params = dict[str, Any]
Weights = dict[str, Float[Array, " N"]]
"""By pattern: a lambda for each tensor."""

Keys = dict[str, UInt32[np.ndarray, "N 2"] | UInt32[Array, "N 2"]]


@dataclass(frozen=True)
class PatternValue:
    """A value for the tensors whose name matches a pattern."""

    pattern: str
    """Of names in a Hugging Face checkpoint, with * and ?, for example "*.mlp.*"."""
    value: float
    """The value."""


Lambda = float | Float[Array, ""] | Sequence[float] | Sequence[PatternValue | Mapping[str, Any]]
"""A number; a list over layers; or a list of patterns, of which the first that matches decides."""

Density = float | tuple[float, ...]
"""Of both task vectors, or of each."""


@dataclass(frozen=True)
class Method:
    """An operator and those of its parameters that weights have no part in; hashable."""

    operator: str = "task_arithmetic"
    density: Density | None = None
    rescale: bool | None = None
    mode: Mode = "paper"

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ConfigError(
                f"no operator {self.operator!r}; there are {', '.join(OPERATORS)}", key="operator"
            )
        known = OPERATORS[self.operator].parameters
        for name in ("density", "rescale"):
            if getattr(self, name) is not None and name not in known:
                raise ConfigError(f"{self.operator} has none", key=name)
        if "density" in known and self.density is None:
            raise ConfigError(
                f"{self.operator} needs it: the share of each task vector that is kept", key="density"
            )
        densities = self.density if isinstance(self.density, tuple) else (self.density,)
        if len(densities) not in (1, 2):
            raise ConfigError(
                f"one value, or one for the VLM and one for the expert, not {len(densities)}", key="density"
            )
        if any(density is not None and not 0 <= density <= 1 for density in densities):
            raise ConfigError(f"must be between 0 and 1, is {self.density}", key="density")

    def settings(self, stored: jnp.dtype) -> Settings:
        given = {"density": self.density, "rescale": self.rescale}
        parameters = {name: value for name, value in given.items() if value is not None}
        return settings_for(self.operator, 2, self.mode, stored, parameters)._replace(normalize=False)


Tensors = dict[str, tuple[Prepared, Float[Array, "N ..."]]]
"""By pattern: prepared task vectors, and the base, in Hugging Face's shape."""


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
    **operator_parameters: Any,
) -> tuple[Params, Account]:
    """The VLM with the expert merged into its language model, in the VLM's dtypes, and the account of every
    tensor.

    Args:
      operator: any of `jaxlab.merging.OPERATORS`; its parameters (density, rescale) by name.
      lambda_v, lambda_e: a number; a list over layers, whose first value is for the embedding and learned
        positions too and whose last for the final norm and the head; or a list of {pattern, value} over names
        as in a Hugging Face checkpoint, where the first match decides and every merged tensor needs one.
      embeddings, common_rows: see `plan_injection`.
      seed: of random masks, which depend on it and on the tensor's name alone.

    Raises:
      UserError: language models that differ, an unknown operator or parameter, lambdas that do not fit.
    """
    for name in operator_parameters:
        if name not in ("density", "rescale"):
            raise UserError(f"an injection has no operator parameter {name!r}; it has density and rescale")
    density = operator_parameters.pop("density", None)
    density = tuple(density) if isinstance(density, list) else density
    method = Method(operator, density, mode=mode, **operator_parameters)
    plan = plan_injection(
        vlm_params, expert_params, base_params, embeddings=embeddings, common_rows=common_rows
    )
    tensors = prepare(plan, method, vlm_params, expert_params, base_params, tensor_keys(plan, seed))
    lambdas = layer_weights(plan, lambda_v), layer_weights(plan, lambda_e)
    return combine(plan, method, vlm_params, tensors, *lambdas), plan.account()


def tensor_keys(plan: Plan, seed: int) -> Keys:
    """The random keys of the tensors to be merged, by pattern."""
    return {
        entry.pattern: np.stack([tensor_key(seed, name) for name in entry.names]) for entry in plan.merged
    }


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def prepare(plan: Plan, method: Method, vlm: Params, expert: Params, base: Params, keys: Keys) -> Tensors:
    """Task vectors, trimmed or masked: all that the lambdas have no part in. Once for every density of a
    search.
    """
    result = {}
    for piece in plan.pieces:
        if piece.action == "merged":
            x, y, origin = (_tensors(params, piece.entry)[:, : piece.rows] for params in (vlm, expert, base))
            settings = method.settings(x.dtype)
            one = functools.partial(_prepare_one, OPERATORS[method.operator], settings)
            words = jnp.asarray(keys[piece.entry.pattern])
            result[piece.entry.pattern] = (jax.vmap(one)(x, y, origin, words), origin)
    return result


def _prepare_one(
    operator: Operator, settings: Settings, vlm: Array, expert: Array, base: Array, key: UInt32[Array, "2"]
) -> Prepared:
    vectors = [difference(model, base, settings.dtype) for model in (vlm, expert)]
    return operator.prepare(vectors, settings, key, None)


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def combine(
    plan: Plan, method: Method, vlm: Params, tensors: Tensors, lambda_v: Weights, lambda_e: Weights
) -> Params:
    """The VLM with its language model merged by the given weights, element by element."""
    leaves = {}
    for piece in plan.pieces:
        entry, leaf = piece.entry, leaf_at(vlm, piece.entry.path)
        if piece.action == "merged":
            one = functools.partial(_combine_one, OPERATORS[method.operator], method.settings(leaf.dtype))
            prepared, base = tensors[entry.pattern]
            merged = jax.vmap(one)(prepared, base, lambda_v[entry.pattern], lambda_e[entry.pattern])
            merged = merged.astype(leaf.dtype)
            if piece.rows is not None:
                merged = jnp.concatenate([merged, to_hf(leaf, entry)[:, piece.rows :]], axis=1)
            leaf = from_hf(merged, entry, leaf.shape)
        leaves[entry.path] = leaf
    return tree_of(leaves)


def _combine_one(
    operator: Operator, settings: Settings, prepared: Prepared, base: Array, lambda_v: Array, lambda_e: Array
) -> Array:
    weights = [step(lambda_v, settings.dtype), step(lambda_e, settings.dtype)]
    return add_to_base(base, operator.combine(prepared, weights, settings))


def _tensors(params: Params, entry: Entry) -> Float[Array, "N ..."]:
    if entry.pattern == HEAD and "head" not in params:  # tied: the head is the embedding
        return params["embedding"]["table"][None]
    return to_hf(leaf_at(params, entry.path), entry)


def layer_weights(plan: Plan, value: Lambda) -> Weights:
    """A lambda of a recipe as one weight for each tensor to be merged, by pattern; a number may be traced."""
    if isinstance(value, list | tuple):
        return {entry.pattern: jnp.asarray(_listed(plan, entry, value), jnp.float32) for entry in plan.merged}
    number = jnp.asarray(value).astype(jnp.float32)
    return {entry.pattern: jnp.broadcast_to(number, (len(entry.names),)) for entry in plan.merged}


def _listed(plan: Plan, entry: Entry, values: Sequence[Any]) -> list[float]:
    if values and isinstance(values[0], PatternValue | Mapping):
        rules = [rule if isinstance(rule, PatternValue) else PatternValue(**rule) for rule in values]
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
