"""What a model is, and what can be merged with it, from configs and headers alone.

A Hugging Face folder is inspected without jax.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import families
from jaxlab.checkpoints.compatibility import language_differences, same_tokens
from jaxlab.checkpoints.formats.base import OpenModel, is_finite
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.checkpoints.tensor_folder import TensorFolder
from jaxlab.checkpoints.tensor_table import parse
from jaxlab.checkpoints.unexpected_tensors import Match, is_float, match, told
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, RopeConfig

_SHOWN = 6


@dataclass(frozen=True)
class ModelReport:
    """What is known of a model without its tensors."""

    name: str
    config: ModelConfig
    lines: tuple[tuple[str, str], ...]
    tokenizer: Tokenizer | None
    problems: str = ""
    """What makes it no model of its family; "": nothing."""


def inspect_model(opened: OpenModel, name: str, *, scan: bool = False) -> ModelReport:
    """What a model is. Tensors that are missing or not known are told, not raised.

    Args:
      scan: read all tensors for NaN and infinities.

    Raises:
      UserError: files that are no model, or one of no known family.
    """
    if not isinstance(opened, HuggingFaceFolder):
        return _inspect_parameters(opened, name, scan)
    found = match(opened.tensors, opened.described)
    config = dataclasses.replace(opened.described, family=found.family)
    try:
        tokenizer = opened.tokenizer
        described = _vocabulary(tokenizer, "none")
    except UserError as error:
        tokenizer, described = None, str(error)
    lines = [
        *_architecture(config),
        ("parameters", _parameters(opened.tensors, found)),
        ("stored", _stored(opened.stored)),
        ("tensors", _mapped(found)),
        ("tokenizer", described),
    ]
    if scan:
        bad = [
            n
            for n, tensor in opened.tensors.items()
            if is_float(tensor.dtype) and not is_finite(tensor.read())
        ]
        lines.append(("scan", _scanned(bad, len(opened.tensors))))
    problems = told(found.family, found.missing, found.unmapped, wrong_shapes(opened.tensors, found, config))
    return ModelReport(name, config, tuple(lines), tokenizer, problems)


def wrong_shapes(folder: TensorFolder, found: Match, c: ModelConfig) -> list[str]:
    """Tensors whose shape is not the config's, among those whose axes it counts: without jax, not all."""
    if c.latent is not None:
        return []
    sizes = {
        "embedding.table": {"v": c.embedding_rows, "d": c.width},
        "final_norm.scale": {"d": c.width},
        "head.table": {"v": c.vocab_size, "d": c.width},
        "layers.mlp.up": {"d": c.width, "f": c.mlp_width},
        "layers.attention.query": {"d": c.width, "h": c.num_heads, "k": c.key_dim},
        "layers.attention.key": {"d": c.width, "h": c.kv_heads, "k": c.key_dim},
    }
    layouts = {row.path: parse(row.layout) for row in families.rows_of(found.family) if row.path in sizes}
    wrong = []
    for name, path in found.paths.items():
        if path in layouts and set(layouts[path].ours) <= set(sizes[path]):
            expected = layouts[path].shape(tuple(sizes[path][axis] for axis in layouts[path].ours))
            if tuple(folder[name].shape) != expected:
                wrong.append(f"{name} is {list(folder[name].shape)}, expected {list(expected)}")
    return wrong


def _inspect_parameters(opened: OpenModel, name: str, scan: bool) -> ModelReport:
    """A model of ours, or of llama2.c: their sizes are known to Orbax and to jax."""
    import jax

    config = opened.config
    leaves = jax.tree.leaves(opened.shapes)
    sizes = Counter({str(leaf.dtype): 0 for leaf in leaves})
    for leaf in leaves:
        sizes[str(leaf.dtype)] += leaf.size
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    form = {"orbax": "ours (Orbax)", "llama2c": "llama2.c"}[opened.form]
    lines = [
        *_architecture(config),
        ("parameters", f"{sum(sizes.values()):,}"),
        ("stored", f"{stored:,} bytes of {_list_dtypes(sizes)}, {form}"),
        ("tokenizer", _vocabulary(opened.tokenizer, "bytes" if config.family == "jaxlab" else "none")),
    ]
    if scan:
        read = jax.tree_util.tree_leaves_with_path(opened.read())
        found = [path for path, leaf in read if not is_finite(np.asarray(leaf))]
        bad = [jax.tree_util.keystr(path, simple=True, separator=".") for path in found]
        lines.append(("scan", _scanned(bad, len(read))))
    if opened.source_files is not None:
        lines.append(("came from", "a model of Hugging Face, or a GGUF file; it keeps its files"))
    return ModelReport(name, config, tuple(lines), opened.tokenizer)


def compare_for_merging(first: ModelReport, other: ModelReport) -> list[str]:
    """Whether two language models can be merged, and which policy of embeddings resolves what differs."""
    one, two = first.config, other.config
    apart = language_differences(one, two)
    if apart:
        return [
            "cannot be merged: the language models are not the same function",
            *(f"{name}: {_value(one, name)} and {_value(two, name)}" for name in apart),
        ]
    rows = one.embedding_rows, two.embedding_rows
    lines = ["can be merged: the language models are of one architecture"]
    lines.append("vocabulary: " + " and ".join(f"{n:,}" for n in dict.fromkeys(rows)) + " rows")
    if one.tie_embeddings != two.tie_embeddings:
        tied, own = (first, other) if one.tie_embeddings else (other, first)
        lines.append(f"head: the embedding in {tied.name}, one of its own in {own.name}")
    return lines + _policies(first, other, min(rows))


