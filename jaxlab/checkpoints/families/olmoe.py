"""OLMoE: experts in every layer; norms over all heads of queries, and of keys, together."""

from jaxlab.checkpoints.families import language, moe
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Rows
from jaxlab.models import ModelConfig, MoEConfig

_DEFAULTS: Json = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 8,
}


def _rows(experts: Rows) -> Rows:
    return language.decoder_rows(
        language.NORMS,
        language.ATTENTION,
        language.ATTENTION_BIASES,
        language.OUTPUT_BIAS,
        language.QK_NORMS,
        moe.ROUTER,
        experts,
    )


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "olmoe", _DEFAULTS)
    if s.value("clip_qkv") is not None:
        raise s.refuse("clip_qkv", "queries, keys and values are not clipped")
    count = s.whole("num_experts", s.whole("num_local_experts", 64), most=1 << 16)
    experts = MoEConfig(
        num_experts=count,
        experts_per_token=moe.chosen(s, count),
        width=s.whole("intermediate_size"),
        normalize=s.flag("norm_topk_prob"),
    )
    bias = s.flag("attention_bias")
    return language.read_decoder(s, attention_bias=bias, output_bias=bias, qk_norm="width", moe=experts)


def write_config(config: ModelConfig) -> Json:
    experts = moe.experts_of(config)
    return {
        **language.write_decoder(config, "olmoe", "OlmoeForCausalLM"),
        "attention_bias": config.attention_bias,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "intermediate_size": experts.width,
        "norm_topk_prob": experts.normalize,
    }


FAMILY = Family(
    name="olmoe",
    model_types=("olmoe",),
    rows=_rows(moe.EXPERTS),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
    layouts={"stacked": _rows(moe.STACKED)},
)
