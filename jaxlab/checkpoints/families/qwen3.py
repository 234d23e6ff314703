"""Qwen3: norms on queries and keys."""

from jaxlab.checkpoints.families import language, qwen2
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import ModelConfig


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "qwen3", {**qwen2.DEFAULTS, "head_dim": 128})
    bias = s.flag("attention_bias")
    if not s.flag("use_qk_norm", True):
        raise s.refuse("use_qk_norm", "queries and keys are always normed")
    return language.read_decoder(
        s, attention_bias=bias, output_bias=bias, qk_norm="head", attention=qwen2.read_window(s)
    )


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "qwen3", "Qwen3ForCausalLM"),
        **qwen2.write_window(config),
        "attention_bias": config.attention_bias,
    }


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    rows=language.decoder_rows(
        language.NORMS,
        language.ATTENTION,
        language.ATTENTION_BIASES,
        language.OUTPUT_BIAS,
        language.QK_NORMS,
        language.MLP,
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
