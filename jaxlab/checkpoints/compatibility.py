"""Whether two models are the same function, however their configs say it: shapes, settings, token ids."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig, NSAConfig, RopeConfig, SlidingAttentionConfig

if TYPE_CHECKING:  # configs are compared without jax
    from jaxlab.models import Params

SameTokens = np.ndarray
"""int64[tokens, models]: for each token id of the first model the ids of the same token in all; -1: that
model has none."""

# What does not change the function that parameters stand for.
_FREE = ("compute_dtype", "remat", "initializer_range", "family")


def differences(one: ModelConfig, other: ModelConfig, free: Collection[str] = ()) -> list[str]:
    """The fields, other than `free` ones, in which two models are not the same function."""
    return [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _FREE
        and field.name not in free
        and getattr(one, field.name) != getattr(other, field.name)
        and not _same(field.name, one, other)
    ]


def difference(one: ModelConfig, other: ModelConfig) -> str | None:
    """The first of these fields with its two values; None if there is none."""
    for name in differences(one, other):
        return f"{name} is {getattr(one, name)} and {getattr(other, name)}"
    return None


def language_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which two language models, with or without vision, are too different to be merged.

    What shows in shapes and has a policy is free: vocabularies, tied heads, vision. All coordinates of a
    position are equal in a text, so which pair turns by which one does not matter either.
    """
    free = ["vocab_size", "vision", "tie_embeddings", "extra_embeddings"]
    if one.position.kind != "learned":
        free.append("max_length")
    return differences(_of_texts(one), _of_texts(other), free)


def language_settings_apart(one: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The settings behind `language_differences`, rope.theta or sliding_window, say, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in language_differences(one, other):
        pair = one, other
        if name == "position" and all(isinstance(c.position, RopeConfig) for c in pair):
            ropes = [dataclasses.replace(_of_texts(c).rope, dim=c.rotary_dim, layers=()) for c in pair]
            found |= _fields_apart("rope", ropes[0], ropes[1])
            if one.rotary_layers != other.rotary_layers:
                found["rope.layers"] = one.rotary_layers, other.rotary_layers
        elif name == "attention" and {*one.kinds, *other.kinds} <= {"full", "sliding"}:
            windows = [c.sliding.window if "sliding" in c.kinds else None for c in pair]
            if windows[0] != windows[1]:
                found["sliding_window"] = windows[0], windows[1]
            if one.kinds != other.kinds and None not in windows:
                found["layer_kinds"] = one.kinds, other.kinds
            thetas = [c.sliding.rope_theta if "sliding" in c.kinds else None for c in pair]
            if None not in windows and thetas[0] != thetas[1]:
                found["sliding_rope_theta"] = thetas[0], thetas[1]
        else:
            values = [getattr(c, name) for c in pair]
            same = dataclasses.is_dataclass(values[0]) and type(values[0]) is type(values[1])
            found |= _fields_apart(name, *values) if same else {name: (values[0], values[1])}
    return found


def decides_tensors(name: str, one: ModelConfig, other: ModelConfig) -> bool:
    """Whether a setting of `language_settings_apart` decides which tensors there are, or their shapes."""
    import jax

    from jaxlab.models import abstract_params

    group = name.partition(".")[0]
    of_attention = ("sliding_window", "layer_kinds", "sliding_rope_theta")
    field = "position" if group == "rope" else "attention" if group in of_attention else group
    plain = dataclasses.replace(_of_texts(one), vision=None, extra_embeddings=0)
    try:
        changed = dataclasses.replace(plain, **{field: getattr(_of_texts(other), field)})
    except ConfigError:  # it fits no other setting of the first model
        return True
    trees = [jax.tree.map(lambda x: x.shape, abstract_params(c)) for c in (plain, changed)]
    return bool(trees[0] != trees[1])


def _fields_apart(group: str, one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    names = [field.name for field in dataclasses.fields(one)]
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {f"{group}.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _of_texts(config: ModelConfig) -> ModelConfig:
    """The model with positions of one coordinate."""
    if not isinstance(config.position, RopeConfig):
        return config
    rope = dataclasses.replace(config.position, sections=(), sections_interleaved=False)
    return dataclasses.replace(config, position=rope)


def _same(field: str, one: ModelConfig, other: ModelConfig) -> bool:
    """Whether a field that differs means the same, or nothing, in both."""
    resolved = {
        "num_kv_heads": "kv_heads",
        "head_dim": "key_dim",
        "value_head_dim": "value_dim",
        "output_bias": "has_output_bias",
    }
    if field in resolved:
        return bool(getattr(one, resolved[field]) == getattr(other, resolved[field]))
    if field == "attention_scale":
        scales = [c.key_dim**-0.5 if c.attention_scale is None else c.attention_scale for c in (one, other)]
        return scales[0] == scales[1]
    if field == "moe":
        mixtures = [
            c.moe and dataclasses.replace(c.moe, balance_loss=0.0, bias_rate=0.0, exchange="auto")
            for c in (one, other)
        ]
        return mixtures[0] == mixtures[1]
    if field == "norm_bias":
        return one.norm == other.norm == "rms"
    if field == "position":
        return bool(_position(one) == _position(other))
    if field == "attention":
        return bool(_attention(one) == _attention(other))
    plain_mlp = any(c.moe is None or c.dense_layers for c in (one, other))
    return field == "mlp_width" and not plain_mlp


def _position(c: ModelConfig) -> Any:
    """How every layer turns, however it is said."""
    if not isinstance(c.position, RopeConfig):
        return c.position
    return c.rotary_layers, dataclasses.replace(c.position, layers=(), dim=c.rotary_dim)


def _attention(c: ModelConfig) -> Any:
    """What the attention of all layers computes, whoever does it."""
    if isinstance(c.attention, NSAConfig):
        return dataclasses.replace(c.attention, implementation="auto", compress_init="random")
    if not isinstance(c.attention, SlidingAttentionConfig):
        return c.kinds
    return c.kinds, c.attention.window, c.attention.rope_theta if c.position.kind == "rotary" else None


def check_same_tree(
    stored: "Params", expected: "Params", path: str | Path, expected_by: str = "its config"
) -> None:
    """Whether two trees hold parameters of the same names and shapes.

    Raises:
      UserError: parameters are missing, unexpected or of another shape; one line names them.
    """
    have, want = _shapes(stored), _shapes(expected)
    problems = [f"lacks {name}" for name in want if name not in have]
    problems += [f"has an unexpected {name}" for name in have if name not in want]
    problems += [
        f"{n} is {have[n]}, {expected_by} says {want[n]}" for n in want if have.get(n, want[n]) != want[n]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: {'; '.join(problems[:3])}{more}")


def _shapes(tree: "Params") -> dict[str, tuple[int, ...]]:
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def same_tokens(tokenizers: Sequence[Tokenizer | None]) -> SameTokens | None:
    """Which ids stand for the same token, by its text; None: all models read bytes, so that every id does.

    Models of which some have a tokenizer and some have none share no token that is known.
    """
    if all(tokenizer is None for tokenizer in tokenizers):
        return None
    if any(tokenizer is None for tokenizer in tokenizers):
        return np.empty((0, len(tokenizers)), np.int64)
    known = [t.get_vocab(with_added_tokens=True) for t in tokenizers if t is not None]
    found = np.full((1 + max(known[0].values(), default=-1), len(known)), -1, np.int64)
    for token, index in known[0].items():
        found[index] = [table.get(token, -1) for table in known]
    return found
