"""Whether two configs describe the same function, however they say it."""

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxlab.models import ModelConfig, NSAConfig, RopeConfig, SlidingAttentionConfig

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
        mixtures = [c.moe and dataclasses.replace(c.moe, balance_loss=0.0) for c in (one, other)]
        return mixtures[0] == mixtures[1]
    if field == "attention":
        return _attention(one) == _attention(other)
    plain_mlp = any(c.moe is None or c.dense_layers for c in (one, other))
    return field == "mlp_width" and not plain_mlp


def _attention(c: ModelConfig) -> Any:
    """What the attention of all layers computes, whoever does it."""
    if isinstance(c.attention, NSAConfig):
        return dataclasses.replace(c.attention, implementation="auto", compress_init="random")
    if not isinstance(c.attention, SlidingAttentionConfig):
        return c.kinds
    return c.kinds, c.attention.window, c.attention.rope_theta if c.position.kind == "rotary" else None
