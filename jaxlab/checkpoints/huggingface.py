"""A model in a Hugging Face folder, in and out, by the rows and rules of its family."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import blocks, families, lora
from jaxlab.checkpoints.accounting import Account, account
from jaxlab.checkpoints.comparing import difference
from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.folder import CONFIG, TensorFolder, inside, open_folder, read_json
from jaxlab.checkpoints.fp8 import dequantized
from jaxlab.checkpoints.kept import Kept
from jaxlab.checkpoints.locate import resolve
from jaxlab.checkpoints.names import Entry, entries, leaf_at
from jaxlab.checkpoints.placing import leaf_dtype, read_params
from jaxlab.checkpoints.rows import EMBEDDING
from jaxlab.checkpoints.tokenizer_files import TOKENIZER, read_tokenizer
from jaxlab.checkpoints.write import Planned, write_folder
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params, abstract_params

_template = functools.lru_cache(maxsize=4)(abstract_params)
"""A folder is opened several times: for its config, its shapes, its tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers have been read, and what it means."""

    folder: TensorFolder
    config: ModelConfig
    """With the variant whose names the folder has in `family`."""
    template: Params
    """Shapes of the parameters."""
    account: Account

    @property
    def kept(self) -> Kept:
        """What a copy of the model keeps of the folder."""
        return Kept(self.folder.path, self.account.copies)

    def shapes(self, dtype: jax.typing.DTypeLike | None = None) -> Params:
        """Shapes and dtypes that the parameters will have."""
        dtypes = {p: leaf_dtype(self.folder, e, dtype) for e in self.account.entries for p in e.paths}
        place = lambda path, x: jax.ShapeDtypeStruct(x.shape, dtypes[tuple(key.key for key in path)])
        return jax.tree_util.tree_map_with_path(place, self.template)


def open_checkpoint(
    path: str | Path, *, adapter: str | Path | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open a folder: config.json is read and every tensor accounted for, none of them read.

    Args:
      adapter: a folder with a LoRA adapter, or its hub id, merged into the tensors as they are read.
      allow_pickle: read PyTorch's .bin files where there are no safetensors.

    Raises:
      UserError: a family, a key or a tensor that is not known; tensors that are missing or of a wrong shape.
    """
    folder = dequantized(open_folder(path, allow_pickle=allow_pickle))
    config = families.read_config(folder.config, folder.path)
    _check_size(folder, config)
    if adapter is not None:
        folder = lora.merged(folder, resolve(adapter, allow_pickle=allow_pickle), allow_pickle=allow_pickle)
    template = _template(config)
    found = account(folder, config, template)
    found.check(folder.path)
    config = dataclasses.replace(config, family=found.family, compute_dtype=_compute_dtype(folder, found))
    return Checkpoint(folder, config, template, found)


