"""A model of ours on disk: a folder with config.yaml (the ModelConfig), params/ (Orbax) and tokenizer.json.

Without tokenizer.json the model reads bytes. A model that came from a folder of Hugging Face keeps in
huggingface/ what it needs to become one again (source_files.py).
"""

import functools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from jaxlab import distributed
from jaxlab.checkpoints.compatibility import check_same_tree
from jaxlab.checkpoints.digests import DIGESTS, find_damage
from jaxlab.checkpoints.formats.base import NotFinite, OpenModel, report_all_not_finite
from jaxlab.checkpoints.locate import OWN_CONFIG, OWN_PARAMS
from jaxlab.checkpoints.orbax_tree import restore_tree, save_tree, unreadable
from jaxlab.checkpoints.output_folder import write_aside
from jaxlab.checkpoints.source_files import SOURCE, SourceFiles, read_source_files
from jaxlab.checkpoints.tokenizer_files import TOKENIZER, load_tokenizer_file
from jaxlab.config import Source, dump
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import writing
from jaxlab.models import ModelConfig, Params, abstract_params, from_flat, is_flat

MADE_BY = "made_by.json"


class OrbaxFolder(OpenModel):
    """A model folder of ours."""

    form = "orbax"

    @functools.cached_property
    def config(self) -> ModelConfig:
        self._check_links()
        file = self.path / OWN_CONFIG
        source = Source.of_file(file)
        if is_flat(source.tree):
            try:
                source.tree = from_flat(source.tree)
            except ConfigError as error:
                raise error.at(str(file)) from None
        return source.build(ModelConfig)

    def shapes_in(self, dtype: jax.typing.DTypeLike | None) -> Params:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), self._stored)

    @functools.cached_property
    def _stored(self) -> Params:
        self._check_links()
        path = self.path.absolute() / OWN_PARAMS
        with unreadable(path), ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise FileNotFoundError("it holds no metadata")
            return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), dict(metadata))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        self._check_links()
        file = self.path / TOKENIZER
        return load_tokenizer_file(file) if file.exists() else None

    @functools.cached_property
    def source_files(self) -> SourceFiles | None:
        return read_source_files(self.path)

    @property
    def companion_folder(self) -> Path:
        return self.path / SOURCE

    @functools.cached_property
    def made_by(self) -> dict[str, Any] | None:
        file = self.path / MADE_BY
        return dict(json.loads(file.read_text())) if file.is_file() else None

    @functools.cached_property
    def identity(self) -> str:
        self._check_links()
        return super().identity

    def _read(self, shardings: Params | None, dtype: np.dtype | None, not_finite: NotFinite) -> Params:
        expected = abstract_params(self.config)
        check_same_tree(self.shapes, expected, self.path)
        if shardings is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: here, expected)
        place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        path = self.path.absolute() / OWN_PARAMS
        # Folders of before have no digests.
        if (path / DIGESTS).exists() and (damage := find_damage(path)):
            raise UserError(f"{path}: damaged: {damage}")
        params: Params = restore_tree(path, jax.tree.map(place, self.shapes_in(dtype), shardings))
        report_all_not_finite(params, self.path, not_finite)
        return params

    def _check_links(self) -> None:
        """Whether this is a model folder of ours without a link that leads out of it.

        Raises:
          UserError: it is not.
        """
        path = self.path
        if not path.is_dir():
            raise UserError(f"{path}: no such model folder")
        if not (path / OWN_CONFIG).is_file() or not (path / OWN_PARAMS).is_dir():
            raise UserError(f"{path}: not a model folder of ours: it needs {OWN_CONFIG} and {OWN_PARAMS}/")
        root = path.resolve()
        for file in path.rglob("*"):
            if file.is_symlink() and not file.resolve().is_relative_to(root):
                raise UserError(f"{file}: leads out of the model folder; put the file itself there")


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    source_files: SourceFiles | None = None,
    extra_files: Mapping[str, str] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> None:
    """Write a model folder: aside first, so that `path` is always whole or absent.

    Args:
      source_files: those of the Hugging Face folder that the model came from; they are copied.
      extra_files: texts of further files, by name.
      inputs: what the model was made from, which is never replaced (see `write_aside`).

    Raises:
      UserError: `path` may not be written, or the disk is full.
    """
    with writing(path), write_aside(path, inputs, overwrite=overwrite) as folder:
        if distributed.is_main():
            _write_small_files(folder, config, tokenizer, source_files, extra_files or {})
        save_tree(folder / OWN_PARAMS, params)


def _write_small_files(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    source_files: SourceFiles | None,
    extra_files: Mapping[str, str],
) -> None:
    (folder / OWN_CONFIG).write_text(dump(config))
    if source_files is not None:
        source_files.copy_to(folder)
    if tokenizer is not None and (folder / SOURCE / TOKENIZER).exists():  # its bytes, not our form of it
        shutil.copyfile(folder / SOURCE / TOKENIZER, folder / TOKENIZER)
    elif tokenizer is not None:
        tokenizer.save(str(folder / TOKENIZER))
    for name, text in extra_files.items():
        (folder / name).write_text(text, encoding="utf-8")
