"""The merge operators: pure functions of one tensor, as the Hugging Face checkpoint has it.

An operator works in two stages. `prepare` takes the task vectors and does what weights have no part in
(trimming, random masks, angles); `combine` applies the weights, element by element. A search prepares once
for many weights. Both may be jitted and vmapped, with weights, lambda and t as traced scalars, and give the
same bits in every such setting.

NaN in an input gives NaN in that element of the output, unless trimming or a mask dropped it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt32

from jaxlab.errors import UserError
from jaxlab.merging import combine as combining
from jaxlab.merging.arithmetic import Mode, difference, step, times, total, working_dtype
from jaxlab.merging.combine import Angle, Vectors, Weights
from jaxlab.merging.randomness import keep_mask, key_words
from jaxlab.merging.sparsify import Density, as_masks, drop, same_norm, share_of, trim

Tensor = Float[Array, "..."] | Float[np.ndarray, "..."]
Tree = Any
DTYPES = ("float32", "bfloat16", "float16")


class Prepared(NamedTuple):
    """Task vectors (float32) ready to be weighted."""

    vectors: Vectors
    angle: Angle | None = None


class Settings(NamedTuple):
    """What every operator is told beside tensors and weights."""

    mode: Mode
    dtype: jnp.dtype
    """Of intermediate results."""
    normalize: bool
    rescale: bool
    density: Sequence[Density]
    """One for each task vector."""


@dataclass(frozen=True)
class Operator:
    """One merge operator."""

    source: str
    """Where it was published."""
    prepare: Callable[[Vectors, Settings, UInt32[Array, "2"] | None, list[Array] | None], Prepared]
    """(task vectors, settings, key, given masks) -> task vectors ready to be weighted."""
    combine: Callable[[Prepared, Weights, Settings], Float[Array, "..."]]
    """(prepared task vectors, weights, settings) -> the merged task vector."""
    parameters: Mapping[str, Any]
    """Parameters beside weight, and their defaults; None: has none and must be given."""
    mergekit: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that differ in mode mergekit."""
    of_models: bool = False
    """Merges models themselves, not task vectors."""
    random: bool = False
    """Needs a key."""

    def default(self, name: str, mode: Mode) -> Any:
        value = self.parameters.get(name)
        return self.mergekit.get(name, value) if mode == "mergekit" else value


def _as_they_are(vectors: Vectors, settings: Settings, key: Any, masks: Any) -> Prepared:
    return Prepared(vectors)


def _trimmed(vectors: Vectors, settings: Settings, key: Any, masks: Any) -> Prepared:
    thin = trim(vectors, settings.density)
    if settings.rescale:
        thin = [same_norm(kept, whole, settings.dtype) for kept, whole in zip(thin, vectors, strict=True)]
    return Prepared(thin)


def _dropped(vectors: Vectors, settings: Settings, key: Any, masks: Any) -> Prepared:
    if masks is None:
        if key is None:
            raise UserError("a random merge method needs key=jaxlab.merging.tensor_key(seed, tensor name)")
        shares = jnp.stack([share_of(density) for density in settings.density])
        streams = jnp.arange(len(vectors), dtype=jnp.uint32)
        shape = vectors[0].shape
        masks = list(
            jax.vmap(lambda share, stream: keep_mask(key, shape, share, stream=stream))(shares, streams)
        )
    return Prepared(
        [
            drop(x, mask, density, rescale=settings.rescale, mode=settings.mode, dtype=settings.dtype)
            for x, mask, density in zip(vectors, masks, settings.density, strict=True)
        ]
    )


def _with_angle(vectors: Vectors, settings: Settings, key: Any, masks: Any) -> Prepared:
    if len(vectors) != 2:
        raise UserError(f"slerp merges two models, not {len(vectors)}")
    return Prepared(vectors, combining.angle_between(vectors[0], vectors[1], settings.mode))


def _sum(prepared: Prepared, weights: Weights, s: Settings) -> Float[Array, "..."]:
    return combining.weighted_sum(prepared.vectors, weights, normalize=s.normalize, dtype=s.dtype)


