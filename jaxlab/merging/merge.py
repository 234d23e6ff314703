"""Merging tensors, and whole models of one architecture."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxlab.checkpoints import Entry, LeafPath, entries, from_hf, to_hf, tree_of
from jaxlab.errors import UserError
from jaxlab.merging.account import AccountLine, MergeAccount
from jaxlab.merging.numerics import Mode, difference, key_words, round_to, tensor_key, working_dtype
from jaxlab.merging.operators import Operator, operator_named
from jaxlab.merging.operators.registry import per_model
from jaxlab.models import Params

Tensor = Float[Array, "..."] | Float[np.ndarray, "..."]
Tree = Any
DTYPES = ("float32", "bfloat16", "float16")


def task_vector(model: Tree, base: Tree) -> Tree:
    """model - base, in float32, of two arrays or two trees of arrays (arXiv 2212.04089, sec. 2)."""
    f32 = jnp.dtype(jnp.float32)
    return jax.tree.map(lambda x, b: difference(jnp.asarray(x), jnp.asarray(b), f32), model, base)


def merge_tensors(
    method: str,
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    mode: Mode = "paper",
    key: Shaped[Array, "..."] | Shaped[np.ndarray, "..."] | None = None,
    mask: Sequence[Bool[Array, "..."] | Bool[np.ndarray, "..."]] | None = None,
    statistics: Any = None,
    **parameters: Any,
) -> Float[Array, "..."]:
    """One tensor merged from several of the same shape, in float32, stored in the dtype of the base or the
    first.

    Args:
      method: the name of an operator in `OPERATORS`.
      tensors: one for each model, without the base; float32, bfloat16 or float16.
      base: what task vectors are taken from. linear ignores it; slerp takes two tensors, or a base (t = 0)
        and one.
      mode: "paper", or "mergekit" for mergekit 0.1.5's results, its rounding to the tensors' dtype included.
      key: for dare_*: `tensor_key(seed, name)` or a JAX key.
      mask: for dare_*, instead of a key: which elements of each task vector to keep.
      statistics: of data, for operators that need them; so far none does.
      parameters: by mergekit's names. weight: a number, or a list with one for each tensor (default 1); the
        others are in the operator's signature: lambda, of the merged task vector; density: a number or a
        list; normalize; rescale; t. All but switches may be traced; a traced density is rounded to float32.

    Raises:
      UserError: unknown method or parameter, a missing base, key, weight or t, tensors that differ in shape.
    """
    operator = operator_named(method)
    if mode not in ("paper", "mergekit"):
        raise UserError(f"mode is paper or mergekit, not {mode!r}")
    known = [*(["weight"] if operator.takes("weights") else []), *operator.parameters]
    for name in parameters:
        if name not in known:
            raise UserError(f"{method} has no parameter {name!r}; it has {', '.join(known)}")
    for name, value in {"masks": mask, "statistics": statistics}.items():
        if value is not None and not operator.takes(name):
            raise UserError(f"{method} takes no {name.removesuffix('s') if name == 'masks' else name}")
    models, origin = _inputs(operator, tensors, base)
    values = operator.resolve(parameters, len(models), mode)
    weights = per_model("weight", parameters.get("weight", 1.0), len(models))
    _check_sum(operator, values, weights)
    dtype = arithmetic_dtype(operator, mode, models[0].dtype)
    supplied: dict[str, Any] = {"mode": mode, "dtype": dtype, "key": None if key is None else key_words(key)}
    supplied |= {"masks": _masks(mask, models), "statistics": statistics}
    if operator.of_models:
        supplied["base"] = None if origin is None else origin.astype(jnp.float32)
        vectors = [x.astype(jnp.float32) for x in models]
    else:
        assert origin is not None
        vectors = [difference(x, origin, dtype) for x in models]
    prepared = operator.prepare(vectors, values, **supplied)
    rounded = [round_to(jnp.asarray(w).astype(jnp.float32), dtype) for w in weights]
    merged = operator.combine(prepared, rounded, values, **supplied)
    if origin is None:
        return merged.astype(models[0].dtype)
    return (merged if operator.of_models else add_to_base(origin, merged)).astype(origin.dtype)


def add_to_base(base: Float[Array, "*shape"], merged: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """base + merged task vector, float32."""
    return base.astype(jnp.float32) + merged


def arithmetic_dtype(operator: Operator, mode: Mode, stored: jnp.dtype) -> jnp.dtype:
    """What intermediate results are rounded to; mergekit merges models themselves in float32."""
    return jnp.dtype(jnp.float32) if operator.of_models else working_dtype(mode, stored)


def merge_models(
    method: str,
    models: Sequence[Params],
    *,
    base: Params | None = None,
    mode: Mode = "paper",
    seed: int = 0,
    family: str = "jaxlab",
    **parameters: Any,
) -> tuple[Params, MergeAccount]:
    """Every tensor of `models` merged by `merge_tensors`, and the account.

    Tensors have the names and shapes that they have in a folder of `family` (`ModelConfig.family`).

    Raises:
      UserError: trees that differ in names or shapes, and what `merge_tensors` refuses.
    """
    known = entries(models[0], family)
    named = {f"model {i}": model for i, model in enumerate(models)} | ({} if base is None else {"base": base})
    for name, other in named.items():
        _same_tensors(known, models[0], name, other, family)
    leaves: dict[LeafPath, Any] = {}
    for entry in known:
        one = functools.partial(_merge_one, method, mode, parameters)
        tensors = [to_hf(model, entry) for model in models]
        origin = None if base is None else to_hf(base, entry)
        keys = jnp.asarray(np.stack([tensor_key(seed, name) for name in entry.names]))
        merged = jax.jit(jax.vmap(one))(tensors, origin, keys)
        leaves |= from_hf(merged, entry, models[0])
    lines = [AccountLine(name, e.pattern, "merged", tuple(named), method) for e in known for name in e.names]
    return tree_of(leaves), MergeAccount(tuple(lines), family)


def _merge_one(
    method: str, mode: Mode, parameters: dict[str, Any], tensors: list[Array], base: Array | None, key: Array
) -> Array:
    return merge_tensors(method, tensors, base=base, mode=mode, key=key, **parameters)


def _inputs(
    operator: Operator, tensors: Sequence[Tensor], base: Tensor | None
) -> tuple[list[Array], Array | None]:
    """The models' tensors, and the base where the operator uses it."""
    method = operator.name
    models = [jnp.asarray(x) for x in tensors]
    uses_base = not operator.of_models or operator.takes("base")
    origin = None if base is None or not uses_base else jnp.asarray(base)
    if origin is None and not operator.of_models:
        raise UserError(f"{method} needs base=, the tensor that the models were fine-tuned from")
    if not models:
        raise UserError(f"{method} needs at least one tensor")
    everything = models if origin is None else [origin, *models]
    if len({x.shape for x in everything}) > 1:
        raise UserError(f"{method}: tensors differ in shape: {', '.join(str(x.shape) for x in everything)}")
    for x in everything:
        if x.dtype.name not in DTYPES:
            raise UserError(f"{method}: cannot merge {x.dtype.name}, only {', '.join(DTYPES)}")
    return models, origin


