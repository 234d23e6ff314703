"""The architectures of llama.cpp, and how each becomes a config.json of Hugging Face.

llama.cpp's converters (ggml-org/llama.cpp, conversion/) rename, and for some architectures reorder or shift
what they write; what its programs take for granted (llama.cpp, src/models/) no key tells.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.families.settings import CONVERT_FIRST
from jaxlab.checkpoints.gguf_header import GGUFHeader
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Change:
    """What llama.cpp does to a tensor, undone."""

    values: Callable[[np.ndarray, ModelConfig], np.ndarray]
    """As Hugging Face has them, from those of the file."""
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
    """Theirs from that of the file."""


_INERT = frozenset(("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type"))
"""Keys that do not change what the logits are: the vocabulary is counted in the embedding."""
FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
_MOST_LAYERS, _MOST_NUMBERS = 1 << 12, 1 << 12
FREQUENCIES = "rope_freqs.weight"
_SOFTMAX = 1
_YARN = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
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
        """A whole number of at least 1."""
        found = self.whole(key)
        if found is None:
            raise UserError(f"{self.where}: {self.prefix}{key} is missing")
        if found < 1:
            raise self.wrong(key, "at least 1")
        return found

    def number(self, key: str) -> float | None:
        """A positive number."""
        found = self.value(key)
        if found is not None and (type(found) not in (int, float) or not 0 < found < math.inf):
            raise self.wrong(key, "a positive number")
        return None if found is None else float(found)

    def word(self, key: str) -> str | None:
        found = self.value(key)
        if found is not None and not isinstance(found, str):
            raise self.wrong(key, "a word")
        return found

    def flag(self, key: str, default: bool) -> bool:
        found = self.value(key)
        if found is not None and type(found) is not bool:
            raise self.wrong(key, "true or false")
        return default if found is None else found

    def vector(self, tensor: str) -> list[float]:
        """The numbers of a tensor, each the shortest that it is.

        Raises:
          UserError: they are not as many as a vector of this model may hold.
        """
        found = self.header.tensors[tensor]
        if found.size > _MOST_NUMBERS:
            raise UserError(f"{self.where}: {tensor} holds {found.size} numbers")
        return [float(str(number)) for number in found.read().astype(np.float32).reshape(-1)]

    def has(self, tensor: str) -> bool:
        return tensor in self.header.tensors

    def rows(self, tensor: str) -> int:
        """Of the matrices in a tensor."""
        found = self.header.tensors.get(tensor)
        if found is None or len(found.shape) < 2:
            raise UserError(f"{self.where}: {tensor} is missing, or no matrix")
        return found.shape[-2]

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
                f"leave it out: --ignore-keys {key}{CONVERT_FIRST}"
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
    r"layers\.(attention\.(query|output)|mlp\.(up|down))": Change(
        lambda values, c: values.T, lambda shape: shape[::-1]
    ),
}
_SQUEEZED: Mapping[str, Change] = {
    r".*\.moe\.shared_gate": Change(
        lambda values, c: values.reshape(1, -1), lambda shape: (1, *shape) if len(shape) == 1 else shape
    )
}


def _decoder(metadata: Metadata, partial: str | None = None) -> Json:
    """What most have: groups of heads, and rotary positions.

    Args:
      partial: the key that says which part of a head turns, where a part of it may.
    """
    width, heads = metadata.needed("embedding_length"), metadata.needed("attention.head_count")
    length = metadata.whole("attention.key_length") or width // max(heads, 1)
    turned = metadata.whole("rope.dimension_count") or length
    if partial is None and turned != length:
        raise metadata.wrong("rope.dimension_count", f"all {length} of a head")
    if metadata.whole("attention.value_length") not in (None, length):
        raise metadata.wrong("attention.value_length", f"that of the keys, {length}")
    return {
        "num_key_value_heads": metadata.whole("attention.head_count_kv") or heads,
        "head_dim": length,
        "rope_theta": metadata.number("rope.freq_base") or 10000.0,
        **({} if partial is None else {partial: turned / max(length, 1)}),
        **_rope(metadata),
    }


def _rope(metadata: Metadata) -> Json:
    """How rotary positions are stretched."""
    told = [metadata.number(key) for key in ("rope.scaling.factor", "rope.scale_linear")]
    factor = next((number for number in told if number is not None), None)
    kind = metadata.word("rope.scaling.type")
    if kind is None:  # as llama.cpp takes it
        kind = "none" if factor in (None, 1.0) else "linear"
    original = metadata.whole("rope.scaling.original_context_length")
    scaling: Json | None = None
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for theirs, ours in _YARN.items():
            value = metadata.number(f"rope.scaling.{theirs}")
            if value is not None:
                scaling[ours] = value
    elif kind not in ("none", "longrope") or (
        kind == "longrope" and not metadata.has(FACTORS["long_factor"])
    ):
        raise metadata.wrong("rope.scaling.type", "none, linear or yarn")
    if metadata.has(FREQUENCIES):
        if scaling is not None:
            raise UserError(f"{metadata.where}: {FREQUENCIES} beside rope.scaling.type {kind} is not read")
        scaling = _llama3(metadata)
    return {} if scaling is None else {"rope_scaling": scaling}


def _llama3(metadata: Metadata) -> Json | None:
    """Llama 3's stretching, of which a file holds the factor of each frequency.

    Raises:
      UserError: they are of no setting that is known.
    """
    factors = np.asarray(metadata.vector(FREQUENCIES))
    base = metadata.number("rope.freq_base") or 10000.0
    wavelengths = 2 * math.pi * base ** (np.arange(len(factors)) / len(factors))
    largest = float(factors.max())
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
    raise UserError(f"{metadata.where}: {FREQUENCIES} stretches rotary positions in a way that is not known")


def _biased(metadata: Metadata) -> Json:
    return {**_decoder(metadata), "attention_bias": metadata.has("blk.0.attn_q.bias")}


def _plain_llama(metadata: Metadata) -> Json:
    return {**_biased(metadata), "mlp_bias": metadata.has("blk.0.ffn_up.bias")}


def _llama(metadata: Metadata) -> Json:
    """Mixtral, where there are experts."""
    if metadata.whole("expert_count"):
        return {"model_type": "mixtral", **_experts("num_local_experts")(metadata)}
    metadata.read.add("expert_used_count")
    return _plain_llama(metadata)


def _scalar(metadata: Metadata, large: int) -> Json:
    """Gemma's scale of scores; llama.cpp knows the model that has another one by its number of layers."""
    width, heads = metadata.needed("embedding_length"), metadata.needed("attention.head_count")
    is_large = metadata.needed("block_count") == large
    return {"query_pre_attn_scalar": width // heads if is_large else metadata.needed("attention.key_length")}


def _gemma2(metadata: Metadata) -> Json:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    given = {key: metadata.number(key) for key in caps if metadata.number(key) is not None}
    window = metadata.whole("attention.sliding_window") or 4096
    return {**_decoder(metadata), **_scalar(metadata, 46), **given, "sliding_window": window}


def _gemma3(metadata: Metadata) -> Json:
    window, period = (metadata.whole(f"attention.sliding_window{key}") for key in ("", "_pattern"))
    return {
        **_decoder(metadata),
        **_scalar(metadata, 62),
        "final_logit_softcapping": metadata.number("final_logit_softcapping"),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa") or 10000.0,
        "sliding_window": window or 4096,
        "sliding_window_pattern": (period or 6) if window else 1,
    }


def _experts(count: str) -> Callable[[Metadata], Json]:
    def read(metadata: Metadata) -> Json:
        if metadata.whole("expert_gating_func") not in (None, _SOFTMAX):
            raise metadata.wrong("expert_gating_func", f"{_SOFTMAX}, a softmax")
        return {
            **_decoder(metadata),
            count: metadata.needed("expert_count"),
            "num_experts_per_tok": metadata.needed("expert_used_count"),
        }

    return read


def _qwen3_moe(metadata: Metadata) -> Json:
    width = metadata.needed("expert_feed_forward_length")
    return {
        **_biased(metadata),
        **_experts("num_experts")(metadata),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


def _qwen2_moe(metadata: Metadata) -> Json:
    widths = {
        "moe_intermediate_size": ("expert_feed_forward_length", "blk.0.ffn_gate_exps.weight"),
        "shared_expert_intermediate_size": (
            "expert_shared_feed_forward_length",
            "blk.0.ffn_gate_shexp.weight",
        ),
    }
    told = {ours: metadata.whole(key) or metadata.rows(tensor) for ours, (key, tensor) in widths.items()}
    return {**_experts("num_experts")(metadata), **told, "norm_topk_prob": False}


def _olmoe(metadata: Metadata) -> Json:
    return {**_biased(metadata), **_experts("num_experts")(metadata), "norm_topk_prob": False}


def _granite(metadata: Metadata) -> Json:
    factors = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    told = {ours: metadata.number(key) for ours, key in factors.items()}
    return {**_plain_llama(metadata), **{key: value for key, value in told.items() if value is not None}}


def _cohere(metadata: Metadata) -> Json:
    return {**_biased(metadata), "logit_scale": metadata.number("logit_scale") or 1.0}


def _command_r(metadata: Metadata) -> Json:
    return {**_cohere(metadata), "use_qk_norm": metadata.has("blk.0.attn_q_norm.weight")}


def _cohere2(metadata: Metadata) -> Json:
    return {**_cohere(metadata), **_slides(metadata, 4)}


def _seed_oss(metadata: Metadata) -> Json:
    return {**_plain_llama(metadata), "attention_out_bias": metadata.has("blk.0.attn_output.bias")}


def _slides(metadata: Metadata, period: int) -> Json:
    """Which layers slide: by an array, or all but every `period`-th one."""
    window = metadata.whole("attention.sliding_window")
    pattern = metadata.header.metadata.get(metadata.prefix + "attention.sliding_window_pattern", period)
    metadata.read.add("attention.sliding_window_pattern")
    layers = metadata.needed("block_count")
    if type(pattern) is int and pattern > 0:
        pattern = np.arange(1, min(layers, _MOST_LAYERS) + 1) % pattern != 0
    if not isinstance(pattern, np.ndarray) or len(pattern) != layers:
        raise metadata.wrong(
            "attention.sliding_window_pattern", f"a period, or true and false for {layers} layers"
        )
    kinds = ["sliding_attention" if slides and window else "full_attention" for slides in pattern]
    return {"sliding_window": window or None, "layer_types": kinds}


def _gpt_neox(metadata: Metadata) -> Json:
    found = _decoder(metadata, "rotary_pct")
    del found["num_key_value_heads"], found["head_dim"]
    return {
        **found,
        "attention_bias": metadata.has("blk.0.attn_qkv.bias"),
        "use_parallel_residual": metadata.flag("use_parallel_residual", True),
    }


def _stablelm(metadata: Metadata) -> Json:
    return {
        **_decoder(metadata, "partial_rotary_factor"),
        "use_parallel_residual": metadata.flag("use_parallel_residual", False),
        "use_qkv_bias": metadata.has("blk.0.attn_q.bias"),
        "qk_layernorm": metadata.has("blk.0.attn_q_norm.weight"),
    }


def _phi2(metadata: Metadata) -> Json:
    normed = metadata.has("blk.0.attn_q_norm.weight")
    return {**_decoder(metadata, "partial_rotary_factor"), "qk_layernorm": normed}


def _phi3(metadata: Metadata) -> Json:
    """Factors of wavelengths are tensors; the one of attention follows from the lengths."""
    window = metadata.whole("attention.sliding_window") or None
    original = metadata.whole("rope.scaling.original_context_length")
    attention = metadata.number("rope.scaling.attn_factor")
    kind = metadata.word("rope.scaling.type")
    found = {**_decoder(metadata, "partial_rotary_factor"), "sliding_window": window}
    factors = {key: metadata.vector(tensor) for key, tensor in FACTORS.items() if metadata.has(tensor)}
    if not factors:
        return found
    length = metadata.needed("context_length")
    if len(factors) < len(FACTORS) or original is None or original < 2 or kind not in (None, "longrope"):
        raise UserError(
            f"{metadata.where}: {', '.join(FACTORS.values())} stretch positions in a way that is not known"
        )
    expected = math.sqrt(1 + math.log(max(length / original, 1)) / math.log(original))
    if attention is not None and not math.isclose(attention, expected, rel_tol=1e-4):
        raise metadata.wrong("rope.scaling.attn_factor", f"{expected:.6g}, by the lengths")
    return {
        **found,
        "rope_scaling": {"rope_type": "longrope", **factors},
        "original_max_position_embeddings": original,
    }


def _olmo2(metadata: Metadata) -> Json:
    """OLMo 3, where layers slide."""
    if not metadata.whole("attention.sliding_window"):
        return _biased(metadata)
    return {"model_type": "olmo3", **_biased(metadata), **_slides(metadata, 4)}


def _pairs_of_heads(values: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Queries, keys and values of head after head, from all queries, then all keys and all values."""
    heads, rest = config.num_heads, values.shape[1:]
    parts = values.reshape(3, heads, len(values) // heads // 3, *rest)
    return parts.swapaxes(0, 1).reshape(values.shape)


_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

_LAYER_NORM = _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _DECODER, _llama, _PAIRS),
    "qwen2": Architecture("qwen2", _DECODER, _decoder),
    "qwen3": Architecture("qwen3", _DECODER, _biased),
    "qwen3moe": Architecture("qwen3_moe", _DECODER, _qwen3_moe),
    "gemma": Architecture("gemma", _DECODER, _decoder, _SHIFTED_NORMS),
    "gemma2": Architecture("gemma2", _DECODER, _gemma2, _SHIFTED_NORMS),
    "gemma3": Architecture("gemma3_text", _DECODER, _gemma3, _SHIFTED_NORMS),
    "qwen2moe": Architecture("qwen2_moe", _DECODER, _qwen2_moe, _SQUEEZED),
    "olmoe": Architecture("olmoe", _DECODER, _olmoe),
    "granite": Architecture("granite", _DECODER, _granite, _PAIRS),
    "command-r": Architecture("cohere", _LAYER_NORM, _command_r),
    "cohere2": Architecture("cohere2", _LAYER_NORM, _cohere2),
    "exaone4": Architecture(
        "exaone4", _DECODER, lambda metadata: {**_decoder(metadata), **_slides(metadata, 4)}
    ),
    "seed_oss": Architecture("seed_oss", _DECODER, _seed_oss),
    "smollm3": Architecture("smollm3", _DECODER, _plain_llama, _PAIRS),
    "olmo2": Architecture("olmo2", _DECODER, _olmo2),
    "phi2": Architecture("phi", _LAYER_NORM, _phi2),
    "phi3": Architecture("phi3", _DECODER, _phi3),
    "stablelm": Architecture("stablelm", _LAYER_NORM, _stablelm),
    "gptneox": Architecture(
        "gpt_neox", _LAYER_NORM, _gpt_neox, {r"layers\.attention\.query(_bias)?": Change(_pairs_of_heads)}
    ),
    "gpt2": Architecture("gpt2", _GPT2, changes=_TURNED),
}
"""By general.architecture."""