def _election(prepared: Prepared, weights: Weights, s: Settings) -> Float[Array, "..."]:
    return combining.elected_sum(prepared.vectors, weights, normalize=s.normalize, mode=s.mode, dtype=s.dtype)


def _arc(prepared: Prepared, weights: Weights, s: Settings) -> Float[Array, "..."]:
    """Weights (a, b) are the fraction b / (a + b) of the arc, a + b times as far out."""
    f32 = jnp.dtype(jnp.float32)
    reach = total(list(weights), f32)
    t = jnp.where(reach == 0, 0.0, weights[1] / jnp.where(reach == 0, 1.0, reach))
    a, b = prepared.vectors
    assert prepared.angle is not None
    return times(combining.great_circle(a, b, step(t, f32), prepared.angle), reach, f32)


OPERATORS: dict[str, Operator] = {
    "linear": Operator(
        "Wortsman et al. 2022, arXiv 2203.05482", _as_they_are, _sum, {"normalize": True}, of_models=True
    ),
    "slerp": Operator("Shoemake 1985", _with_angle, _arc, {"t": None}, of_models=True),
    "task_arithmetic": Operator(
        "Ilharco et al. 2022, arXiv 2212.04089", _as_they_are, _sum, {"lambda": 1.0, "normalize": False}
    ),
    "ties": Operator(
        "Yadav et al. 2023, arXiv 2306.01708",
        _trimmed,
        _election,
        {"density": 1.0, "lambda": 1.0, "normalize": True, "rescale": False},
    ),
    "dare_linear": Operator(
        "Yu et al. 2023, arXiv 2311.03099",
        _dropped,
        _sum,
        {"density": 1.0, "lambda": 1.0, "normalize": False, "rescale": True},
        random=True,
    ),
    "dare_ties": Operator(
        "Yu et al. 2023, arXiv 2311.03099, with TIES' election",
        _dropped,
        _election,
        {"density": 1.0, "lambda": 1.0, "normalize": True, "rescale": True},
        {"normalize": False},
        random=True,
    ),
}


def operator_named(method: str) -> Operator:
    """Raises UserError for a method that does not exist."""
    if method not in OPERATORS:
        raise UserError(f"no merge method {method!r}; there are {', '.join(sorted(OPERATORS))}")
    return OPERATORS[method]


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
    **parameters: Any,
) -> Float[Array, "..."]:
    """One tensor merged from several of the same shape, in float32, stored in the dtype of the base or the
    first.

    Args:
      method: linear, task_arithmetic, ties, dare_linear, dare_ties or slerp.
      tensors: one for each model, without the base; float32, bfloat16 or float16.
      base: what task vectors are taken from. linear ignores it; slerp takes two tensors, or a base (t = 0)
        and one.
      mode: "paper", or "mergekit" for mergekit 0.1.5's results, its rounding to the tensors' dtype included.
      key: for dare_*: `tensor_key(seed, name)` or a JAX key.
      mask: for dare_*, instead of a key: which elements of each task vector to keep.
      parameters: by mergekit's names. weight: a number, or a list with one for each tensor (default 1);
        lambda, of the merged task vector; density: a number or a list; normalize; rescale; t. All but
        normalize and rescale may be traced; a traced density is rounded to float32.

    Raises:
      UserError: unknown method or parameter, a missing base, key, weight or t, tensors that differ in shape.
    """
    operator = operator_named(method)
    for name in parameters:
        known = [*operator.parameters] if method == "slerp" else ["weight", *operator.parameters]
        if name not in known:
            raise UserError(f"{method} has no parameter {name!r}; it has {', '.join(known)}")
    if mask is not None and not operator.random:
        raise UserError(f"{method} takes no mask")
    stored, models, origin = _inputs(method, operator, tensors, base)
    settings = settings_for(method, len(models), mode, models[0].dtype, parameters)
    vectors = [
        x.astype(jnp.float32) if origin is None else difference(x, origin, settings.dtype) for x in models
    ]
    prepared = operator.prepare(
        vectors,
        settings,
        None if key is None else key_words(key),
        as_masks(None if mask is None else list(mask), vectors),
    )
    if method == "slerp":
        t = _scalar(_required(parameters, "t", method))
        assert prepared.angle is not None
        return combining.great_circle(vectors[0], vectors[1], t, prepared.angle).astype(stored)
    weights = [step(w, settings.dtype) for w in _weights(parameters.get("weight", 1.0), len(models))]
    if settings.normalize and operator.combine is _sum:
        weights_add_up(parameters.get("weight", 1.0), len(models), method)
    merged = operator.combine(prepared, weights, settings)
    if origin is None:
        return merged.astype(stored)
    scale = _scalar(parameters.get("lambda", operator.default("lambda", mode)))
    return add_to_base(origin, times(merged, scale, settings.dtype)).astype(stored)


