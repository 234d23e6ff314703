"""Seed-OSS: Llama's names, biases on queries, keys and values; one on the output is told apart."""

import dataclasses

from jaxlab.checkpoints.families import language, llama
from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "rms_norm_eps": 1e-6,
}


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "seed_oss", _DEFAULTS)
    s.ignore("residual_dropout")
    return language.read_decoder(
        s,
        attention_bias=s.flag("attention_bias", True),
        output_bias=s.flag("attention_out_bias"),
        mlp_bias=s.flag("mlp_bias"),
    )


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "seed_oss", "SeedOssForCausalLM"),
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.has_output_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="seed_oss",
    model_types=("seed_oss",),
    read_config=read_config,
    write_config=write_config,
)
