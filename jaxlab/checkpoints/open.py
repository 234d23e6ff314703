"""Opening a model, wherever it comes from: a folder of ours or of Hugging Face, a hub id, GGUF, llama2.c."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from jaxlab.checkpoints.formats.base import OpenModel, parameter_dtype
from jaxlab.checkpoints.formats.described_folder import DescribedFolder
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.checkpoints.locate import form_of, resolve, split_adapter
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig

if TYPE_CHECKING:  # a Hugging Face folder is looked into without jax
    import jax

    from jaxlab.models import Params


def open_model(
    reference: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    offline: bool = False,
    ignore_keys: Sequence[str] = (),
    ignore_tensors: Sequence[str] = (),
) -> OpenModel:
    """The model that `reference` names: a folder or file, a run, or a hub id `owner/name[@revision]`; with a
    LoRA adapter `model+adapter`.

    Nothing but its form is found out here; the rest is read when it is asked for, once.

    Args:
      adapter: a folder with a LoRA adapter, or its hub id, merged into the tensors of a Hugging Face folder.
      allow_pickle: read PyTorch's .bin files where there are no safetensors (no code from them is run).
      revision: commit, tag or branch of a hub id that names none.
      offline: take a hub id from the cache alone.
      ignore_keys: keys of a Hugging Face config.json that no family knows, to leave out; what is written of
        the model notes them.
      ignore_tensors: tensors of a Hugging Face folder to leave out: names, * and ? for what varies.

    Raises:
      UserError: there is no such model.
    """
    if adapter is None and isinstance(reference, str):
        reference, adapter = split_adapter(reference)
    path = resolve(reference, revision=revision, offline=offline, allow_pickle=allow_pickle)
    form = form_of(path)
    if form == "huggingface":
        merged = None if adapter is None else resolve(adapter, allow_pickle=allow_pickle)
        return HuggingFaceFolder(
            path,
            adapter=merged,
            allow_pickle=allow_pickle,
            ignore_keys=ignore_keys,
            ignore_tensors=ignore_tensors,
        )
    if form == "gguf" and adapter is None:
        from jaxlab.checkpoints.formats.gguf_file import GGUFFile

        return GGUFFile(path, ignore_keys=ignore_keys, ignore_tensors=ignore_tensors)
    options = {"adapter": adapter, "ignore-keys": ignore_keys, "ignore-tensors": ignore_tensors}
    for option, given in options.items():
        if given:
            raise UserError(f"{path}: --{option} is for folders of Hugging Face; convert it to one first")
    if form == "llama2c":
        from jaxlab.checkpoints.formats.llama2c import Llama2cFile

        return Llama2cFile(path)
    from jaxlab.checkpoints.formats.orbax_folder import OrbaxFolder

    return OrbaxFolder(path)


def describe_model(reference: str | os.PathLike[str]) -> OpenModel:
    """As `open_model`, but of a Hugging Face folder config.json and a tokenizer are enough; for checks.

    Raises:
      UserError: there is no such model.
    """
    opened = open_model(reference)
    if type(opened) is not HuggingFaceFolder:
        return opened
    tensors = (*opened.path.glob("*.safetensors*"), *opened.path.glob("pytorch_model*.bin*"))
    return opened if tensors else DescribedFolder(opened.path)


def load_model(
    path: str | Path,
    *,
    shardings: "Params | None" = None,
    mesh: "jax.sharding.Mesh | Mapping[str, int] | None" = None,
    dtype: "jax.typing.DTypeLike | None" = None,
) -> "tuple[ModelConfig, Params, Tokenizer | None]":
    """The config, parameters and tokenizer of a model; see `open_model` and `OpenModel.read`.

    Args:
      shardings: a tree like the parameters, where each of them is to live.
      mesh: instead, devices over which they are split: a `jax.sharding.Mesh`, or the sizes of its axes, such
        as {"fsdp": 4, "model": 2}. Run the model under `jaxlab.models.using(mesh)`, or `jax.set_mesh`.
      dtype: of the parameters, instead of the one that they are stored in.

    Returns:
      config, parameters and tokenizer; None: the model reads bytes, or came without one.

    Raises:
      UserError: there is no such model, or it is damaged, or not of a known family; a dtype that parameters
        cannot have; a mesh that does not fit the devices or the model.
    """
    if dtype is not None:
        parameter_dtype(dtype)
    opened = open_model(path)
    config, tokenizer = opened.config_in(dtype), opened.tokenizer
    if mesh is not None:
        from jaxlab.models import mesh_of

        mesh = mesh_of(mesh)
    return config, opened.read(shardings=shardings, mesh=mesh, dtype=dtype), tokenizer