def _check_sum(operator: Operator, values: Mapping[str, Any], weights: Sequence[Any]) -> None:
    """Refuses known weights that sum to zero, by which nothing can be divided.

    Raises:
      UserError: they do.
    """
    divides = any(p.needs_nonzero_sum and values[name] for name, p in operator.parameters.items())
    if divides and all(isinstance(w, int | float) for w in weights) and sum(weights) == 0:
        raise UserError(
            f"{operator.name}: the weights {weights} sum to zero and cannot be normalised; "
            "set normalize to false"
        )


def _masks(masks: Sequence[Any] | None, models: Sequence[Array]) -> list[Array] | None:
    """Given masks as boolean arrays.

    Raises:
      UserError: they do not have the tensors' shape.
    """
    if masks is None:
        return None
    shapes = [np.shape(mask) for mask in masks]
    if shapes != [x.shape for x in models]:
        raise UserError(f"mask needs one array per model, each of shape {models[0].shape}; found {shapes}")
    return [jnp.asarray(mask).astype(bool) for mask in masks]


def _same_tensors(known: tuple[Entry, ...], first: Params, name: str, other: Params, family: str) -> None:
    want = {entry.pattern: (len(entry.names), *entry.shape(first)) for entry in known}
    have = {entry.pattern: (len(entry.names), *entry.shape(other)) for entry in entries(other, family)}
    wrong = sorted(pattern for pattern in want | have if want.get(pattern) != have.get(pattern))
    if wrong:
        first_shape, other_shape = (shapes.get(wrong[0], "absent") for shapes in (want, have))
        raise UserError(
            f"the models cannot be merged: {wrong[0]} is {first_shape} in model 0 and {other_shape} in {name}"
        )
