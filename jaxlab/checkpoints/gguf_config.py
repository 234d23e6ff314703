"""What llama.cpp makes of a model of Hugging Face, undone: config.json from metadata, tensors by their names.

llama.cpp's converters (ggml-org/llama.cpp, conversion/) rename, and for some architectures reorder or shift
what they write. The package `gguf` knows the names; what is done to the values stands in ARCHITECTURES below.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from jaxlab.checkpoints import families
from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.gguf_header import GGUFHeader, QuantizedTensor
from jaxlab.checkpoints.safetensors_file import Tensor, check_rows
from jaxlab.checkpoints.tensor_table import Row
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Change:
    """What llama.cpp does to a tensor, undone."""

    values: Callable[[np.ndarray, ModelConfig], np.ndarray]
    """As Hugging Face has them, from those of the file."""
    turned: bool = False
    """Whether a matrix lies the other way round."""


_INERT = frozenset(
    ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.causal", "pooling_type")
)
"""Keys that do not change what the logits are: the vocabulary is counted in the embedding."""
_FREQUENCIES = "rope_freqs.weight"
_LOW, _HIGH, _ORIGINAL_LENGTHS = 1.0, 4.0, (8192, *(1 << power for power in range(4, 21)))
"""Of Llama 3's stretching, as all its models have them; the length is Llama 3's, or another power of two."""


class Metadata:
    """The keys of an architecture; each is asked for, or refused by `done`."""

    def __init__(
        self, header: GGUFHeader, architecture: str, where: object, ignore_keys: Sequence[str] = ()
    ) -> None:
        self.header, self.where, self.ignore_keys = header, where, ignore_keys
        self.prefix = f"{architecture}."
        self.read: set[str] = set()

    def wrong(self, key: str, expected: str) -> UserError:
        found = self.header.metadata.get(self.prefix + key)
        return UserError(f"{self.where}: {self.prefix}{key} must be {expected}, is {str(found)[:60]}")

    def value(self, key: str) -> Any:
        """A number, a word, or an array; None where the key is absent. float32 as the shortest number it is.

        Raises:
          UserError: one number for each layer, and not the same for all.
        """
        self.read.add(key)
        found = self.header.metadata.get(self.prefix + key)
        if isinstance(found, np.ndarray) and found.size and (found == found.flat[0]).all():
            found = found.flat[0].item()
        return float(str(np.float32(found))) if isinstance(found, float) else found

    def whole(self, key: str) -> int | None:
        found = self.value(key)
        if found is not None and type(found) is not int:
            raise self.wrong(key, "a whole number")
        return found

    def needed(self, key: str) -> int:
        found = self.whole(key)
        if found is None:
            raise UserError(f"{self.where}: {self.prefix}{key} is missing")
        return found

    def has(self, tensor: str) -> bool:
        return tensor in self.header.tensors

    def done(self) -> None:
        """Whether every key was asked for.

        Raises:
          UserError: one that may matter was not.
        """
        unread = {
            key
            for key in self.header.metadata
            if key.startswith(self.prefix) and key.removeprefix(self.prefix) not in self.read | _INERT
        }
        for key in sorted(unread - set(self.ignore_keys)):
            told = str(self.header.metadata[key])[:60]
            raise UserError(
                f"{self.where}: {key} {told} is not known; if it does not change what the model computes, "
                f"leave it out: --ignore-keys {key}"
            )
        idle = [key for key in self.ignore_keys if key not in unread]
        if idle:
            raise UserError(f"{self.where}: --ignore-keys {idle[0]}: the metadata lacks it, or it is read")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of model as llama.cpp writes it."""

    model_type: str
    """Of config.json; it names the family."""
    keys: Mapping[str, str]
    """Of metadata, all needed, and what they are called in config.json."""
    more: Callable[[Metadata], Json] = lambda metadata: {}
    """Keys of config.json that take more than a new name."""
    changes: Mapping[str, Change] = dataclasses.field(default_factory=dict)
    """What is done to a tensor, by a pattern of the whole path of the (first) leaf that it holds."""


