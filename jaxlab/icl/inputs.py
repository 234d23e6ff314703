"""What the analyses read: checked by value where values are known, before anything is compiled.

Under `jit` or `vmap` values are traced: shapes are checked all the same, values are believed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlab.errors import UserError
from jaxlab.models import Batch, ModelConfig, as_arrays, prepare_batch


class Targets(NamedTuple):
    """Where losses are read off, and what they are of. A pytree, of shapes too, hence `Any`."""

    positions: Any
    """int32[B, P]; -1: none."""
    label_tokens: Any
    """int32[B, C]."""
    labels: Any
    """int32[B, P], indices into label_tokens; -1: none."""


def known(value: Any) -> bool:
    """Whether there are values, and not shapes alone."""
    leaves = jax.tree.leaves(value)
    return not any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in leaves)


def prepared(batch: Mapping[str, Any], config: ModelConfig, who: str) -> Batch:
    """Everything that a batch carries, prepared for the model, as arrays; lists are taken too.

    Raises:
      UserError: tokens are missing, no whole numbers or not [B, T]; images for a model without vision; what
        is no number; or the model cannot read it.
    """
    if "tokens" not in batch:
        raise UserError(f"{who}: the batch has no tokens, only {', '.join(sorted(batch)) or 'nothing'}")
    arrays = {name: _array(value, name, who) for name, value in batch.items() if value is not None}
    tokens = arrays["tokens"]
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2 or 0 in tokens.shape:
        raise UserError(f"{who}: tokens are int[B, T], not {tokens.dtype}{list(tokens.shape)}")
    if "images" in arrays and not config.has_vision:
        raise UserError(f"{who}: the batch holds images, the model has no vision")
    try:
        return as_arrays(prepare_batch(cast(Batch, arrays), config))
    except ValueError as error:
        raise UserError(f"{who}: {error}") from None


def _array(value: Any, name: str, who: str) -> Any:
    if isinstance(value, jax.Array | jax.core.Tracer | jax.ShapeDtypeStruct):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{who}: {name} of the batch is no array of numbers; pad lists to one length")
    return array


def checked_targets(targets: Mapping[str, Any], batch: Batch, config: ModelConfig, who: str) -> Targets:
    """Targets of the contract's form, each position and label as [B, P].

    Raises:
      UserError: a key is missing or unknown, shapes do not fit, or a position, label or token is outside of
        its range, or a position in padding.
    """
    names = ("positions", "label_tokens", "labels")
    missing, more = [n for n in names if n not in targets], [n for n in targets if n not in names]
    if missing:
        raise UserError(f"{who}: targets lack {', '.join(sorted(missing))}")
    if more:
        raise UserError(f"{who}: targets have {', '.join(sorted(more))}, which is none of {', '.join(names)}")
    size, length = batch["tokens"].shape
    positions, tokens, labels = (_array(targets[name], f"targets: {name}", who) for name in names)
    for name, value in zip(names, (positions, tokens, labels), strict=True):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise UserError(f"{who}: {name} are whole numbers, not {value.dtype}")
    good = positions.ndim in (1, 2) and positions.shape == labels.shape and positions.shape[0] == size
    if not good or tokens.ndim not in (1, 2) or (tokens.ndim == 2 and tokens.shape[0] != size):
        raise UserError(
            f"{who}: for {size} sequences positions and labels must be [{size}] or [{size}, P] alike and "
            f"label_tokens [C] or [{size}, C], but they are {positions.shape}, {labels.shape} and "
            f"{tokens.shape}"
        )
    several = positions.ndim == 2
    in_range(positions, -1 if several else 0, length, "positions", who)
    in_range(labels, -1 if several else 0, tokens.shape[-1], "labels", who)
    in_range(tokens, 0, config.vocab_size, "label_tokens", who)
    if known((positions, labels)):
        there = np.asarray(positions).reshape(size, -1) >= 0
        if np.any(there != (np.asarray(labels).reshape(size, -1) >= 0)):
            raise UserError(f"{who}: a position without a label or a label without a position (-1 is none)")
    if known((positions, batch.get("segment_ids"))) and "segment_ids" in batch:
        places = np.asarray(positions).reshape(size, -1)
        segments = np.take_along_axis(np.asarray(batch["segment_ids"]), np.maximum(places, 0), axis=1)
        _none(places, (places >= 0) & (segments == 0), "positions", "stands in padding", who)
    if tokens.ndim == 1:
        tokens = jnp.broadcast_to(jnp.asarray(tokens)[None], (size, tokens.shape[0]))
    as_int = lambda x: jnp.asarray(x).astype(jnp.int32)
    return Targets(as_int(positions).reshape(size, -1), as_int(tokens), as_int(labels).reshape(size, -1))


def checked_classes(classes: Any, num_classes: int | None, batch: Batch, who: str) -> tuple[Array, int]:
    """Token classes [B, T], and how many there are.

    Raises:
      UserError: shapes do not fit, there is no class, a class is outside of its range, or padding has one.
    """
    array = _array(classes, "classes", who)
    if array.shape != batch["tokens"].shape:
        raise UserError(f"{who}: classes are {array.shape}, tokens {batch['tokens'].shape}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(f"{who}: classes are whole numbers, not {array.dtype}")
    if num_classes is None:
        if not known(array):
            raise UserError(f"{who}: give num_classes where the classes are traced (inside jit or vmap)")
        num_classes = int(array.max()) + 1
    if num_classes < 1:
        raise UserError(f"{who}: no token has a class; classes are 0, 1, ..., and -1 is outside of all")
    in_range(array, -1, num_classes, "classes", who)
    if "segment_ids" in batch and known((array, batch["segment_ids"])):
        segments = np.asarray(batch["segment_ids"])
        found = np.asarray(array)
        _none(found, (found >= 0) & (segments == 0), "classes", "is of padding, which has class -1", who)
    return jnp.asarray(array).astype(jnp.int32), num_classes


def in_range(values: Any, least: int, end: int, name: str, who: str) -> None:
    """Refuse numbers outside of least ... end - 1, where they are known.

    Raises:
      UserError: with the first of them, and where it stands.
    """
    if known(values):
        array = np.asarray(values)
        wrong = (array < least) | (array >= end)
        _none(array, wrong, name, f"is outside of {least}..{end - 1}", who)


def _none(values: np.ndarray, wrong: np.ndarray, name: str, what: str, who: str) -> None:
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise UserError(f"{who}: {name}{at.tolist()} = {values[tuple(at)]} {what}")
