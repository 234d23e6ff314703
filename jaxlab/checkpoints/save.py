"""Writing a model, in our form or as a Hugging Face folder."""

import os
from collections.abc import Iterable, Mapping
from typing import Literal

from tokenizers import Tokenizer

from jaxlab.checkpoints.compatibility import differences
from jaxlab.checkpoints.formats import hf_write, orbax_folder
from jaxlab.checkpoints.formats.base import OpenModel
from jaxlab.checkpoints.source_files import SourceFiles
from jaxlab.models import ModelConfig, Params


def save_model(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    form: Literal["orbax", "huggingface"] = "orbax",
    source_files: SourceFiles | None = None,
    extra_files: Mapping[str, str] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> None:
    """Write a model folder: aside first, so that `path` is always whole or absent.

    Args:
      source_files: of the model that it was made from (`OpenModel.source_files`): config.json, tokenizer and
        processor of Hugging Face, which are copied.
      extra_files: texts of further files, by name.
      inputs: files and folders that it was made from, which are never replaced (see `check_output`).
      overwrite: replace a folder that was written here.

    Raises:
      UserError: `path` may not be written, the disk is full, or no family of Hugging Face can describe the
        model.
    """
    write = hf_write.save if form == "huggingface" else orbax_folder.save
    write(
        path,
        config,
        params,
        tokenizer,
        source_files=source_files,
        extra_files=extra_files,
        inputs=inputs,
        overwrite=overwrite,
    )


def kept_files(opened: OpenModel, config: ModelConfig) -> SourceFiles | None:
    """The files beside the tensors of a model for one that was trained from it, if they still describe it."""
    same = config.family == opened.config.family and not differences(config, opened.config)
    return opened.source_files if same else None
