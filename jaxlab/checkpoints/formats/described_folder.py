"""A Hugging Face folder without tensors: what config.json and the tokenizer say is enough for `--check`."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from jaxlab.checkpoints import families
from jaxlab.checkpoints.formats.base import NotFinite, parameter_dtype
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.checkpoints.source_files import SourceFiles
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig

if TYPE_CHECKING:
    import jax

    from jaxlab.models import Params


class DescribedFolder(HuggingFaceFolder):
    """A model of which there is the description alone; its parameters have the shapes that follow from it."""

    @functools.cached_property
    def described(self) -> ModelConfig:
        return families.read_config(self.config_json, self.path, ignore_keys=self.ignore_keys)

    @functools.cached_property
    def _dtype(self) -> str:
        inner = self.config_json.get("text_config")
        for said in (self.config_json, inner if isinstance(inner, dict) else {}):
            for key in ("dtype", "torch_dtype"):
                if isinstance(name := said.get(key), str):
                    return parameter_dtype(name).name
        return "float32"

    @functools.cached_property
    def config(self) -> ModelConfig:
        half = self._dtype == "bfloat16"
        return dataclasses.replace(self.described, compute_dtype="bfloat16" if half else "float32")

    def shapes_in(self, dtype: "jax.typing.DTypeLike | None") -> "Params":
        import jax

        stored = np.dtype(self._dtype if dtype is None else parameter_dtype(dtype))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), self.template)

    @functools.cached_property
    def source_files(self) -> SourceFiles:
        return SourceFiles(self.path, self.config_json)

    def _read(self, shardings: "Params | None", dtype: np.dtype | None, not_finite: NotFinite) -> "Params":
        raise UserError(f"{self.path}: holds no tensors, only what describes them")
