"""A GGUF file of llama.cpp: opened as the Hugging Face folder that it was made from, its tensors dequantised.

Everything that a folder tells in files follows from the metadata: config.json, tokenizer, chat template, the
tokens that end a text. Tensors are read one at a time.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxlab.checkpoints import families
from jaxlab.checkpoints.formats.base import file_digest
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.checkpoints.gguf_config import Origin, named_tensors, origin
from jaxlab.checkpoints.gguf_header import GGUFHeader, check_kinds, read_gguf
from jaxlab.checkpoints.gguf_tokenizer import GGUFTokens
from jaxlab.checkpoints.source_files import SourceFiles
from jaxlab.checkpoints.stray_tensors import without
from jaxlab.checkpoints.tensor_folder import TensorFolder
from jaxlab.models import ModelConfig


class GGUFFile(HuggingFaceFolder):
    """A `.gguf` file, or all shards of one, named by the first."""

    form = "gguf"

    def __init__(
        self, path: Path, *, ignore_keys: Sequence[str] = (), ignore_tensors: Sequence[str] = ()
    ) -> None:
        """
        Args:
          ignore_keys: keys of the metadata to leave out although nobody knows them.
          ignore_tensors: patterns of names of tensors, as Hugging Face has them, to leave out.
        """
        super().__init__(path, ignore_keys=ignore_keys, ignore_tensors=ignore_tensors)

    @functools.cached_property
    def header(self) -> GGUFHeader:
        return read_gguf(self.path)

    @property
    def inputs(self) -> tuple[Path, ...]:
        return self.header.files

    @functools.cached_property
    def _origin(self) -> Origin:
        check_kinds(self.header.tensors.values(), self.path)
        return origin(self.header, self.path, ignore_keys=self.ignore_keys)

    @functools.cached_property
    def described(self) -> ModelConfig:
        return families.read_config(self._origin.config, self.path)

    @functools.cached_property
    def config_json(self) -> dict[str, Any]:
        """As the family writes it: what metadata does not tell is said in full."""
        ids = {key: self._tokens.id_of(f"{key}_token_id") for key in ("bos", "eos")}
        told: dict[str, Any] = {f"{key}_token_id": token for key, token in ids.items() if token is not None}
        if self.ignore_keys:
            told[families.IGNORED_KEYS] = list(self.ignore_keys)
        return {**families.find(self.described.family).write_config(self.described), **told}

    @functools.cached_property
    def stored(self) -> TensorFolder:
        return TensorFolder(self.path, self._origin.config, dict(self.header.tensors))

    @functools.cached_property
    def tensors(self) -> TensorFolder:
        named = named_tensors(self.header, self._origin, self.described)
        return without(TensorFolder(self.path, self._origin.config, named), self.ignore_tensors)

    @property
    def dequantized(self) -> str | None:
        sizes: Counter[str] = Counter()
        for tensor in self.header.tensors.values():
            if tensor.quantized:
                sizes[tensor.kind.name] += tensor.size
        return ", ".join(name for name, _ in sizes.most_common()) or None

    @functools.cached_property
    def _tokens(self) -> GGUFTokens:
        return GGUFTokens(self.header.metadata, self.path)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokens.tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self._tokens.ends)

    @functools.cached_property
    def source_files(self) -> SourceFiles:
        texts = {
            name: json.dumps(value, indent=2) + "\n" for name, value in self._tokens.companions().items()
        }
        if self._tokens.chat_template is not None:
            texts["chat_template.jinja"] = self._tokens.chat_template
        return SourceFiles(None, self.config_json, self.matched.copies, texts)

    @property
    def companion_folder(self) -> Path:
        return self.path.parent

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for file in self.inputs:
            digest.update(file_digest(file))
        return digest.hexdigest()