def add_to_base(base: Float[Array, "*shape"], merged: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """base + merged task vector, float32."""
    return base.astype(jnp.float32) + merged


def _inputs(
    method: str, operator: Operator, tensors: Sequence[Tensor], base: Tensor | None
) -> tuple[jnp.dtype, list[Array], Array | None]:
    """The dtype of the result, the models' tensors, and what to subtract from them."""
    models = [jnp.asarray(x) for x in tensors]
    origin = None if base is None else jnp.asarray(base)
    if method == "slerp":
        models, origin = ([origin, *models] if origin is not None else models), None
        if len(models) != 2:
            raise UserError(
                f"slerp merges two tensors, or a base and one; found {len(models)}, the base included"
            )
    elif operator.of_models:
        origin = None
    elif origin is None:
        raise UserError(f"{method} needs base=, the tensor that the models were fine-tuned from")
    if not models:
        raise UserError(f"{method} needs at least one tensor")
    everything = models if origin is None else [origin, *models]
    if len({x.shape for x in everything}) > 1:
        raise UserError(f"{method}: tensors differ in shape: {', '.join(str(x.shape) for x in everything)}")
    for x in everything:
        if x.dtype.name not in DTYPES:
            raise UserError(f"{method}: cannot merge {x.dtype.name}, only {', '.join(DTYPES)}")
    return everything[0].dtype, models, origin


def settings_for(
    method: str, count: int, mode: Mode, stored: jnp.dtype, parameters: Mapping[str, Any]
) -> Settings:
    """The settings of a method for `count` task vectors; `parameters` over its defaults."""
    operator = operator_named(method)
    if mode not in ("paper", "mergekit"):
        raise UserError(f"mode is paper or mergekit, not {mode!r}")
    value = lambda name: parameters.get(name, operator.default(name, mode))
    density = value("density")
    # mergekit computes the methods that merge models themselves in float32.
    dtype = jnp.dtype(jnp.float32) if operator.of_models else working_dtype(mode, stored)
    densities = per_model("density", 1.0 if density is None else density, count)
    return Settings(mode, dtype, bool(value("normalize")), bool(value("rescale")), densities)


def per_model(name: str, value: Any, count: int) -> list[Any]:
    """A parameter's value for each model: a number for all, or a list."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) or (isinstance(value, jax.Array) and value.ndim == 1):
        if len(value) != count:
            raise UserError(f"{name} has {len(value)} values for {count} models")
        values = list(value)
    else:
        values = [value] * count
    return [v.item() if isinstance(v, np.generic) else v for v in values]


def _weights(weight: Any, count: int) -> Weights:
    return [_scalar(w) for w in per_model("weight", weight, count)]


def _scalar(value: Any) -> Float[Array, ""]:
    return jnp.asarray(value).astype(jnp.float32)


def weights_add_up(weight: Any, count: int, method: str) -> None:
    """Raises UserError for known weights that sum to zero, by which nothing can be divided."""
    values = per_model("weight", weight, count)
    if all(isinstance(w, int | float) for w in values) and sum(values) == 0:
        raise UserError(
            f"{method}: the weights {values} sum to zero and cannot be normalised; set normalize to false"
        )


def _required(parameters: Mapping[str, Any], name: str, method: str) -> Any:
    if name not in parameters:
        raise UserError(f"{method} needs the parameter {name}")
    return parameters[name]
