"""llama2.c's checkpoints and tokenizers: Llama models of any size in one plain file each.

A checkpoint is seven int32 (width, hidden width, layers, heads, key/value heads, vocabulary, context; a
negative vocabulary says that the head is not the embedding), then float32 tensors, layers stacked, matrices
[outputs, inputs]. Its rotary pairs are neighbours; they are moved to halves, so that the model is one of the
family "llama" and can be written as such.
"""

import functools
import math
import os
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from jaxlab.checkpoints.formats.base import NotFinite, OpenModel, report_all_not_finite
from jaxlab.checkpoints.safetensors_file import read_into
from jaxlab.checkpoints.tensor_map import tree_of
from jaxlab.checkpoints.tensor_table import LeafPath, parse
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig, Params, abstract_params
from jaxlab.processing import make_tokenizer

HEADER = struct.Struct("<7i")
BOS, EOS = 1, 2


class Llama2cFile(OpenModel):
    """A `.bin` file, with the tokenizer beside it (see `find_tokenizer`)."""

    form = "llama2c"

    @functools.cached_property
    def _header(self) -> tuple[ModelConfig, bool]:
        return read_config(self.path)

    @property
    def config(self) -> ModelConfig:
        return self._header[0]

    def shapes_in(self, dtype: jax.typing.DTypeLike | None) -> Params:
        shapes = abstract_params(self.config)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), shapes)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        beside = find_tokenizer(self.path)
        return None if beside is None else read_tokenizer(beside, self.config)

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset({BOS, EOS})

    @property
    def source_files(self) -> None:
        return None

    @property
    def companion_folder(self) -> Path:
        return self.path.parent

    def _read(self, shardings: Params | None, dtype: np.dtype | None, not_finite: NotFinite) -> Params:
        config, shared = self._header
        size, offset = self.path.stat().st_size, HEADER.size
        tables = _tensors(config, shared)
        needed = offset + 4 * sum(math.prod(shape) for _, shape, _ in tables)
        if size != needed:
            raise UserError(
                f"{self.path}: no checkpoint of llama2.c: {size} bytes, its header asks for {needed}"
            )
        leaves: dict[LeafPath, Any] = {}
        for leaf, shape, layout in tables:
            values = np.empty(shape, np.float32)
            read_into(self.path, values, offset)
            offset += values.nbytes
            if leaf is None:
                continue
            lead = 1 if leaf[0] == "layers" else 0
            leaves[leaf] = jnp.asarray(_to_ours(values, leaf, layout, config, lead), dtype)
        params = tree_of(leaves)
        report_all_not_finite(params, self.path, not_finite)
        return params if shardings is None else jax.device_put(params, shardings)