def _policies(first: ModelReport, other: ModelReport, shared: int) -> list[str]:
    """A line for each value of `embeddings` in a recipe."""
    keep = f"embeddings: vlm keeps those of {first.name}"
    known = [first.tokenizer, other.tokenizer]
    own = first.config.family == other.config.family == "jaxlab"
    if any(tokenizer is None for tokenizer in known) and not own:
        unknown = "whether their tokens agree is unknown without tokenizers"
        return [keep, f"embeddings: merge merges {shared:,} rows; {unknown}"]
    tokens = same_tokens(known)
    if tokens is None:
        return [keep, f"embeddings: merge_common_rows merges {shared:,} rows, all that both have"]
    sizes = first.config.embedding_rows, other.config.embedding_rows
    both = tokens[np.all((tokens >= 0) & (tokens < sizes), axis=1)]
    moved = int(np.sum(both[:, 0] != both[:, 1]))
    lines = [f"tokens: {len(both):,} are in both, {moved:,} of them under other ids"]
    if not len(both):
        return [*lines, f"{keep} (the only choice that is safe)"]
    lines += [keep, f"embeddings: merge_common_rows merges {len(both):,} rows by token"]
    same = len(both) - moved
    if same == shared:
        return [*lines, "embeddings: merge does the same, since all shared rows agree"]
    return [*lines, f"embeddings: merge would mix {shared - same:,} rows of different or unknown tokens"]


def _architecture(c: ModelConfig) -> list[tuple[str, str]]:
    lines = [("family", c.family)]
    heads = f"{c.num_heads} heads" + ("" if c.kv_heads == c.num_heads else f" ({c.kv_heads} key/value)")
    lines.append(("language model", f"{c.num_layers} layers, width {c.width}, {heads} of {c.key_dim}"))
    if c.moe is not None:
        more = f", {c.moe.shared_width} shared" if c.moe.shared_width else ""
        more += f", {c.dense_layers} layers without" if c.dense_layers else ""
        lines.append(("experts", f"{c.moe.experts_per_token} of {c.moe.num_experts} of {c.moe.width}{more}"))
    kinds, said = Counter(c.kinds), []
    if set(kinds) != {"full"}:
        said = [
            f"{n} {kind}" + (f" ({c.sliding.window})" if kind == "sliding" else "")
            for kind, n in kinds.items()
        ]
    said += [f"keys and values from a latent ({c.latent.kv_rank})"] if c.latent is not None else []
    said += ["sinks"] if c.attention_sinks else []
    if said:
        lines.append(("attention", ", ".join(said)))
    stretched = isinstance(c.position, RopeConfig) and c.position.scaling != "none"
    scaling = f", rotary positions stretched ({c.rope.scaling})" if stretched else ""
    if isinstance(c.position, RopeConfig) and not all(c.rotary_layers):
        scaling += f", no positions in {c.rotary_layers.count(False)} of {c.num_layers} layers"
    lines.append(("context", f"{c.max_length:,} tokens{scaling}"))
    head = "head is the embedding" if c.tie_embeddings else "head of its own"
    lines.append(("vocabulary", f"{c.embedding_rows:,} rows, {head}"))
    if (v := c.vision) is not None:
        lines.append(("vision", f"{v.num_layers} layers, width {v.width}, patches of {v.patch_size}"))
    return lines


def _parameters(folder: TensorFolder, found: Match) -> str:
    seeing = ("vision.", "projector.")
    parts = [0, 0]
    for name, path in found.paths.items():
        parts[path.startswith(seeing)] += folder[name].size
    total = f"{sum(parts):,}"
    return f"{total} ({parts[0]:,} language, {parts[1]:,} vision)" if parts[1] else total


def _stored(folder: TensorFolder) -> str:
    sizes: Counter[str] = Counter()
    for tensor in folder.values():
        sizes[tensor.stored_as] += tensor.size
    return f"{sum(tensor.stored_bytes for tensor in folder.values()):,} bytes of {_list_dtypes(sizes)}"


def _list_dtypes(sizes: Counter[str]) -> str:
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{name} ({count:,})" for name, count in sizes.most_common())


def _mapped(found: Match) -> str:
    parts = [f"{len(found.paths):,} used"]
    for names, what in (
        (found.copies, "stored beside a tied embedding"),
        (found.ignored, "ignored by rule"),
        (found.unmapped, "not known"),
        (found.missing, "missing"),
    ):
        if names:
            parts.append(f"{len(names):,} {what}")
    return ", ".join(parts)


def _scanned(bad: Sequence[str], count: int) -> str:
    if not bad:
        return f"all {count:,} tensors are finite"
    return f"NaN or infinities in {len(bad):,} of {count:,} tensors: {_listed(bad)}"


def _vocabulary(tokenizer: Tokenizer | None, without: str) -> str:
    return without if tokenizer is None else f"{tokenizer.get_vocab_size():,} tokens"


def _value(config: ModelConfig, field: str) -> str:
    resolved = {"num_kv_heads": "kv_heads", "head_dim": "key_dim", "value_head_dim": "value_dim"}
    value = getattr(config, resolved.get(field, field))
    if dataclasses.is_dataclass(value):
        changed = [
            f"{f.name} {getattr(value, f.name)}"
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != f.default
        ]
        return f"({', '.join(changed)})"
    return str(value)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
