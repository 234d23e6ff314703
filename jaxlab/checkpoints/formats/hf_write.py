"""Writing a model as a Hugging Face folder: the family that can describe it, its names, its config.json."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import families
from jaxlab.checkpoints.blocked_copy import copy_by_blocks
from jaxlab.checkpoints.compatibility import difference
from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.formats.base import OpenModel
from jaxlab.checkpoints.fp8 import QUANTIZED
from jaxlab.checkpoints.fused_qkv import join_fused
from jaxlab.checkpoints.source_files import SourceFiles
from jaxlab.checkpoints.tensor_folder import CONFIG, Planned, write_folder
from jaxlab.checkpoints.tensor_map import Entry, entries, leaf_at
from jaxlab.checkpoints.tensor_table import EMBEDDING
from jaxlab.checkpoints.tokenizer_files import TOKENIZER
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    source_files: SourceFiles | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    extra_files: Mapping[str, str] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers loads: config.json, tensors under their names, tokenizer files.

    Args:
      source_files: config.json and tokenizer files that the model came with; they are copied, and the config
        is checked against `config`.
      dtype: write the tensors in this dtype instead of their own.
      extra_files: texts of further files, by name.
      inputs: what the model was made from, which is never replaced (see `write_aside`).

    Raises:
      UserError: `path` may not be written, the disk is full, or no family can describe the model.
    """
    config = dataclasses.replace(config, family=hf_family(config, source_files))
    text = huggingface_config(config, source_files)
    texts = {**(source_files.texts if source_files is not None else {}), **(extra_files or {})}
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer.to_str(pretty=True)
    largest = max(jax.tree.leaves(params), key=lambda leaf: leaf.size)
    text = with_dtype(text, np.dtype(largest.dtype if dtype is None else dtype).name)
    write_folder(
        path,
        _planned(params, config.family, () if source_files is None else source_files.copies, dtype),
        config=text,
        copy_from=None if source_files is None else source_files.folder,
        texts=texts,
        inputs=inputs,
        overwrite=overwrite,
    )


def hf_family(config: ModelConfig, source_files: SourceFiles | None = None) -> str:
    """The family under whose names a model is written; for one of our own the first that can describe it.

    A variant's names are for a model that keeps its config.json; without one it gets the family's own.

    Raises:
      UserError: there is none.
    """
    own = families.find(config.family).name if config.family != "jaxlab" else None
    problems = []
    for name, family in families.all_families().items():
        if name != own and (own is not None or config.has_vision):
            continue
        as_theirs = config if own is not None else dataclasses.replace(config, family=name)
        try:
            different = difference(as_theirs, family.read_config(family.write_config(as_theirs)))
        except UserError as error:
            different = str(error)
        if different is None:
            return as_theirs.family if source_files is not None else as_theirs.family.partition("/")[0]
        problems.append(different)
    if own is not None:
        raise UserError(f"the family {own} cannot describe this model: {problems[0]}")
    raise UserError("no family of Hugging Face can describe this model; keep it as a folder of ours")


def huggingface_config(config: ModelConfig, source_files: SourceFiles | None) -> Json:
    """The config.json of a model: that of its source files, or one that its family writes.

    Raises:
      UserError: no family can describe the model, or it is not what that config.json says.
    """
    family = hf_family(config, source_files)
    if source_files is None:
        return families.find(family).write_config(dataclasses.replace(config, family=family))
    text, where = source_files.config, CONFIG if source_files.folder is None else source_files.folder / CONFIG
    described = families.read_config(text, where)
    if families.image_word(described, text) is not None:  # the tokenizer told it
        described = families.with_image_token(described, config.image_token)
    different = difference(config, described)
    if different is not None:
        raise UserError(f"{where}: not this model any more: {different}")
    return text


def huggingface_form(opened: OpenModel, dtype: str) -> tuple[Json, SourceFiles | None]:
    """config.json of a model whose tensors are written in `dtype`, and the files beside it. A model that is a
    Hugging Face folder keeps its own, unless it says another dtype or a quantisation that is undone.

    Raises:
      UserError: no family can describe the model.
    """
    source = opened.source_files
    if opened.form not in ("huggingface", "gguf"):
        return with_dtype(huggingface_config(opened.config, source), dtype), source
    assert source is not None
    text = source.config
    inner = text.get("text_config")
    said = {
        c.get(key) for c in (text, inner or {}) if isinstance(c, dict) for key in ("dtype", "torch_dtype")
    }
    if QUANTIZED in text or said - {None, dtype}:
        text = with_dtype(text, dtype)
    return text, source


def tensors(
    config: ModelConfig, params: Params, source_files: SourceFiles | None = None
) -> dict[str, Callable[[], np.ndarray]]:
    """What a folder of the model holds: each tensor by its name, made when it is asked for."""
    copies = () if source_files is None else source_files.copies
    planned = _planned(params, hf_family(config, source_files), copies, None)
    return {tensor.name: tensor.get for tensor in planned}


def with_dtype(text: Json, name: str) -> Json:
    """config.json with the dtype of the tensors that are written, which are not quantized."""
    text = {key: value for key, value in text.items() if key != "quantization_config"}
    for key in {"torch_dtype", "dtype"} & set(text) or {"torch_dtype"}:
        text[key] = name
    for key in ("text_config", "llm_config", "vision_config"):
        inner = text.get(key)
        if isinstance(inner, dict) and {"torch_dtype", "dtype"} & set(inner):
            text[key] = with_dtype(inner, name)
    return text


def _planned(
    params: Params, family: str, copies: tuple[str, ...], dtype: jax.typing.DTypeLike | None
) -> Iterator[Planned]:
    """Every tensor that is written, in the order of our leaves."""
    for entry in entries(params, family):
        leaf = leaf_at(params, entry.path)
        wanted = np.dtype(leaf.dtype if dtype is None else dtype)
        # One leaf is on the host at a time: its tensors come one after the other.
        on_host = functools.lru_cache(maxsize=1)(lambda entry=entry: _on_host(params, entry))
        names = (*entry.names, *(copies if entry.path == EMBEDDING else ()))
        for index, name in enumerate(names):
            at = index % len(entry.names)  # a copy is the one tensor of its entry
            get = functools.partial(_tensor, entry, at, on_host, wanted)
            yield Planned(name, wanted, entry.shape(params), get)


def _on_host(params: Params, entry: Entry) -> list[np.ndarray]:
    from jaxlab.models import to_host  # and Flax with it, which a merge of folders has no need of

    leaves = [to_host(leaf_at(params, path)) for path in entry.paths]
    return [leaf.reshape(len(entry.names), *leaf.shape[entry.lead :]) for leaf in leaves]


def _tensor(entry: Entry, index: int, on_host: Any, dtype: np.dtype) -> np.ndarray:
    """One tensor in Hugging Face's layout."""
    leaves = [leaf[index] for leaf in on_host()]
    parts = [np.empty(entry.layout.shape(leaf.shape), leaf.dtype) for leaf in leaves]
    for leaf, part in zip(leaves, parts, strict=True):
        copy_by_blocks(*entry.layout.pair(part, leaf))
    shapes = [leaf.shape for leaf in leaves]
    tensor = np.asarray(join_fused(parts, entry.layout, entry.join, shapes, runs=entry.runs, module=np))
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