def read_config(path: str | os.PathLike[str]) -> tuple[ModelConfig, bool]:
    """The model that a file's header describes, and whether its head is the embedding.

    Raises:
      UserError: the file is no checkpoint of llama2.c.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) < HEADER.size:
        raise UserError(f"{path}: no checkpoint of llama2.c: it is shorter than a header")
    width, hidden, layers, heads, kv_heads, vocabulary, length = HEADER.unpack(raw)
    sizes = (width, hidden, layers, heads, kv_heads, abs(vocabulary), length)
    if not all(0 < size < 1 << 28 for size in sizes) or layers > 10_000 or width % heads:
        raise UserError(f"{path}: no checkpoint of llama2.c: its header holds the sizes {sizes}")
    try:
        config = ModelConfig(
            vocab_size=abs(vocabulary),
            width=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            mlp_width=hidden,
            max_length=length,
            tie_embeddings=vocabulary > 0,
            family="llama",
        )
    except ConfigError as error:
        raise UserError(f"{path}: no checkpoint of llama2.c: {error}") from None
    return config, vocabulary > 0


def _tensors(config: ModelConfig, shared: bool) -> list[tuple[LeafPath | None, tuple[int, ...], str]]:
    """Leaf, shape and layout (of one layer) of everything in the file, in its order."""
    c, layers = config, config.num_layers
    q, kv, half = c.num_heads * c.key_dim, c.kv_heads * c.key_dim, c.key_dim // 2
    attention, mlp = ("layers", "attention"), ("layers", "mlp")
    tables: list[tuple[LeafPath | None, tuple[int, ...], str]] = [
        (("embedding", "table"), (c.vocab_size, c.width), "v d -> v d"),
        (("layers", "attention_norm", "scale"), (layers, c.width), "d -> d"),
        ((*attention, "query"), (layers, q, c.width), "(h k) d -> d h k"),
        ((*attention, "key"), (layers, kv, c.width), "(h k) d -> d h k"),
        ((*attention, "value"), (layers, kv, c.width), "(h k) d -> d h k"),
        ((*attention, "output"), (layers, c.width, q), "d (h k) -> h k d"),
        (("layers", "mlp_norm", "scale"), (layers, c.width), "d -> d"),
        ((*mlp, "gate"), (layers, c.mlp_width, c.width), "f d -> d f"),
        ((*mlp, "down"), (layers, c.width, c.mlp_width), "d f -> f d"),
        ((*mlp, "up"), (layers, c.mlp_width, c.width), "f d -> d f"),
        (("final_norm", "scale"), (c.width,), "d -> d"),
        (None, (2, c.max_length, half), ""),  # cosines and sines, which follow from the config
    ]
    if not shared:
        tables.append((("head", "table"), (c.vocab_size, c.width), "v d -> d v"))
    return tables


def _to_ours(values: np.ndarray, leaf: LeafPath, layout: str, config: ModelConfig, lead: int) -> np.ndarray:
    heads = config.num_heads if leaf[-1] in ("query", "output") else config.kv_heads
    c = config
    sizes = {"v": c.vocab_size, "d": c.width, "f": c.mlp_width, "h": heads, "k": c.key_dim}
    parsed = parse(layout)
    ours = np.asarray(parsed.to_ours(values, tuple(sizes[axis] for axis in parsed.ours), lead))
    if leaf[-1] in ("query", "key"):
        neighbours = np.arange(config.key_dim).reshape(-1, 2)  # pairs (2i, 2i + 1) to (i, i + half)
        ours = ours[..., neighbours.T.reshape(-1)]
    return np.ascontiguousarray(ours)


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer beside a checkpoint: tokenizer.bin, or the only file named tok*.bin."""
    if (path.parent / "tokenizer.bin").is_file():
        return path.parent / "tokenizer.bin"
    found = sorted(file for file in path.parent.glob("tok*.bin") if file != path)
    return found[0] if len(found) == 1 else None


def read_tokenizer(path: str | os.PathLike[str], config: ModelConfig) -> Tokenizer:
    """A tokenizer of llama2.c: an int32, then a float32 score, an int32 length and the bytes of each token.

    It is a byte-pair encoding whose better scores merge first, with single bytes to fall back on; texts begin
    with a space and the token `<s>`.

    Raises:
      UserError: the file does not hold one token for each row of the embedding.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    pieces, scores, at = [], [], 4
    for index in range(config.vocab_size):
        if at + 8 > len(raw):
            raise UserError(f"{path}: holds {index} tokens, the model has {config.vocab_size}")
        score, length = struct.unpack_from("<fi", raw, at)
        if not 0 <= length <= len(raw) - at - 8:
            raise UserError(f"{path}: cut off, or no tokenizer of llama2.c")
        at += 8 + length
        try:
            pieces.append(raw[at - length : at].decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}: no tokenizer of llama2.c: token {index} is no UTF-8") from None
        scores.append(score)
    if at != len(raw):
        raise UserError(f"{path}: holds more than the {config.vocab_size} tokens of the model")
    pieces = ["<unk>", "<s>", "</s>", *(piece.replace(" ", "▁") for piece in pieces[3:])]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = sorted(
        (-scores[vocabulary[piece]], index, piece[:cut], piece[cut:])
        for index, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if index > 258 and piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )  # 0 ... 258: <unk>, <s>, </s> and the bytes
    make = lambda: Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer = make_tokenizer(make, path)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    return tokenizer
