"""Gemma 1: scaled embeddings, norms that scale by 1 + w, tied."""

import math
from typing import Any

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def read_common(s: Settings) -> dict[str, Any]:
    """What all Gemmas have."""
    bias = s.flag("attention_bias")
    return {
        "embedding_scale": math.sqrt(s.whole("hidden_size")),
        "norm_offset": 1.0,
        "attention_bias": bias,
        "output_bias": bias,
    }


def write_common(config: ModelConfig, model_type: str, architecture: str) -> Json:
    keys = language.write_decoder(config, model_type, architecture)
    return {**keys, "attention_bias": config.attention_bias, "hidden_activation": keys["hidden_act"]}


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "gemma", _DEFAULTS)
    # Gemma's first files say gelu and mean its approximation by tanh.
    said = s.word("hidden_act", "gelu_pytorch_tanh")
    if "hidden_activation" not in s and said not in ("gelu", "gelu_pytorch_tanh"):
        raise s.refuse("hidden_act", "the versions of transformers differ on it; set hidden_activation")
    activation = language.activation(s, "hidden_activation", "gelu_pytorch_tanh")
    return language.read_decoder(s, activation=activation, **read_common(s))


def write_config(config: ModelConfig) -> Json:
    return write_common(config, "gemma", "GemmaForCausalLM")


FAMILY = Family(
    name="gemma",
    model_types=("gemma",),
    rows=language.decoder_rows(
        language.NORMS, language.ATTENTION, language.ATTENTION_BIASES, language.OUTPUT_BIAS, language.MLP
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