_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_DECODER = _SIZES | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}


def _neighbours_to_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads whose rotary pairs are neighbours, so that pair i is (i, i + half)."""
    rows, *rest = values.shape
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


_PAIRS: Mapping[str, Change] = {
    r".*\.attention\.query(_bias)?": Change(lambda values, c: _neighbours_to_halves(values, c.num_heads)),
    r".*\.attention\.key(_bias)?": Change(lambda values, c: _neighbours_to_halves(values, c.kv_heads)),
}
_SHIFTED_NORMS: Mapping[str, Change] = {r".*norm\.scale": Change(lambda values, c: values - 1)}
_TURNED: Mapping[str, Change] = {
    r"layers\.(attention\.(query|output)|mlp\.(up|down))": Change(lambda values, c: values.T, turned=True),
}


def _decoder(metadata: Metadata) -> Json:
    """What most have: groups of heads, and rotary positions of all dimensions of a head."""
    width, heads = metadata.needed("embedding_length"), metadata.needed("attention.head_count")
    length = metadata.whole("attention.key_length") or width // max(heads, 1)
    if metadata.whole("rope.dimension_count") not in (None, length):
        raise metadata.wrong("rope.dimension_count", f"all {length} of a head")
    if metadata.whole("attention.value_length") not in (None, length):
        raise metadata.wrong("attention.value_length", f"that of the keys, {length}")
    return {
        "num_key_value_heads": metadata.whole("attention.head_count_kv") or heads,
        "head_dim": length,
        "rope_theta": metadata.value("rope.freq_base") or 10000.0,
        **_rope(metadata),
    }


def _rope(metadata: Metadata) -> Json:
    """How rotary positions are stretched."""
    kind = metadata.value("rope.scaling.type") or "none"
    factor = metadata.value("rope.scaling.factor") or metadata.value("rope.scale_linear")
    metadata.read.add("rope.scale_linear")
    original = metadata.whole("rope.scaling.original_context_length")
    scaling: Json | None = None
    if kind == "linear" or (kind == "none" and factor not in (None, 1.0) and original is None):
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            value = metadata.value(f"rope.scaling.{theirs}")
            if value is not None:
                scaling[ours] = value
    elif kind != "none":
        raise metadata.wrong("rope.scaling.type", "none, linear or yarn")
    if metadata.has(_FREQUENCIES):
        if scaling is not None:
            raise UserError(f"{metadata.where}: {_FREQUENCIES} beside rope.scaling.type {kind} is not read")
        scaling = _llama3(metadata)
    return {} if scaling is None else {"rope_scaling": scaling}


def _llama3(metadata: Metadata) -> Json | None:
    """Llama 3's stretching, of which a file holds the factor of each frequency.

    Raises:
      UserError: they are of no setting that is known.
    """
    factors = metadata.header.tensors[_FREQUENCIES].read().astype(np.float64).reshape(-1)
    base = metadata.value("rope.freq_base") or 10000.0
    wavelengths = 2 * math.pi * base ** (np.arange(len(factors)) / len(factors))
    largest = float(str(np.float32(factors.max())))
    if (factors == 1).all():
        return None
    for original in _ORIGINAL_LENGTHS:
        smooth = np.clip((original / wavelengths - _LOW) / (_HIGH - _LOW), 0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / largest + smooth), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise UserError(f"{metadata.where}: {_FREQUENCIES} stretches rotary positions in a way that is not known")


def _biased(metadata: Metadata) -> Json:
    return {**_decoder(metadata), "attention_bias": metadata.has("blk.0.attn_q.bias")}


def _llama(metadata: Metadata) -> Json:
    return {**_biased(metadata), "mlp_bias": metadata.has("blk.0.ffn_up.bias")}


def _scalar(metadata: Metadata, large: int) -> Json:
    """Gemma's scale of scores; llama.cpp knows the model that has another one by its number of layers."""
    width, heads = metadata.needed("embedding_length"), metadata.needed("attention.head_count")
    is_large = metadata.needed("block_count") == large
    return {"query_pre_attn_scalar": width // heads if is_large else metadata.needed("attention.key_length")}


def _gemma2(metadata: Metadata) -> Json:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    given = {key: metadata.value(key) for key in caps if metadata.value(key) is not None}
    window = metadata.whole("attention.sliding_window") or 4096
    return {**_decoder(metadata), **_scalar(metadata, 46), **given, "sliding_window": window}


def _gemma3(metadata: Metadata) -> Json:
    window, period = (metadata.whole(f"attention.sliding_window{key}") for key in ("", "_pattern"))
    return {
        **_decoder(metadata),
        **_scalar(metadata, 62),
        "final_logit_softcapping": metadata.value("final_logit_softcapping"),
        "rope_local_base_freq": metadata.value("rope.freq_base_swa") or 10000.0,
        "sliding_window": window or 4096,
        "sliding_window_pattern": (period or 6) if window else 1,
    }


def _experts(count: str) -> Callable[[Metadata], Json]:
    return lambda metadata: {
        **_decoder(metadata),
        count: metadata.needed("expert_count"),
        "num_experts_per_tok": metadata.needed("expert_used_count"),
    }


def _qwen3_moe(metadata: Metadata) -> Json:
    width = metadata.needed("expert_feed_forward_length")
    return {
        **_biased(metadata),
        **_experts("num_experts")(metadata),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _DECODER, _llama, _PAIRS),
    "mixtral": Architecture("mixtral", _DECODER, _experts("num_local_experts"), _PAIRS),
    "qwen2": Architecture("qwen2", _DECODER, _decoder),
    "qwen3": Architecture("qwen3", _DECODER, _biased),
    "qwen3moe": Architecture("qwen3_moe", _DECODER, _qwen3_moe),
    "gemma": Architecture("gemma", _DECODER, _decoder, _SHIFTED_NORMS),
    "gemma2": Architecture("gemma2", _DECODER, _gemma2, _SHIFTED_NORMS),
    "gemma3": Architecture("gemma3_text", _DECODER, _gemma3, _SHIFTED_NORMS),
    "gpt2": Architecture("gpt2", _GPT2, changes=_TURNED),
}
"""By general.architecture; of "llama" with experts "mixtral"."""
_REFUSED = {
    "clip": "the vision tower of a model (mmproj), no model by itself",
    "imatrix": "the importance matrix of a quantisation, no model",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model of Hugging Face that a header tells of."""

    name: str
    """In ARCHITECTURES."""
    architecture: Architecture
    config: Json
    """The keys of config.json that the metadata tells."""


def origin(header: GGUFHeader, where: object, *, ignore_keys: Sequence[str] = ()) -> Origin:
    """What a file was made from.

    Args:
      ignore_keys: keys of the metadata to leave out although nobody knows them.

    Raises:
      UserError: an architecture or a key that is not known.
    """
    name, kind = (header.metadata.get(f"general.{key}") for key in ("architecture", "type"))
    if name in _REFUSED or kind in _REFUSED:
        told = _REFUSED.get(str(name)) or _REFUSED[str(kind)]
        raise UserError(f"{where}: {told}; name the language model's file")
    if kind not in (None, "model"):
        raise UserError(f"{where}: a GGUF file of type {str(kind)[:40]!r}, not a model")
    if not isinstance(name, str) or name not in ARCHITECTURES or name == "mixtral":
        known = ", ".join(sorted(set(ARCHITECTURES) - {"mixtral"}))
        raise UserError(f"{where}: the architecture {str(name)[:40]!r} is not supported; supported: {known}")
    if name == "llama" and header.metadata.get("llama.expert_count"):
        metadata, name = Metadata(header, "llama", where, ignore_keys), "mixtral"
    else:
        metadata = Metadata(header, name, where, ignore_keys)
    architecture = ARCHITECTURES[name]
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{where}: token_embd.weight is missing, or no matrix")
    config: Json = {"model_type": architecture.model_type, "vocab_size": embedding.shape[0]}
    for theirs, ours in architecture.keys.items():
        config[ours] = metadata.value(theirs)
        if config[ours] is None:
            raise UserError(f"{where}: {metadata.prefix}{theirs} is missing")
    config |= architecture.more(metadata)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    metadata.read |= {"expert_count", "expert_used_count"} if name == "llama" else set()  # 0: none
    metadata.done()
    return Origin(name, architecture, config)


def named_tensors(header: GGUFHeader, found: Origin, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a file under the names of Hugging Face, with the values that they have there.

    One that no name is known for keeps its own, to be refused as not known. Experts, which llama.cpp stacks,
    are taken apart. If anything is quantised, all is float32: types of a file differ from layer to layer.
    """
    arch = "llama" if found.name == "mixtral" else found.name
    layers = config.num_layers
    if layers > len(header.tensors):
        raise UserError(f"{header.files[0]}: says {layers} layers, and holds {len(header.tensors)} tensors")
    names = _names(arch, families.rows_of(config.family), layers)
    wide = any(tensor.quantized for tensor in header.tensors.values())
    tensors: dict[str, Tensor] = {}
    for name, stored in header.tensors.items():
        if name == _FREQUENCIES:  # in the config
            continue
        theirs, row = names.get(name, (name, None))
        tensor = _changed(stored, row, found, config, wide)
        if row is None or "{e}" not in theirs:
            tensors[theirs] = dataclasses.replace(tensor, name=theirs)
        else:
            for expert in range(tensor.shape[0]):
                one = theirs.replace("{e}", str(expert))
                tensors[one] = _expert(tensor, expert, one)
    return tensors


def _names(architecture: str, rows: tuple[Row, ...], layers: int) -> dict[str, tuple[str, Row]]:
    """Hugging Face's name of each of llama.cpp's, by the map of the package `gguf`; {e} stays."""
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(arch, layers)
    names: dict[str, tuple[str, Row]] = {}
    for row in rows:
        for layer in range(layers) if "{i}" in row.name else (0,):
            theirs = row.name.replace("{i}", str(layer))
            module, _, kind = theirs.replace(".{e}", "").rpartition(".")
            ours = known.get_name(module)
            if ours is not None:
                names.setdefault(f"{ours}.{kind}", (theirs, row))
    return names


def _changed(
    stored: QuantizedTensor, row: Row | None, found: Origin, config: ModelConfig, wide: bool
) -> Tensor:
    """The tensor with Hugging Face's values; a change needs the whole of it."""
    path = "" if row is None else row.paths[0]
    change = next(
        (c for pattern, c in found.architecture.changes.items() if re.fullmatch(pattern, path)), None
    )
    dtype = np.dtype(np.float32) if wide and stored.dtype.itemsize == 2 else stored.dtype
    if change is None:
        if dtype == stored.dtype:
            return stored
        cast: Callable[[int, int], np.ndarray] = lambda start, stop: stored.read_rows(start, stop).astype(
            dtype
        )
        return Tensor(stored.name, dtype, stored.shape, cast)
    shape = stored.shape[::-1] if change.turned else stored.shape

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        values = change.values(stored.read(), config)[start:stop]
        return np.ascontiguousarray(values.astype(dtype))

    return Tensor(stored.name, dtype, shape, read_rows)


def _expert(stacked: Tensor, expert: int, name: str) -> Tensor:
    shape = stacked.shape[1:]

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        return stacked.read_rows(expert, expert + 1)[0][start:stop]

    return Tensor(name, stacked.dtype, shape, read_rows)
