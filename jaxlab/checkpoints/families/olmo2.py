"""OLMo 2 and 3: norms only after attention and MLP, and on queries and keys over all heads together."""

import dataclasses
from typing import Any

from jaxlab.checkpoints.families import language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import LayerKind, ModelConfig, RopeConfig

_DEFAULTS: Json = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
_THETA_3 = 500000.0
_NORMS: Rows = (
    Row("attention_post_norm.scale", "post_attention_layernorm.weight", "d -> d"),
    Row("mlp_post_norm.scale", "post_feedforward_layernorm.weight", "d -> d"),
)


def _common(s: Settings) -> dict[str, Any]:
    bias = s.flag("attention_bias")
    return {
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": "width",
        "attention_bias": bias,
        "output_bias": bias,
    }


def read_olmo2(config: Json) -> ModelConfig:
    s = Settings(config, "olmo2", _DEFAULTS)
    return language.read_decoder(s, **_common(s))


def write_olmo2(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "olmo2", "Olmo2ForCausalLM"),
        "attention_bias": config.attention_bias,
    }


def read_olmo3(config: Json) -> ModelConfig:
    """Positions are stretched in full layers only."""
    s = Settings(config, "olmo3", _DEFAULTS)
    layers = s.whole("num_hidden_layers", most=1 << 12)
    if "rope_theta" in s and "rope_parameters" not in s and s.number("rope_theta") != _THETA_3:
        s.note("rope_theta turns all layers, as in transformers 4; 5.24 has its own default where they slide")
    of_full, local = rope.read_two_ropes(s, _THETA_3)
    default: list[LayerKind] = ["sliding" if (i + 1) % 4 else "full" for i in range(layers)]
    own = None if of_full == RopeConfig(theta=local) else local
    kinds = language.read_kinds(s, layers, default, s.maybe_whole("sliding_window", 4096), own)
    return language.read_decoder(s, **_common(s), position=of_full, attention=kinds)


def write_olmo3(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "olmo3", "Olmo3ForCausalLM"),
        **rope.write_two_ropes(config),
        "attention_bias": config.attention_bias,
        "sliding_window": language.window_of(config),
        "layer_types": language.layer_types(config),
    }


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    rows=language.decoder_rows(
        _NORMS,
        language.ATTENTION,
        language.ATTENTION_BIASES,
        language.OUTPUT_BIAS,
        language.QK_NORMS,
        language.MLP,
    ),
    read_config=read_olmo2,
    write_config=write_olmo2,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
OLMO3 = dataclasses.replace(
    OLMO2, name="olmo3", model_types=("olmo3",), read_config=read_olmo3, write_config=write_olmo3
)
FAMILIES = (OLMO2, OLMO3)
