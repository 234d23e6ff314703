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

MOST_CLASSES = 64
"""More are refused where there are more of them than tokens: memory and time grow with their square."""


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
      UserError: it is no dict; tokens are missing, no whole numbers or not [B, T]; segments or positions of
        another shape; images for a model without vision; a key that it does not read; what is no number; or
        the model cannot read it.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"{who}: the batch is a dict with tokens, not {type(batch).__name__}")
    if "tokens" not in batch:
        raise UserError(f"{who}: the batch has no tokens, only {', '.join(sorted(batch)) or 'nothing'}")
    _check_keys(batch, config, who)
    arrays = {
        name: _array(value, f"{name} of the batch", who) for name, value in batch.items() if value is not None
    }
    tokens = arrays["tokens"]
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2 or 0 in tokens.shape:
        raise UserError(f"{who}: tokens are int[B, T], not {tokens.dtype}{list(tokens.shape)}")
    for name in ("segment_ids", "positions", "together"):
        if name in arrays and (shape := arrays[name].shape)[:2] != tokens.shape:
            raise UserError(f"{who}: {name} are {list(shape)}, tokens {list(tokens.shape)}")
        if name in arrays and jnp.issubdtype(arrays[name].dtype, jnp.floating):
            raise UserError(f"{who}: {name} are whole numbers, not {arrays[name].dtype}")
    if "images" in arrays and not config.has_vision:
        raise UserError(f"{who}: the batch holds images, the model has no vision")
    try:
        return as_arrays(prepare_batch(cast(Batch, arrays), config))
    except ValueError as error:
        raise UserError(f"{who}: {error}") from None


def _check_keys(batch: Mapping[str, Any], config: ModelConfig, who: str) -> None:
    """Refuse what the model would not read. A vision tower reads more than `Batch` names, all of it about
    images or pixels."""
    names = (
        "tokens",
        "segment_ids",
        "attention_mask",
        "positions",
        "together",
        "loss_mask",
        "token_type_ids",
    )
    others = [name for name in batch if name not in names and name != "images" and batch[name] is not None]
    if config.has_vision and "images" in batch:
        seen = (
            *("image", "pixel", "video", "aspect_ratio", "batch_num_images", "cross_attention", "mm_"),
            "window",  # of patches: what preparing a batch of Qwen2.5-VL adds
        )
        others = [name for name in others if name not in Batch.__annotations__ and not name.startswith(seen)]
    if others:
        raise UserError(
            f"{who}: the model reads no {', '.join(sorted(others))} of the batch; it reads "
            f"{', '.join(names[:5])}{', images' if config.has_vision else ''}"
        )


def _array(value: Any, name: str, who: str) -> Any:
    if isinstance(value, jax.Array | jax.core.Tracer | jax.ShapeDtypeStruct):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{who}: {name} is no array of numbers; pad lists to one length")
    return array


def checked_targets(targets: Mapping[str, Any], batch: Batch, config: ModelConfig, who: str) -> Targets:
    """Targets of the contract's form, each position and label as [B, P].

    Raises:
      UserError: a key is missing or unknown, shapes do not fit, or a position, label or token is outside of
        its range, or a position in padding.
    """
    names = ("positions", "label_tokens", "labels")
    if not isinstance(targets, Mapping):
        raise UserError(f"{who}: targets are a dict of {', '.join(names)}, not {targets!r}")
    missing, more = [n for n in names if n not in targets], [n for n in targets if n not in names]
    if missing:
        raise UserError(f"{who}: targets lack {', '.join(sorted(missing))}")
    if more:
        raise UserError(f"{who}: targets have {', '.join(sorted(more))}, which is none of {', '.join(names)}")
    size, length = batch["tokens"].shape
    positions, tokens, labels = (_array(targets[name], f"targets: {name}", who) for name in names)
    for name, value in zip(names, (positions, tokens, labels), strict=True):
        if 0 in value.shape:
            raise UserError(f"{who}: {name} are empty")
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
        if several and not (np.asarray(positions) >= 0).any():
            raise UserError(f"{who}: every position is -1, so there is no loss to explain")
    if known((positions, batch.get("segment_ids"))) and "segment_ids" in batch:
        places = np.asarray(positions).reshape(size, -1)
        segments = np.take_along_axis(np.asarray(batch["segment_ids"]), np.maximum(places, 0), axis=1)
        _none(places, (places >= 0) & (segments == 0), "positions", "stands in padding", who)
    if tokens.ndim == 1:
        tokens = jnp.broadcast_to(jnp.asarray(tokens)[None], (size, tokens.shape[0]))
    as_int = lambda x: jnp.asarray(x).astype(jnp.int32)
    return Targets(as_int(positions).reshape(size, -1), as_int(tokens), as_int(labels).reshape(size, -1))


def checked_classes(classes: Any, num_classes: Any, batch: Batch, who: str) -> tuple[Array, int]:
    """Token classes [B, T], and how many there are.

    Raises:
      UserError: shapes do not fit, there is no class, a class is outside of its range, or padding has one.
    """
    array = _array(classes, "classes", who)
    if array.shape != batch["tokens"].shape:
        raise UserError(f"{who}: classes are {array.shape}, tokens {batch['tokens'].shape}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(f"{who}: classes are whole numbers, not {array.dtype}")
    length = array.shape[1]
    if num_classes is not None and (not isinstance(num_classes, int | np.integer) or num_classes is True):
        raise UserError(f"{who}: num_classes is a whole number, not {num_classes!r}")
    if num_classes is None:
        if not known(array):
            raise UserError(f"{who}: give num_classes where the classes are traced (inside jit or vmap)")
        num_classes = int(array.max()) + 1
    if num_classes < 1:
        raise UserError(f"{who}: no token has a class; classes are 0, 1, ..., and -1 is outside of all")
    if num_classes > MOST_CLASSES and num_classes > length:
        raise UserError(
            f"{who}: {num_classes} classes for {length} tokens; number the classes 0, 1, ... (ids of tokens "
            "are no classes)"
        )
    in_range(array, -1, num_classes, "classes", who)
    if "segment_ids" in batch and known((array, batch["segment_ids"])):
        segments = np.asarray(batch["segment_ids"])
        found = np.asarray(array)
        _none(found, (found >= 0) & (segments == 0), "classes", "is of padding, which has class -1", who)
    return jnp.asarray(array).astype(jnp.int32), num_classes


def checked_places(places: Any, batch: Batch, name: str, who: str, least: int = 0) -> Array:
    """Places of tokens, int[B] of `positions`, int[B, P] of others, as an array.

    Raises:
      UserError: other shapes, no whole numbers, or outside of least ... T - 1.
    """
    array, (size, length) = _array(places, name, who), batch["tokens"].shape
    shape = f"[{size}]" if name == "positions" else f"[{size}, P]"
    if array.ndim != (1 if name == "positions" else 2) or array.shape[0] != size or 0 in array.shape:
        raise UserError(f"{who}: {name} must be {shape} for {size} sequences, are {list(array.shape)}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(f"{who}: {name} are whole numbers, not {array.dtype}")
    in_range(array, least, length, name, who)
    return jnp.asarray(array).astype(jnp.int32)


def check_flag(name: str, value: Any, who: str) -> None:
    """Refuse words and numbers where yes or no is meant.

    Raises:
      UserError: it is none.
    """
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{who}: {name} is True or False, not {value!r}")


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
