"""Task `inspect`: what a model is, and what can be merged with it, from configs and headers alone."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tokenizers import Tokenizer

from jaxlab.app import model_folder
from jaxlab.checkpoints import families
from jaxlab.checkpoints.comparing import language_differences
from jaxlab.checkpoints.folder import TensorFolder, open_folder
from jaxlab.checkpoints.fp8 import dequantized
from jaxlab.checkpoints.kept import KEPT
from jaxlab.checkpoints.locate import kind_of
from jaxlab.checkpoints.matching import Match, match
from jaxlab.checkpoints.tokenizer_files import common_prefix, read_tokenizer
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig

_SHOWN = 6


@dataclass(frozen=True)
class Arguments:
    """Tell what models are, and which can be merged."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of Hugging Face or of ours, hub ids, run folders, .bin files of llama2.c."""
    allow_pickle: bool = False
    """Look into PyTorch's .bin files where there are no safetensors."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("which models? name at least one", key="models")


@dataclass(frozen=True)
class Model:
    """What is known of a model without its tensors."""

    name: str
    config: ModelConfig
    lines: tuple[tuple[str, str], ...]
    tokenizer: Tokenizer | None
    problems: str = ""
    """What makes it no model of its family; "": nothing."""


def run(arguments: Arguments) -> None:
    models = [look(name, allow_pickle=arguments.allow_pickle) for name in arguments.models]
    for model in models:
        print(model.name)
        for key, value in model.lines:
            print(f"  {key:<16}{value}")
    for first, other in _pairs(models):
        print(f"{first.name} + {other.name}")
        for line in compare(first, other):
            print(f"  {line}")
    for model in models:
        if model.problems:
            raise UserError(f"{model.name}: not the family {model.config.family}: {model.problems}")


def look(name: str, *, allow_pickle: bool = False) -> Model:
    """One model. Raises UserError if it is none, or of no known family."""
    path = model_folder(name)
    if kind_of(path) != "huggingface":
        return _own(name, path)
    opened = open_folder(path, allow_pickle=allow_pickle)
    folder = dequantized(opened)  # without the scales, which are no parameters
    config = families.read_config(folder.config, folder.path)
    found = match(folder, config)
    config = dataclasses.replace(config, family=found.family)
    tokenizer, said = _tokenizer(path)
    lines = [
        *_described(config),
        ("parameters", _parameters(folder, found)),
        ("stored", _stored(opened)),
        ("tensors", _mapped(found)),
        ("tokenizer", said),
    ]
    problems = [
        f"{len(names)} tensors {what}: {_listed(names)}"
        for what, names in (("missing", found.missing), ("not known", found.unmapped))
        if names
    ]
    return Model(name, config, tuple(lines), tokenizer, "; ".join(problems))


def _own(name: str, path: Path) -> Model:
    """A model of ours, or of llama2.c: their sizes are known to Orbax and to jax."""
    import jax

    from jaxlab.checkpoints import loading

    config, shapes = loading.load_model_config(path), loading.stored_shapes(path)
    leaves = jax.tree.leaves(shapes)
    sizes = Counter({str(leaf.dtype): 0 for leaf in leaves})
    for leaf in leaves:
        sizes[str(leaf.dtype)] += leaf.size
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    tokenizer = loading.load_tokenizer(path)
    kind = "llama2.c" if path.is_file() else "ours (Orbax)"
    lines = [
        *_described(config),
        ("parameters", f"{sum(sizes.values()):,}"),
        ("stored", f"{stored:,} bytes of {_list_dtypes(sizes)}, {kind}"),
        ("tokenizer", _said_of(tokenizer, "bytes" if config.family == "jaxlab" else "none")),
    ]
    if (path / KEPT).is_dir():
        lines.append(("came from", "a folder of Hugging Face, whose files it keeps"))
    return Model(name, config, tuple(lines), tokenizer)


def compare(first: Model, other: Model) -> list[str]:
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


def _policies(first: Model, other: Model, shared: int) -> list[str]:
    """A line for each value of `embeddings` in a recipe."""
    keep = f"embeddings: vlm keeps those of {first.name}"
    known = [first.tokenizer, other.tokenizer]
    own = first.config.family == other.config.family == "jaxlab"
    if any(tokenizer is None for tokenizer in known) and not own:
        unknown = "whether their tokens agree is unknown without tokenizers"
        return [keep, f"embeddings: merge merges {shared:,} rows; {unknown}"]
    common = common_prefix(known)
    common = shared if common is None else min(common, shared)
    lines = [f"token ids: the first {common:,} are the same"]
    lines.append(f"{keep}{' (the only choice that is safe)' if common == 0 else ''}")
    if common:
        lines.append(f"embeddings: merge_common_rows merges the first {common:,} rows")
        if common == shared:
            lines.append("embeddings: merge does the same, since all shared rows agree")
        else:
            lines.append(f"embeddings: merge would mix rows of different tokens from {common:,} on")
    return lines


def _pairs(models: Sequence[Model]) -> list[tuple[Model, Model]]:
    """The first model with vision, else the first, beside each of the others."""
    first = next((m for m in models if m.config.has_vision), models[0])
    return [(first, model) for model in models if model is not first]


def _described(c: ModelConfig) -> list[tuple[str, str]]:
    lines = [("family", c.family)]
    if c.family != "jaxlab" and not families.find(c.family).forward:
        lines[0] = ("family", f"{c.family} (converted and merged, not run)")
    heads = f"{c.num_heads} heads" + ("" if c.kv_heads == c.num_heads else f" ({c.kv_heads} key/value)")
    lines.append(("language model", f"{c.num_layers} layers, width {c.width}, {heads} of {c.key_dim}"))
    if c.moe.num_experts:
        dense = f", {c.dense_layers} layers without" if c.dense_layers else ""
        lines.append(("experts", f"{c.moe.experts_per_token} of {c.moe.num_experts} of {c.moe.width}{dense}"))
    kinds = Counter(c.kinds)
    if set(kinds) != {"full"}:
        said = [f"{n} {kind}" + (f" ({c.window})" if kind == "sliding" else "") for kind, n in kinds.items()]
        lines.append(("attention", ", ".join(said)))
    scaling = "" if c.rope.scaling == "none" else f", rotary positions stretched ({c.rope.scaling})"
    lines.append(("context", f"{c.max_length:,} tokens{scaling}"))
    head = "head is the embedding" if c.tie_embeddings else "head of its own"
    lines.append(("vocabulary", f"{c.embedding_rows:,} rows, {head}"))
    if c.has_vision:
        v = c.vision
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
        sizes[tensor.dtype.name] += tensor.size
    return f"{sum(tensor.nbytes for tensor in folder.values()):,} bytes of {_list_dtypes(sizes)}"


def _list_dtypes(sizes: Counter[str]) -> str:
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{name} ({count:,})" for name, count in sizes.most_common())


def _mapped(found: Match) -> str:
    parts = [f"{len(found.paths):,} used"]
    for names, what in (
        (found.copies, "a copy of the embedding"),
        (found.ignored, "ignored by rule"),
        (found.unmapped, "not known"),
        (found.missing, "missing"),
    ):
        if names:
            parts.append(f"{len(names):,} {what}")
    return ", ".join(parts)


def _tokenizer(path: Path) -> tuple[Tokenizer | None, str]:
    try:
        found = read_tokenizer(path)
    except UserError as error:
        return None, str(error)
    return found, _said_of(found, "none")


def _said_of(tokenizer: Tokenizer | None, without: str) -> str:
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
