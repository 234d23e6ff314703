"""A model by its name, wherever it comes from: a folder of ours or of Hugging Face, a hub id, llama2.c."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer

from jaxlab.checkpoints import huggingface, llama2c, native
from jaxlab.checkpoints.folder import CONFIG, read_json
from jaxlab.checkpoints.kept import KEPT, Kept, read_kept
from jaxlab.checkpoints.locate import Kind, kind_of, resolve
from jaxlab.checkpoints.tokenizer_files import read_tokenizer
from jaxlab.models import ModelConfig, Params, abstract_params


def load_model(
    path: str | Path, *, shardings: Params | None = None, dtype: jax.typing.DTypeLike | None = None
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """The model at `path`: a folder or file, or a hub id `owner/name` or `owner/name@revision`.

    Args:
      shardings: a tree like the parameters of `jax.sharding.Sharding`: each tensor is read straight to where
        it will live. None: the default device.
      dtype: read the tensors in this dtype instead of the one they are stored in.

    Returns:
      config, parameters and tokenizer; None: the model reads bytes, or came without one (see `words_of`).

    Raises:
      UserError: there is no such model, or it is damaged, or not of a known family.
    """
    path = resolve(path)
    kind = kind_of(path)
    if kind == "native":
        return native.load_model(path, shardings=shardings, dtype=dtype)
    if kind == "huggingface":
        return huggingface.load(path, shardings=shardings, dtype=dtype)
    config, params, tokenizer = llama2c.load(path)
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return config, params if shardings is None else jax.device_put(params, shardings), tokenizer


def load_model_config(path: str | Path) -> ModelConfig:
    """The config of a model; nothing but headers is read, and those are checked. Raises UserError."""
    path = resolve(path)
    readers: dict[Kind, Callable[[Path], ModelConfig]] = {
        "native": native.load_model_config,
        "huggingface": lambda folder: huggingface.open_checkpoint(folder).config,
        "llama2c": lambda file: llama2c.read_config(file)[0],
    }
    return readers[kind_of(path)](path)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a model. Raises UserError if it cannot be read."""
    path = resolve(path)
    kind = kind_of(path)
    if kind != "llama2c":
        return native.load_tokenizer(path) if kind == "native" else read_tokenizer(path)
    beside = llama2c.find_tokenizer(path)
    return None if beside is None else llama2c.read_tokenizer(beside, llama2c.read_config(path)[0])


def stored_shapes(path: str | Path) -> Params:
    """Shapes and dtypes of the parameters of a model, from headers alone. Raises UserError."""
    path = resolve(path)
    kind = kind_of(path)
    if kind == "native":
        return native.stored_shapes(path)
    if kind == "huggingface":
        return huggingface.open_checkpoint(path).shapes()
    return abstract_params(llama2c.read_config(path)[0])


def model_identity(path: str | Path) -> str:
    """A digest of a model's files: changes when the model does. Raises UserError."""
    path = resolve(path)
    if kind_of(path) == "native":
        return native.model_identity(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(json.dumps(file.name if file == path else str(file.relative_to(path))).encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def kept_of(path: str | Path) -> Kept | None:
    """What a model keeps of a folder of Hugging Face; None if it never was one. Raises UserError."""
    path = resolve(path)
    kind = kind_of(path)
    if kind == "huggingface":
        return huggingface.open_checkpoint(path).kept
    return read_kept(path) if kind == "native" else None


def companion_folder(path: str | Path) -> Path:
    """Where the files beside a model's tensors are: config.json, tokenizer and processor of Hugging Face."""
    path = resolve(path)
    return path / KEPT if kind_of(path) == "native" else path


def end_tokens(path: str | Path) -> frozenset[int]:
    """The tokens that end a text, by the files of the model; none where they say nothing.

    Raises:
      UserError: a file that says so is damaged.
    """
    if kind_of(resolve(path)) == "llama2c":
        return frozenset({llama2c.BOS, llama2c.EOS})
    folder = companion_folder(path)
    for name in ("generation_config.json", CONFIG):
        said: Any = read_json(folder / name) if (folder / name).is_file() else {}
        found = said.get("eos_token_id", (said.get("text_config") or {}).get("eos_token_id"))
        ids = found if isinstance(found, list) else [found]
        if all(type(token) is int for token in ids):
            return frozenset(ids)
    return frozenset()
