"""A model that has been opened: what its headers and files say, read when it is first asked for."""

import abc
import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints.source_files import SourceFiles
from jaxlab.errors import UserError, UserNote
from jaxlab.models import ModelConfig

if TYPE_CHECKING:  # jax is imported where a tensor, or the shape of one, is asked for
    import jax

    from jaxlab.models import Params
    from jaxlab.processing import Processor

Form = Literal["orbax", "huggingface", "llama2c", "gguf"]
NotFinite = Literal["take", "warn", "refuse"]
"""What to do about NaN and infinities among the parameters."""
_DTYPES = ("float32", "bfloat16", "float16")


class OpenModel(abc.ABC):
    """A model on disk. No property reads a tensor, and none reads a file again that was read before.

    Every property, and `read`, raises UserError for a file that is missing, damaged or not known.
    """

    form: ClassVar[Form]

    def __init__(self, path: Path) -> None:
        self.path = path
        """The folder, or the file."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that `read` reads: what is made of them must not replace them."""
        return (self.path,)

    @property
    @abc.abstractmethod
    def config(self) -> ModelConfig: ...

    @property
    def described(self) -> ModelConfig:
        """What its files describe, whatever the tensors are; as `config` where there is no difference."""
        return self.config

    @functools.cached_property
    def shapes(self) -> "Params":
        """Shapes and dtypes of the parameters as they are stored."""
        return self.shapes_in(None)

    @abc.abstractmethod
    def shapes_in(self, dtype: "jax.typing.DTypeLike | None") -> "Params":
        """Shapes and dtypes that parameters read in `dtype` have; None: the stored one."""

    @property
    def summary(self) -> str:
        """What became of its tensors, in a few words."""
        import jax

        return f"{len(jax.tree.leaves(self.shapes))} parameters, stacked over layers"

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """None: the model reads bytes, or came without one."""

    @property
    def chat_template(self) -> str | None:
        """Of several templates the default one, in Jinja; None: the model has none."""
        return None if self.source_files is None else self.source_files.chat_template

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """All of them by name."""
        return {} if self.source_files is None else self.source_files.chat_templates

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Tokens by the names that chat templates ask for: bos_token, eos_token, ..."""
        return {} if self.source_files is None else self.source_files.special_tokens

    @property
    def generation(self) -> Mapping[str, Any]:
        """How the model's authors sample from it, as generation_config.json says it."""
        return {} if self.source_files is None else self.source_files.generation

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, by the files of the model; none where they say nothing."""
        return frozenset() if self.source_files is None else self.source_files.end_tokens

    @property
    @abc.abstractmethod
    def source_files(self) -> SourceFiles | None:
        """The files beside the tensors of a Hugging Face folder; None if the model never was one."""

    @property
    def companion_folder(self) -> Path:
        """Where config.json and the files of tokenizer and processor lie, if the model has any."""
        return self.path

    @functools.cached_property
    def processor(self) -> "Processor":
        """How its images and text become a batch, by its family and the files beside its tensors."""
        from jaxlab.checkpoints import families
        from jaxlab.processing import load_processor

        source, family = self.source_files, self.config.family
        try:
            kinds = families.processor_kinds(family)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return load_processor(self.companion_folder, kinds, config=None if source is None else source.config)

    @property
    def dequantized(self) -> str | None:
        """The types that tensors are dequantised from, so that they are not the original's; None: none."""
        return None

    @property
    def made_by(self) -> dict[str, Any] | None:
        """What a shipped model says of its making: config, command, commit, results."""
        return None

    @functools.cached_property
    def identity(self) -> str:
        """A digest of all files, whole: it changes when the model does."""
        return digest_of("", self.path)

    def read(
        self,
        *,
        shardings: "Params | None" = None,
        mesh: "jax.sharding.Mesh | None" = None,
        dtype: "jax.typing.DTypeLike | None" = None,
        not_finite: NotFinite = "take",
    ) -> "Params":
        """The parameters.

        Args:
          shardings: a tree like the parameters of `jax.sharding.Sharding`: each tensor is read straight to
            where it will live. None: as `mesh` says.
          mesh: devices over which the parameters are split by their logical axes (docs/meshes.md). None: the
            default device.
          dtype: read the tensors in this dtype instead of the one they are stored in.
          not_finite: what to do about NaN and infinities.

        Raises:
          UserError: tensors that are damaged, not the config's, or not finite though that is refused; a dtype
            that parameters cannot have; a size that the mesh cannot split.
        """
        if shardings is None:
            shardings = self.shardings(mesh)
        return self._read(shardings, None if dtype is None else parameter_dtype(dtype), not_finite)

    def shardings(self, mesh: "jax.sharding.Mesh | None") -> "Params | None":
        """Where each parameter lives on a mesh; None: on the default device.

        Raises:
          UserError: a size that the mesh cannot split.
        """
        from jaxlab.models import param_shardings

        config = self.config
        try:
            return None if mesh is None else param_shardings(config, mesh)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def placed(
        self, mesh: "jax.sharding.Mesh | None", dtype: "jax.typing.DTypeLike | None" = None
    ) -> "Params":
        """Shapes and dtypes of the parameters, and where they would live.

        Raises:
          UserError: a size that the mesh cannot split.
        """
        import jax

        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = self.shapes_in(dtype)
        where = self.shardings(mesh) or jax.tree.map(lambda _: here, shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

    @abc.abstractmethod
    def _read(
        self, shardings: "Params | None", dtype: np.dtype | None, not_finite: NotFinite
    ) -> "Params": ...

    def config_in(self, dtype: "jax.typing.DTypeLike | None") -> ModelConfig:
        """The config for parameters that were read in `dtype`."""
        return self.config


def parameter_dtype(dtype: "jax.typing.DTypeLike") -> np.dtype:
    """A dtype that parameters can be read in.

    Raises:
      UserError: it is none.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise UserError(f"no dtype {dtype!r}; parameters are float32, bfloat16 or float16") from None
    if found.name not in _DTYPES:
        raise UserError(f"parameters cannot be {found.name}; they are float32, bfloat16 or float16")
    return found


def is_finite(values: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity. The exponents of 16-bit floats tell it faster than numpy."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(values.dtype.name)
    if exponent is None:
        return bool(np.isfinite(values).all())
    return not ((values.view(np.uint16) & exponent) == exponent).any()


def report_not_finite(name: str, values: np.ndarray, what: NotFinite) -> None:
    """Does about NaN and infinities in one tensor what is asked for.

    Raises:
      UserError: there are some, and they are refused.
    """
    if what == "take" or is_finite(values):
        return
    if what == "refuse":
        raise UserError(f"{name} holds NaN or infinities")
    warnings.warn(f"{name} holds NaN or infinities", UserNote, stacklevel=2)


def report_all_not_finite(params: "Params", path: Path, what: NotFinite) -> None:
    """The same about parameters that have been read.

    Raises:
      UserError: a parameter, which is named, holds NaN or infinities, and they are refused.
    """
    import jax

    if what == "take":
        return
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(leaf_path, simple=True, separator=".")
        report_not_finite(f"{path}: {name}", np.asarray(leaf), what)


def digest_of(before: str, path: Path) -> str:
    """A digest of a file, or of all files of a folder with their names, that follows `before`.

    Raises:
      UserError: a file cannot be read.
    """
    digest = hashlib.sha256(before.encode())
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(json.dumps(file.name if file == path else str(file.relative_to(path))).encode())
        digest.update(file_digest(file))
    return digest.hexdigest()


def file_digest(file: Path) -> bytes:
    """SHA-256 of what a file holds.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
