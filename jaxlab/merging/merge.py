"""Merging tensors, and whole models of one architecture."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from jaxlab.checkpoints import Entry, LeafPath, entries, from_hf, leaf_at, to_hf, tree_of
from jaxlab.errors import UserError, UserNote
from jaxlab.merging.account import AccountLine, MergeAccount
from jaxlab.merging.numerics import Mode, difference, rounding_by, working_dtype
from jaxlab.merging.operators import Operator, operator_named
from jaxlab.merging.operators.declarations import Gather, per_model
from jaxlab.merging.random_masks import key_words, tensor_key
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
    offset: int | UInt32[Array, "2"] = 0,
    statistics: Any = None,
    layer: int | Int[Array, ""] | None = None,
    num_layers: int | None = None,
    totals: Any = None,
    tasks: Sequence[str] | None = None,
    **parameters: Any,
) -> Any:
    """One tensor merged from several of the same shape, in float32, stored in the dtype of the base or the
    first.

    Args:
      method: the name of an operator in `OPERATORS`, or one followed by what is done to its merged task
        vector, as in "ties+svc".
      tensors: one for each model, without the base; float32, bfloat16 or float16.
      base: what task vectors are taken from. Some operators on models ignore it (linear, karcher); slerp
        takes two tensors, or a base (t = 0) and one.
      mode: "paper", or "mergekit" for mergekit 0.1.5's results, its rounding to the tensors' dtype included.
      key: for random operators (dare_*, della*): `tensor_key(seed, name)` or a JAX key.
      mask: instead of a key: which elements of each task vector to keep.
      offset: where `tensors` are chunks of a tensor, in operators of scope "element": the index of the first
        element, an integer or its two uint32 words, the lower first.
      statistics: of data, for operators that need them; the operator's docstring says what.
      layer, num_layers: the layer of the tensor, None outside of layers, and their number, for operators that
        depend on depth.
      totals: of operators on whole models, what `gather_totals` made; without, the tensor is the whole model.
      tasks: the names of the tasks, for operators that make a model for each; "0", "1", ... by default.
      parameters: by mergekit's names. weight: a number, or a list with one for each tensor (default 1); the
        others are in the operator's signature: lambda, of the merged task vector; density: a number or a
        list; normalize; rescale; t. All but switches and counts may be traced; a traced share is rounded to
        float32. In mode mergekit int8_mask is ignored, and what the operator does not use is warned of.

    Returns:
      The merged tensor; of operators that make a model for each task a dict with one for each.

    Raises:
      UserError: unknown method or parameter, a missing base, key, weight or t, tensors that differ in shape.
    """
    operator = operator_named(method)
    if mode not in ("paper", "mergekit"):
        raise UserError(f"mode is paper or mergekit, not {mode!r}")
    parameters = used_parameters(operator, mode, parameters)
    for name, value in {"masks": mask, "statistics": statistics, "totals": totals}.items():
        if value is not None and not operator.takes(name):
            raise UserError(f"{method} takes no {name.removesuffix('s') if name == 'masks' else name}")
    if operator.takes("num_layers") and num_layers is None:
        raise UserError(f"{method} depends on depth: it needs num_layers=, and layer= within layers")
    models, origin = _inputs(operator, tensors, base)
    values = operator.resolve(parameters, len(models), mode)
    weights = per_model("weight", parameters.get("weight", 1.0), len(models))
    check_sum(operator, values, weights)
    dtype = arithmetic_dtype(operator, mode, models[0].dtype)
    supplied: dict[str, Any] = {
        "mode": mode,
        "dtype": dtype,
        "key": None if key is None else key_words(key),
        "masks": _masks(mask, models),
        "offset": offset,
        "statistics": statistics,
        "layer": -1 if layer is None else layer,
        "num_layers": num_layers,
        "totals": totals,
    }
    if operator.of_models:
        supplied["base"] = None if origin is None else origin.astype(jnp.float32)
        vectors = [x.astype(jnp.float32) for x in models]
    else:
        assert origin is not None
        vectors = [difference(x, origin, dtype) for x in models]
    prepared = operator.prepare(vectors, values, **supplied)
    merged = operator.combine(prepared, operator.rounded(weights, dtype), values, **supplied)

    def stored(x: Array) -> Array:
        if origin is None:
            return x.astype(models[0].dtype)
        return (x if operator.of_models else add_to_base(origin, x)).astype(origin.dtype)

    if not operator.per_task:
        return stored(merged)
    names = [str(i) for i in range(len(models))] if tasks is None else list(tasks)
    if len(names) != len(models):
        raise UserError(f"tasks has {len(names)} names for {len(models)} models")
    return {name: stored(x) for name, x in zip(names, merged, strict=True)}


def used_parameters(operator: Operator, mode: Mode, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters that the operator uses; "weight" is one if it has weights.

    In mode mergekit the others are left out with a note, as files in the wild carry them; int8_mask, which
    says how mergekit stores masks, without one.

    Raises:
      UserError: in mode paper, a parameter that it does not use.
    """
    known = [*(["weight"] if operator.takes("weights") else []), *operator.parameters]
    unused = [name for name in given if name not in known]
    if unused and mode == "paper":
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"{operator.name} has no parameter {unused[0]!r}; {has}")
    for name in unused:
        if name != "int8_mask":
            warnings.warn(f"{operator.name} does not use {name}", UserNote, stacklevel=3)
    return {name: value for name, value in given.items() if name in known}


