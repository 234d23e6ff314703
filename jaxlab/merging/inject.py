"""Injection: an expert's skill into the language model of a VLM.

    LM = base + operator(lambda_v (VLM.LM - base), lambda_e (expert - base))

The operator's weights are (lambda_v, lambda_e), nothing is normalised, and its own lambda is 1, whichever
operator it is. linear is then task_arithmetic; slerp takes the fraction lambda_e / (lambda_v + lambda_e) of
the arc between the two task vectors, lambda_v + lambda_e times as long. Vision tower and projector stay the
VLM's, byte for byte.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.checkpoints import Entry
from jaxlab.errors import UserError
from jaxlab.merging.account import Account
from jaxlab.merging.arithmetic import Mode
from jaxlab.merging.plan import Embeddings, Plan, plan_injection
from jaxlab.merging.stages import Method, Params, Weights, combine, prepare


@dataclass(frozen=True)
class PatternValue:
    """A value for the tensors whose name matches a pattern."""

    pattern: str
    """Of names in a Hugging Face checkpoint, with * and ?, for example "*.mlp.*"."""
    value: float
    """The value."""


Lambda = float | Float[Array, ""] | Sequence[float] | Sequence[PatternValue | Mapping[str, Any]]
"""A number; a list over layers; or a list of patterns, of which the first that matches decides."""


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
      family: `ModelConfig.family` of the VLM, whose names and shapes an operator sees.

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
        vlm_params, expert_params, base_params, embeddings=embeddings, common_rows=common_rows, family=family
    )
    tensors = prepare(plan, method, vlm_params, expert_params, base_params, seed=seed)
    lambdas = layer_weights(plan, lambda_v), layer_weights(plan, lambda_e)
    return combine(plan, method, vlm_params, tensors, *lambdas), plan.account()


def layer_weights(plan: Plan, value: Lambda) -> Weights:
    """A lambda of a recipe as one weight for each tensor to be merged, by pattern; a number may be traced."""
    if isinstance(value, list | tuple):
        return {entry.pattern: jnp.asarray(_listed(plan, entry, value), jnp.float32) for entry in plan.merged}
    number = jnp.asarray(value).astype(jnp.float32)
    return {entry.pattern: jnp.broadcast_to(number, (len(entry.names),)) for entry in plan.merged}


def _listed(plan: Plan, entry: Entry, values: Sequence[Any]) -> list[float]:
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
