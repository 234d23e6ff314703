"""The two stages of an injection, on whole trees: prepare the task vectors, then weight them.

Both are jitted programs that a search and a single merge share; densities, keys and weights are traced.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxlab.checkpoints import EMBEDDING, HEAD, Entry, from_hf, leaf_at, to_hf, tree_of
from jaxlab.errors import ConfigError
from jaxlab.merging.arithmetic import Mode, difference, step
from jaxlab.merging.operators import OPERATORS, Operator, Prepared, Settings, add_to_base, settings_for
from jaxlab.merging.plan import Piece, Plan
from jaxlab.merging.randomness import tensor_key
from jaxlab.merging.sparsify import Share, kept_count

Params = dict[str, Any]
Weights = dict[str, Float[Array, " tensors"]]
"""By pattern: a lambda for each tensor."""

Keys = dict[str, UInt32[np.ndarray, "tensors 2"] | UInt32[Array, "tensors 2"]]
Shares = dict[str, list[Share]]
"""By pattern: densities of the two task vectors."""

Tensors = dict[str, tuple[Prepared, Float[Array, "_ ..."]]]
"""By pattern: prepared task vectors, and the base, in Hugging Face's shape."""

Density = float | tuple[float, ...]
"""Of both task vectors, or of each."""


@dataclasses.dataclass(frozen=True)
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

    @property
    def densities(self) -> tuple[float, ...]:
        """Of the two task vectors."""
        density = 1.0 if self.density is None else self.density
        return (
            density if isinstance(density, tuple) and len(density) == 2 else (np.ravel(density).item(),) * 2
        )

    def with_density(self, density: Density | None) -> "Method":
        """The same with another density, if it has one."""
        return self if self.density is None else dataclasses.replace(self, density=density)

    def settings(self, stored: jnp.dtype) -> Settings:
        rescale = {} if self.rescale is None else {"rescale": self.rescale}
        return settings_for(self.operator, 2, self.mode, stored, rescale)._replace(normalize=False)


def prepare(
    plan: Plan, method: Method, vlm: Params, expert: Params, base: Params, *, seed: int = 0
) -> Tensors:
    """Task vectors, trimmed or masked: all that the lambdas have no part in."""
    merged = [piece for piece in plan.pieces if piece.action == "merged"]
    keys = {p.entry.pattern: np.stack([tensor_key(seed, name) for name in p.entry.names]) for p in merged}
    shares = {p.entry.pattern: [_share(d, _size(vlm, p)) for d in method.densities] for p in merged}
    return _prepare(plan, method.with_density(1.0), vlm, expert, base, keys, shares)


def combine(
    plan: Plan, method: Method, vlm: Params, tensors: Tensors, lambda_v: Weights, lambda_e: Weights
) -> Params:
    """The VLM with its language model merged by the given weights, element by element."""
    return _combine(plan, method.with_density(1.0), vlm, tensors, lambda_v, lambda_e)


def _size(params: Params, piece: Piece) -> int:
    """Elements of one tensor of a leaf, as far as it is merged."""
    view = functools.partial(_merged_part, entry=piece.entry, rows=piece.rows)
    return int(jax.eval_shape(view, params).size) // len(piece.entry.names)


def _share(density: float, size: int) -> Share:
    return Share(jnp.float32(density), jnp.int32(kept_count(density, size)))


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def _prepare(
    plan: Plan, method: Method, vlm: Params, expert: Params, base: Params, keys: Keys, shares: Shares
) -> Tensors:
    result = {}
    for piece in plan.pieces:
        if piece.action == "merged":
            x, y, origin = (_merged_part(params, piece.entry, piece.rows) for params in (vlm, expert, base))
            settings = method.settings(x.dtype)._replace(density=shares[piece.entry.pattern])
            one = functools.partial(_prepare_one, OPERATORS[method.operator], settings)
            prepared = jax.vmap(one)(x, y, origin, jnp.asarray(keys[piece.entry.pattern]))
            result[piece.entry.pattern] = (prepared, origin)
    return result


def _prepare_one(
    operator: Operator, settings: Settings, vlm: Array, expert: Array, base: Array, key: UInt32[Array, "2"]
) -> Prepared:
    vectors = [difference(model, base, settings.dtype) for model in (vlm, expert)]
    return operator.prepare(vectors, settings, key, None)


@functools.partial(jax.jit, static_argnames=("plan", "method"))
def _combine(
    plan: Plan, method: Method, vlm: Params, tensors: Tensors, lambda_v: Weights, lambda_e: Weights
) -> Params:
    leaves: dict[tuple[str, ...], Any] = {}
    for piece in plan.pieces:
        entry, stored = piece.entry, leaf_at(vlm, piece.entry.path).dtype
        if piece.action == "merged":
            one = functools.partial(_combine_one, OPERATORS[method.operator], method.settings(stored))
            prepared, base = tensors[entry.pattern]
            merged = jax.vmap(one)(prepared, base, lambda_v[entry.pattern], lambda_e[entry.pattern])
            merged = merged.astype(stored)
            if piece.rows is not None:
                merged = jnp.concatenate([merged, to_hf(vlm, entry)[:, piece.rows :]], axis=1)
            leaves |= from_hf(merged, entry, vlm)
        else:
            leaves |= {path: leaf_at(vlm, path) for path in entry.paths}
    return tree_of(leaves)


def _combine_one(
    operator: Operator, settings: Settings, prepared: Prepared, base: Array, lambda_v: Array, lambda_e: Array
) -> Array:
    weights = [step(lambda_v, settings.dtype), step(lambda_e, settings.dtype)]
    return add_to_base(base, operator.combine(prepared, weights, settings))


def _merged_part(params: Params, entry: Entry, rows: int | None) -> Float[Array, "N ..."]:
    if entry.path == HEAD and "head" not in params:  # tied: the head is the embedding
        return leaf_at(params, EMBEDDING)[None, :rows]
    tensors = jnp.asarray(to_hf(params, entry))
    return tensors if rows is None else tensors[:, :rows]
