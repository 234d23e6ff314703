"""Command R, Aya and Command A (Cohere, Cohere2): attention and MLP in parallel, LayerNorm without a bias."""

import dataclasses
from typing import Any

from jaxlab.checkpoints.families import language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.errors import UserError
from jaxlab.models import FullAttentionConfig, LayerKind, ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_NORM: Rows = (Row("attention_norm.scale", "input_layernorm.weight", "d -> d"),)
_HEAD_NORMS: Rows = (
    Row("attention.query_norm.scale", "self_attn.q_norm.weight", "h k -> h k"),
    Row("attention.key_norm.scale", "self_attn.k_norm.weight", "h k -> h k"),
)
_ATTENTION: Rows = (*language.ATTENTION, *language.ATTENTION_BIASES, *language.OUTPUT_BIAS)
_THETA = 500000.0
_ONLY: Json = {
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "order_of_interleaved_layers": "local_attn_first",
}
"""Keys of Cohere's own code, which transformers does not read: its models are always this."""


def _read_common(s: Settings, theta: float) -> dict[str, Any]:
    bias = s.flag("attention_bias")
    for key, expected in _ONLY.items():
        if s.value(key, expected) != expected:
            raise s.refuse(key, f"models of this family have {expected}")
    s.ignore("model_max_length")
    return {
        "position": dataclasses.replace(rope.read_rope(s, theta), interleaved=True),
        "norm": "layer",
        "norm_bias": False,
        "parallel": True,
        "attention_bias": bias,
        "output_bias": bias,
        "logit_scale": s.number("logit_scale", 0.0625),
    }


def _write_common(config: ModelConfig, model_type: str, architecture: str) -> Json:
    return {
        **language.write_decoder(config, model_type, architecture),
        "attention_bias": config.attention_bias,
        "logit_scale": config.logit_scale,
    }


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "cohere", _DEFAULTS)
    normed = s.flag("use_qk_norm")
    return language.read_decoder(s, **_read_common(s, _THETA), qk_norm="each_head" if normed else "none")


def write_config(config: ModelConfig) -> Json:
    keys = _write_common(config, "cohere", "CohereForCausalLM")
    return {**keys, "use_qk_norm": config.qk_norm == "each_head"}


def read_second(config: Json) -> ModelConfig:
    s = Settings(config, "cohere2", _DEFAULTS)
    layers = s.whole("num_hidden_layers", most=1 << 12)
    period = s.whole("sliding_window_pattern", s.whole("_sliding_window_pattern", 4))
    default: list[LayerKind] = ["sliding" if (i + 1) % period else "full" for i in range(layers)]
    attention = language.read_kinds(s, layers, default, s.maybe_whole("sliding_window", 4096))
    if isinstance(attention, FullAttentionConfig):
        raise s.refuse("layer_types", "full layers of this family have no positions, so some must slide")
    if s.value("layer_switch", period) != period and "layer_types" not in s:
        raise s.refuse("layer_switch", f"sliding_window_pattern says {period}")
    fields = _read_common(s, 10000.0)
    fields["position"] = rope.in_sliding_layers(fields["position"], attention)
    return language.read_decoder(s, **fields, attention=attention)


def write_second(config: ModelConfig) -> Json:
    if config.rotary_layers != tuple(kind == "sliding" for kind in config.kinds):
        raise UserError(f"the family {config.family} has positions in sliding layers and in no others")
    return {
        **_write_common(config, "cohere2", "Cohere2ForCausalLM"),
        "sliding_window": language.window_of(config),
        "layer_types": language.layer_types(config),
    }


FIRST = Family(
    name="cohere",
    model_types=("cohere",),
    rows=language.decoder_rows(_NORM, _ATTENTION, _HEAD_NORMS, language.MLP),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
SECOND = Family(
    name="cohere2",
    model_types=("cohere2",),
    rows=language.decoder_rows(_NORM, _ATTENTION, language.MLP),
    read_config=read_second,
    write_config=write_second,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
FAMILIES = (FIRST, SECOND)