def add_to_base(base: Float[Array, "*shape"], merged: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """base + merged task vector, float32."""
    return base.astype(jnp.float32) + merged


def arithmetic_dtype(operator: Operator, mode: Mode, stored: jnp.dtype) -> jnp.dtype:
    """What intermediate results are rounded to."""
    return jnp.dtype(jnp.float32) if operator.in_float32 else working_dtype(mode, stored)


def gather_totals(
    gather: Gather, measure: Callable[[Any], Iterable[Any]], parameters: Mapping[str, Any]
) -> Any:
    """What an operator on whole models needs to know of all their tensors.

    Args:
      gather: the operator's.
      measure: a round: what the rounds before concluded -> a tree of arrays for each tensor, or for several
        stacked on a leading axis.
      parameters: every parameter of the operator, as Python numbers.
    """
    totals = None
    for _ in range(gather.rounds):
        trees = [jax.tree.map(_exact_sum, tree) for tree in measure(totals)]
        totals = gather.conclude(jax.tree.map(lambda *leaves: sum(leaves), *trees), totals, parameters)
    return totals


def _exact_sum(stacked: Array) -> np.ndarray:
    wide = np.int64 if jnp.issubdtype(stacked.dtype, jnp.integer) else np.float64
    return np.asarray(stacked).astype(wide).sum(axis=0)


def statistics_of(operator: Operator, statistics: Mapping[str, Any] | None, names: Sequence[str]) -> Any:
    """The statistics of some tensors of one shape, stacked; None where none are needed or wanted.

    Raises:
      UserError: those of one of several are missing.
    """
    if statistics is None or not operator.takes("statistics"):
        return None
    found = [statistics.get(name) for name in names]
    if all(own is None for own in found):
        return None
    if missing := [name for name, own in zip(names, found, strict=True) if own is None]:
        raise UserError(f"{operator.name}: there are no statistics of {missing[0]}")
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *found)


