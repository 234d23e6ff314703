"""Granite 3 and its mixtures of experts: Llama, with four factors that keep sizes as in training."""

from typing import Any

from jaxlab.checkpoints.families import language, moe
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import ModelConfig, MoEConfig

_DEFAULTS: Json = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 2,
}
_ATTENTION: Rows = (
    *language.NORMS,
    *language.ATTENTION,
    *language.ATTENTION_BIASES,
    *language.OUTPUT_BIAS,
)
_EXPERTS: Rows = (
    Row("moe.router", "block_sparse_moe.router.layer.weight", "e d -> d e"),
    Row(("moe.gate", "moe.up"), "block_sparse_moe.input_linear.weight", "e f d -> e d f", join=1),
    Row("moe.down", "block_sparse_moe.output_linear.weight", "e d f -> e f d"),
)


def inverse(scale: float) -> float:
    """1 / scale, a whole number where that means the same."""
    found = 1.0 / scale
    return float(round(found)) if round(found) and 1.0 / round(found) == scale else found


def _read_common(s: Settings) -> dict[str, Any]:
    """The four factors, and biases."""
    bias = s.flag("attention_bias")
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "embedding_scale": s.number("embedding_multiplier", 1.0),
        "attention_scale": s.number("attention_multiplier", 1.0),
        "residual_scale": s.number("residual_multiplier", 1.0),
        "logit_scale": 1.0 / s.number("logits_scaling", 1.0),
    }


def _write_common(config: ModelConfig, model_type: str, architecture: str) -> Json:
    return {
        **language.write_decoder(config, model_type, architecture),
        "attention_bias": config.attention_bias,
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": config.score_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": inverse(config.logit_scale),
    }


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "granite", _DEFAULTS)
    return language.read_decoder(s, **_read_common(s), mlp_bias=s.flag("mlp_bias"))


def write_config(config: ModelConfig) -> Json:
    return {**_write_common(config, "granite", "GraniteForCausalLM"), "mlp_bias": config.mlp_bias}


def read_moe(config: Json) -> ModelConfig:
    s = Settings(config, "granitemoe", _DEFAULTS)
    count = s.whole("num_local_experts", 8, most=1 << 16)
    experts = MoEConfig(
        num_experts=count,
        experts_per_token=moe.chosen(s, count),  # a softmax over the chosen ones: their weights sum to one
        width=s.whole("intermediate_size"),
    )
    return language.read_decoder(s, **_read_common(s), moe=experts)


def write_moe(config: ModelConfig) -> Json:
    experts = moe.experts_of(config)
    return {
        **_write_common(config, "granitemoe", "GraniteMoeForCausalLM"),
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "intermediate_size": experts.width,
    }


GRANITE = Family(
    name="granite",
    model_types=("granite",),
    rows=language.decoder_rows(_ATTENTION, language.MLP, language.MLP_BIASES),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
MIXTURE = Family(
    name="granitemoe",
    model_types=("granitemoe",),
    rows=language.decoder_rows(_ATTENTION, _EXPERTS),
    read_config=read_moe,
    write_config=write_moe,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
FAMILIES = (GRANITE, MIXTURE)
