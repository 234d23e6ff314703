"""Whether two models are the same function, however their configs say it: shapes, settings, token ids."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from jaxlab.errors import UserError
from jaxlab.models import ModelConfig

if TYPE_CHECKING:  # configs are compared without jax
    from jaxlab.models import Params

# What does not change the function that parameters stand for.
_FREE = ("compute_dtype", "attention_implementation", "remat", "initializer_range", "family")


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
    if one.position != "learned":
        free.append("max_length")
    plain = lambda c: dataclasses.replace(
        c, rope=dataclasses.replace(c.rope, sections=(), sections_interleaved=False)
    )
    return differences(plain(one), plain(other), free)


def _same(field: str, one: ModelConfig, other: ModelConfig) -> bool:
    """Whether a field that differs means the same, or nothing, in both."""
    resolved = {
        "num_kv_heads": "kv_heads",
        "head_dim": "key_dim",
        "value_head_dim": "value_dim",
        "output_bias": "has_output_bias",
        "attention": "kinds",
        "pattern": "kinds",
    }
    if field in resolved:
        return bool(getattr(one, resolved[field]) == getattr(other, resolved[field]))
    if field == "attention_scale":
        scales = [c.key_dim**-0.5 if c.attention_scale is None else c.attention_scale for c in (one, other)]
        return scales[0] == scales[1]
    if field == "moe":
        mixtures = [dataclasses.replace(c.moe, balance_loss=0.0) for c in (one, other)]
        return mixtures[0] == mixtures[1] or one.moe.num_experts == other.moe.num_experts == 0
    unused = {
        "window": lambda c: "sliding" not in c.kinds,
        "nsa": lambda c: "nsa" not in c.kinds,
        "rope": lambda c: c.position != "rotary",
        "local_rope_theta": lambda c: c.position != "rotary",
        "mlp_width": lambda c: c.moe.num_experts and not c.dense_layers,
        "vision": lambda c: not c.has_vision,
    }
    return field in unused and bool(unused[field](one) and unused[field](other))


def check_same_tree(
    stored: "Params", expected: "Params", path: str | Path, expected_by: str = "its config"
) -> None:
    """Raises UserError, one line, that names parameters that are missing, unexpected or of another shape."""
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


def common_prefix(tokenizers: Sequence[Tokenizer | None]) -> int | None:
    """How many token ids, from 0 on, stand for the same token in all; None if all read bytes."""
    if all(tokenizer is None for tokenizer in tokenizers):
        return None
    if any(tokenizer is None for tokenizer in tokenizers):
        return 0
    tables = [
        tokenizer.get_vocab(with_added_tokens=True) for tokenizer in tokenizers if tokenizer is not None
    ]
    names = [{index: token for token, index in table.items()} for table in tables]
    rows = 0
    while rows in names[0] and all(other.get(rows) == names[0][rows] for other in names[1:]):
        rows += 1
    return rows