def merge_models(
    method: str,
    models: Sequence[Params],
    *,
    base: Params | None = None,
    mode: Mode = "paper",
    seed: int = 0,
    family: str = "jaxlab",
    statistics: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> tuple[Params, MergeAccount]:
    """Every tensor of `models` merged by `merge_tensors`, and the account.

    Tensors have the names and shapes that they have in a folder of `family` (`ModelConfig.family`).

    Args:
      statistics: of data, by the tensor's name, for operators that need them.

    Raises:
      UserError: trees that differ in names or shapes, an operator that makes a model for each task, and what
        `merge_tensors` refuses.
    """
    known = entries(models[0], family)
    named = {f"model {i}": model for i, model in enumerate(models)} | ({} if base is None else {"base": base})
    for name, other in named.items():
        _same_tensors(known, models[0], name, other, family)
    operator = operator_named(method)
    if operator.per_task:
        raise UserError(f"{method} makes a model for each task; merge_tensors gives them tensor by tensor")
    parameters = used_parameters(operator, mode, parameters)
    layers = 1 + max((layer for entry in known for layer in entry.layers if layer is not None), default=-1)
    options = {"mode": mode, **({"num_layers": layers} if operator.takes("num_layers") else {}), **parameters}
    if operator.gather is not None:
        options["totals"] = _gather_models(operator, mode, parameters, known, models, base)
    leaves: dict[LeafPath, Any] = {}
    for entry in known:
        own = {
            "key": jnp.asarray(np.stack([tensor_key(seed, name) for name in entry.names])),
            "layer": jnp.asarray([-1 if layer is None else layer for layer in entry.layers], jnp.int32),
            "statistics": statistics_of(operator, statistics, entry.names),
        }
        parts = [tree_of({path: leaf_at(model, path) for path in entry.paths}) for model in named.values()]
        program = merge_entry_program(method, options, entry, base is not None, placement_of(parts[0]))
        leaves |= program(parts, own, np.uint32(0))
    lines = [AccountLine(name, e.pattern, "merged", tuple(named), method) for e in known for name in e.names]
    return tree_of(leaves), MergeAccount(tuple(lines), family)


Placement = tuple[tuple[LeafPath, NamedSharding], ...]
"""Where leaves lie on a mesh."""


def placement_of(params: Params) -> Placement:
    """Of the leaves that lie on a mesh."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return tuple(
        (tuple(key.key for key in path), leaf.sharding)
        for path, leaf in found
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    )


def placed(leaves: Mapping[LeafPath, Any], placement: Placement) -> dict[LeafPath, Array]:
    """Within jit: leaves that will lie where the placement says."""
    where = dict(placement)
    return {
        path: jax.lax.with_sharding_constraint(leaf, where[path]) if path in where else leaf
        for path, leaf in leaves.items()
    }


def merge_entry_program(
    method: str, options: Mapping[str, Any], entry: Entry, with_base: bool, placement: Placement
) -> Callable[..., dict[LeafPath, Array]]:
    """The compiled program that merges the leaves of one entry on the devices on which they lie.

    Returns:
      A jitted function of the leaves of each model (with a base its last), of keys, layers and statistics of
      the entry's tensors, stacked, and of uint32 0.
    """
    return jax.jit(functools.partial(_merge_entry, method, options, entry, with_base, placement))


def _merge_entry(
    method: str,
    options: Mapping[str, Any],
    entry: Entry,
    with_base: bool,
    placement: Placement,
    models: list[Params],
    own: dict[str, Any],
    zero: UInt32[Array, ""],
) -> dict[LeafPath, Array]:
    tensors = [jnp.asarray(to_hf(model, entry)) for model in models]
    base = tensors.pop() if with_base else None
    with rounding_by(zero):
        merged = each_tensor(operator_named(method), options["mode"], options)(
            functools.partial(_merge_one, method, dict(options)), tensors, base, own
        )
    return placed(from_hf(merged, entry, models[0]), placement)


def each_tensor(operator: Operator, mode: Mode, parameters: Mapping[str, Any]) -> Callable[..., Any]:
    """What applies a function to stacked tensors: (function, *stacked) -> stacked.

    What looks at whole tensors sees one after the other, in the shapes that it has by itself: XLA divides a
    number by a number, but multiplies stacked numbers by a reciprocal, and the bits would be others.
    """
    if operator.scope(mode, parameters) in ("element", "cut"):
        return lambda function, *stacked: jax.vmap(function)(*stacked)
    return lambda function, *stacked: jax.lax.map(lambda each: function(*each), stacked)


def _merge_one(
    method: str, options: dict[str, Any], tensors: list[Array], base: Array | None, own: dict[str, Any]
) -> Array:
    return merge_tensors(method, tensors, base=base, **own, **options)


def _gather_models(
    operator: Operator,
    mode: Mode,
    parameters: Mapping[str, Any],
    known: Sequence[Entry],
    models: Sequence[Params],
    base: Params | None,
) -> Any:
    values = operator.resolve(parameters, len(models), mode)
    if base is None:
        raise UserError(f"{operator.name} needs base=, the model that the models were fine-tuned from")

    def measure(totals: Any) -> list[Any]:
        def one(tensors: list[Array], origin: Array) -> Any:
            dtype = arithmetic_dtype(operator, mode, origin.dtype)
            vectors = [difference(x, origin, dtype) for x in tensors]
            return operator.measure(vectors, values, dtype=dtype, totals=totals)

        tensors = lambda model, entry: jnp.asarray(to_hf(model, entry))
        apply = each_tensor(operator, mode, parameters)
        return [apply(one, [tensors(m, entry) for m in models], tensors(base, entry)) for entry in known]

    assert operator.gather is not None
    return gather_totals(operator.gather, measure, values)


def _inputs(
    operator: Operator, tensors: Sequence[Tensor], base: Tensor | None
) -> tuple[list[Array], Array | None]:
    """The models' tensors, and the base where the operator uses it."""
    method = operator.name
    models = [jnp.asarray(x) for x in tensors]
    origin = None if base is None or operator.base == "unused" else jnp.asarray(base)
    if origin is None and operator.base == "required":
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


def check_sum(operator: Operator, values: Mapping[str, Any], weights: Sequence[Any]) -> None:
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