def load(
    path: str | Path,
    *,
    shardings: Params | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    adapter: str | Path | None = None,
    allow_pickle: bool = False,
    check_finite: bool = False,
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """The model in a folder; see `open_checkpoint` and `read_params`.

    Raises:
      UserError: the folder is not, or not wholly, a model of a known family.
    """
    checkpoint = open_checkpoint(path, adapter=adapter, allow_pickle=allow_pickle)
    tokenizer = read_tokenizer(checkpoint.folder.path)
    config, params = read(checkpoint, shardings=shardings, dtype=dtype, check_finite=check_finite)
    return config, params, tokenizer


def read(
    checkpoint: Checkpoint,
    *,
    shardings: Params | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    check_finite: bool = False,
) -> tuple[ModelConfig, Params]:
    """The parameters of an open folder, and the config, which computes in `dtype` if that is given."""
    try:
        params = read_params(
            checkpoint.folder,
            checkpoint.account,
            checkpoint.template,
            shardings=shardings,
            dtype=dtype,
            check_finite=check_finite,
        )
    except UserError as error:
        raise UserError(f"{checkpoint.folder.path}: {error}") from error
    config = checkpoint.config
    if dtype is not None:
        half = np.dtype(dtype).name == "bfloat16"
        config = dataclasses.replace(config, compute_dtype="bfloat16" if half else "float32")
    return config, params


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    kept: Kept | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers loads: config.json, tensors under their names, tokenizer files.

    Args:
      kept: config.json and tokenizer files that the model came with; they are taken over, and the config is
        checked against `config`.
      dtype: write the tensors in this dtype instead of their own.

    Raises:
      UserError: `path` exists, the disk is full, or no family can describe the model.
    """
    config = dataclasses.replace(config, family=hf_family(config, kept))
    text = config_json(config, kept)
    largest = max(jax.tree.leaves(params), key=lambda leaf: leaf.size)
    text = _with_dtype(text, np.dtype(largest.dtype if dtype is None else dtype).name)
    write_folder(
        path,
        _planned(params, config.family, () if kept is None else kept.copies, dtype),
        config=text,
        copy_from=None if kept is None else kept.folder,
        overwrite=overwrite,
        texts={} if tokenizer is None else {TOKENIZER: tokenizer.to_str(pretty=True)},
    )


def hf_family(config: ModelConfig, kept: Kept | None = None) -> str:
    """The family under whose names a model is written; for one of our own the first that can describe it.

    A variant's names are for a model that keeps its config.json; without one it gets the family's own.

    Raises:
      UserError: there is none.
    """
    own = families.find(config.family).name if config.family != "jaxlab" else None
    problems = []
    for name, family in families.all_families().items():
        if name != own and (own is not None or config.has_vision or not family.forward):
            continue
        as_theirs = config if own is not None else dataclasses.replace(config, family=name)
        try:
            different = difference(as_theirs, family.read_config(family.write_config(as_theirs)))
        except UserError as error:
            different = str(error)
        if different is None:
            return as_theirs.family if kept is not None else as_theirs.family.partition("/")[0]
        problems.append(different)
    if own is not None:
        raise UserError(f"the family {own} cannot describe this model: {problems[0]}")
    raise UserError("no family of Hugging Face can describe this model; keep it as a folder of ours")


def config_json(config: ModelConfig, kept: Kept | None) -> Json:
    """The config.json of a model: the kept one, or one that its family writes.

    Raises:
      UserError: no family can describe the model, or it is not what the kept config.json says.
    """
    family = hf_family(config, kept)
    if kept is None:
        return families.find(family).write_config(dataclasses.replace(config, family=family))
    text = read_json(inside(kept.folder, CONFIG))
    different = difference(config, families.read_config(text, kept.folder))
    if different is not None:
        raise UserError(f"{kept.folder / CONFIG}: not this model any more: {different}")
    return text


def tensors(
    config: ModelConfig, params: Params, kept: Kept | None = None
) -> dict[str, Callable[[], np.ndarray]]:
    """What a folder of the model holds: each tensor by its name, made when it is asked for."""
    planned = _planned(params, hf_family(config, kept), () if kept is None else kept.copies, None)
    return {tensor.name: tensor.get for tensor in planned}


def _with_dtype(text: Json, name: str) -> Json:
    """config.json with the dtype of the tensors that are written, which are not quantized."""
    text = {key: value for key, value in text.items() if key != "quantization_config"}
    for key in {"torch_dtype", "dtype"} & set(text) or {"torch_dtype"}:
        text[key] = name
    for key in ("text_config", "vision_config"):
        inner = text.get(key)
        if isinstance(inner, dict) and {"torch_dtype", "dtype"} & set(inner):
            text[key] = _with_dtype(inner, name)
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
    leaves = [np.asarray(leaf_at(params, path)) for path in entry.paths]
    return [leaf.reshape(len(entry.names), *leaf.shape[entry.lead :]) for leaf in leaves]


def _tensor(entry: Entry, index: int, on_host: Any, dtype: np.dtype) -> np.ndarray:
    """One tensor in Hugging Face's layout."""
    parts = [leaf[index] for leaf in on_host()]
    shapes = [entry.layout.shape(part.shape) for part in parts]
    joined = sum(shape[entry.join] for shape in shapes) if len(parts) > 1 else 0
    shape = list(shapes[0])
    if joined:
        shape[entry.join] = joined
    tensor, start = np.empty(shape, parts[0].dtype), 0
    for part, own in zip(parts, shapes, strict=True):
        place = tensor
        if joined:
            place = tensor[(slice(None),) * entry.join + (slice(start, start + own[entry.join]),)]
            start += own[entry.join]
        blocks.copy(*entry.layout.pair(place, part))
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)


def _check_size(folder: TensorFolder, config: ModelConfig) -> None:
    """Raises UserError for a config that would make more names than the folder can hold."""
    count = config.num_layers + (0 if config.vision is None else config.vision.num_layers)
    experts = 1 if config.moe is None else config.moe.num_experts
    if count > len(folder) or count * experts > 256 * len(folder):
        raise UserError(
            f"{folder.path}: config.json says {count} layers of {experts} experts, the folder holds "
            f"{len(folder)} tensors"
        )


def _compute_dtype(folder: TensorFolder, found: Account) -> Any:
    """bfloat16 if most of the model is stored so; float32 otherwise, since float16 would overflow."""
    sizes: dict[str, int] = {}
    for entry in found.entries:
        for name in entry.names:
            tensor = folder[name]
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
    return "bfloat16" if max(sizes, key=lambda name: sizes[name]) == "bfloat16" else "float32"
