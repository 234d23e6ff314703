"""A model in a Hugging Face folder: opened without trust, every tensor accounted for before one is read."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import families, lora
from jaxlab.checkpoints.formats.base import Form, NotFinite, OpenModel, digest_of
from jaxlab.checkpoints.fp8 import dequantized
from jaxlab.checkpoints.source_files import SourceFiles
from jaxlab.checkpoints.stray_tensors import unwrapped, without
from jaxlab.checkpoints.tensor_folder import CONFIG, TensorFolder, inside, open_folder, read_json
from jaxlab.checkpoints.tokenizer_files import read_tokenizer
from jaxlab.checkpoints.unexpected_tensors import Match, TensorAccount, account, match
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig

if TYPE_CHECKING:  # `inspect` looks into a folder without jax
    import jax

    from jaxlab.models import Params


class HuggingFaceFolder(OpenModel):
    """A folder with config.json and tensors, whose names are those of a family."""

    form: ClassVar[Form] = "huggingface"

    def __init__(
        self,
        path: Path,
        *,
        adapter: Path | None = None,
        allow_pickle: bool = False,
        ignore_keys: Sequence[str] = (),
        ignore_tensors: Sequence[str] = (),
    ) -> None:
        """
        Args:
          adapter: a folder with a LoRA adapter, merged into the tensors as they are read.
          allow_pickle: read PyTorch's .bin files where there are no safetensors.
          ignore_keys: keys of config.json to leave out although nobody knows them.
          ignore_tensors: patterns of names of tensors to leave out.
        """
        super().__init__(path)
        self.adapter = adapter
        self.allow_pickle = allow_pickle
        self.ignore_keys = tuple(ignore_keys)
        self.ignore_tensors = tuple(ignore_tensors)

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (self.path,) if self.adapter is None else (self.path, self.adapter)

    @functools.cached_property
    def config_json(self) -> dict[str, Any]:
        return read_json(inside(self.path, CONFIG))

    @functools.cached_property
    def stored(self) -> TensorFolder:
        """The tensors as the files have them."""
        return open_folder(self.path, config=self.config_json, allow_pickle=self.allow_pickle)

    @functools.cached_property
    def tensors(self) -> TensorFolder:
        """The tensors as they are read: scales of float8 and the adapter are in them."""
        folder = without(unwrapped(dequantized(self.stored)), self.ignore_tensors)
        if self.adapter is None:
            return folder
        return lora.merged(folder, self.adapter, allow_pickle=self.allow_pickle)

    @functools.cached_property
    def described(self) -> ModelConfig:
        """What config.json describes, whatever the tensors are."""
        config = families.read_config(self.tensors.config, self.path, ignore_keys=self.ignore_keys)
        word = families.image_word(config, self.config_json)
        if word is None:
            return config
        try:
            token = None if self.tokenizer is None else self.tokenizer.token_to_id(word)
        except UserError:  # said where the tokenizer is needed
            token = None
        return config if token is None else families.with_image_token(config, token)

    @functools.cached_property
    def template(self) -> "Params":
        """Shapes of the parameters by the config."""
        from jaxlab.models import abstract_params

        return abstract_params(self.described)

    @functools.cached_property
    def account(self) -> TensorAccount:
        """What becomes of every tensor.

        Raises:
          UserError: tensors are missing, not known or wrong.
        """
        _check_size(self.tensors, self.described)
        found = account(self.tensors, self.described, self.template)
        found.check(self.path)
        return found

    @functools.cached_property
    def matched(self) -> Match:
        """What becomes of every name; `account` looks at shapes, too, and needs jax.

        Raises:
          UserError: config.json asks for more names than there can be.
        """
        _check_size(self.tensors, self.described)
        return match(self.tensors, self.described)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """With the variant whose names the folder has in `family`."""
        found = self.account
        computes = _compute_dtype(self.tensors, found)
        return dataclasses.replace(self.described, family=found.family, compute_dtype=computes)

    def config_in(self, dtype: "jax.typing.DTypeLike | None") -> ModelConfig:
        if dtype is None:
            return self.config
        half = np.dtype(dtype).name == "bfloat16"
        return dataclasses.replace(self.config, compute_dtype="bfloat16" if half else "float32")

    def shapes_in(self, dtype: "jax.typing.DTypeLike | None") -> "Params":
        import jax

        from jaxlab.checkpoints.sharded_read import leaf_dtype

        dtypes = {p: leaf_dtype(self.tensors, e, dtype) for e in self.account.entries for p in e.paths}
        place = lambda path, x: jax.ShapeDtypeStruct(x.shape, dtypes[tuple(key.key for key in path)])
        return jax.tree_util.tree_map_with_path(place, self.template)

    @property
    def summary(self) -> str:
        return self.account.summary

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        return read_tokenizer(self.path, self.config_json)

    @functools.cached_property
    def source_files(self) -> SourceFiles:
        config = self.config_json
        if self.ignore_keys:
            known = dict.fromkeys((*families.recorded(config), *self.ignore_keys))
            config = {**config, families.IGNORED_KEYS: list(known)}
        return SourceFiles(self.path, config, self.matched.copies)

    @functools.cached_property
    def identity(self) -> str:
        own = super().identity
        return own if self.adapter is None else digest_of(own, self.adapter)

    def _read(self, shardings: "Params | None", dtype: np.dtype | None, not_finite: NotFinite) -> "Params":
        from jaxlab.checkpoints.sharded_read import read_params

        tensors, found, template = self.tensors, self.account, self.template  # their errors name the folder
        try:
            return read_params(
                tensors,
                found,
                template,
                shardings=shardings,
                dtype=dtype,
                not_finite=not_finite,
            )
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error


def _check_size(folder: TensorFolder, config: ModelConfig) -> None:
    """Refuses a config that would make more names than the folder can hold.

    Raises:
      UserError: it would.
    """
    count = config.num_layers + (0 if config.vision is None else config.vision.num_layers)
    experts = 1 if config.moe is None else config.moe.num_experts
    if count > len(folder) or count * experts > 256 * len(folder):
        raise UserError(
            f"{folder.path}: config.json says {count} layers of {experts} experts, the folder holds "
            f"{len(folder)} tensors"
        )


def _compute_dtype(folder: TensorFolder, found: TensorAccount) -> Any:
    """bfloat16 if most of the model is stored so; float32 otherwise, since float16 would overflow."""
    sizes: dict[str, int] = {}
    for entry in found.entries:
        for name in entry.names:
            tensor = folder[name]
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
    return "bfloat16" if max(sizes, key=lambda name: sizes[name]) == "bfloat16" else "float32"
