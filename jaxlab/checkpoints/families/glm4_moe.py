"""GLM-4.5 and after: half of each head turns, and DeepSeek-V3's mixture of experts."""

from jaxlab.checkpoints.families import deepseek, language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Rows
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
_LAYER: Rows = (*language.NORMS, *language.ATTENTION, *language.ATTENTION_BIASES, *language.QK_NORMS)
_PART = 0.5
"""Of a head's dimensions turns, where config.json says none."""


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "glm4_moe", _DEFAULTS)
    return language.read_decoder(
        s,
        partial=_PART,
        attention_bias=s.flag("attention_bias"),
        output_bias=False,
        qk_norm="head" if s.flag("use_qk_norm") else "none",
        moe=deepseek.read_experts(s),
    )


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "glm4_moe", "Glm4MoeForCausalLM"),
        **deepseek.write_experts(config),
        "partial_rotary_factor": rope.partial_factor(config),
        "attention_bias": config.attention_bias,
        "use_qk_norm": config.qk_norm == "head",
    }


FAMILY = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    rows=deepseek.rows(_LAYER, deepseek.CHOICE),
    read_config=read_config,
    write_config=write_config,
    ignored=(*language.IGNORED, r"(model\.)?layers\.(46|92)\..*"),  # the layer that predicts a second token
    variants=language.VARIANTS,
    layouts={"stacked": deepseek.rows(_LAYER, deepseek.CHOICE, stacked=True)},
)
