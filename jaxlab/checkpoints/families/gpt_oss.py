"""gpt-oss: attention sinks, every other layer in a window, experts with biases and a clamped SwiGLU."""

from jaxlab.checkpoints.families import language, moe
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import LayerKind, ModelConfig, MoEConfig

_DEFAULTS: Json = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 4,
}
_YARN: Json = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Where config.json says nothing of positions."""
_EXPERTS: Rows = (
    Row("moe.router", "mlp.router.weight", "e d -> d e"),
    Row("moe.router_bias", "mlp.router.bias", "e -> e"),
    Row(("moe.gate", "moe.up"), "mlp.experts.gate_up_proj", "e d f -> e d f", join=2, runs="f"),
    Row(("moe.gate_bias", "moe.up_bias"), "mlp.experts.gate_up_proj_bias", "e f -> e f", join=1, runs="f"),
    Row("moe.down", "mlp.experts.down_proj", "e f d -> e f d"),
    Row("moe.down_bias", "mlp.experts.down_proj_bias", "e d -> e d"),
)
"""Gate and up stand in turns."""


def read_config(config: Json) -> ModelConfig:
    told = config.get("rope_parameters") or config.get("rope_scaling")
    s = Settings(config, "gpt_oss", _DEFAULTS if told else {**_DEFAULTS, "rope_parameters": _YARN})
    s.ignore("experts_per_token", "initial_context_length")  # of OpenAI's own code
    layers, bias = s.whole("num_hidden_layers", most=1 << 12), s.flag("attention_bias", True)
    default: list[LayerKind] = ["full" if i % 2 else "sliding" for i in range(layers)]
    count = s.whole("num_local_experts", s.whole("num_experts", 128), most=1 << 16)
    experts = MoEConfig(
        num_experts=count,
        experts_per_token=moe.chosen(s, count),  # a softmax over the chosen ones: their weights sum to one
        width=s.whole("intermediate_size"),
        router_bias=True,
        bias=True,
        swiglu_limit=s.number("swiglu_limit", 7.0),
        swiglu_alpha=s.number("swiglu_alpha", 1.702),
    )
    return language.read_decoder(
        s,
        theta=150000.0,
        attention_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        attention=language.read_kinds(s, layers, default, s.maybe_whole("sliding_window", 128)),
        moe=experts,
    )


def write_config(config: ModelConfig) -> Json:
    experts = moe.experts_of(config)
    return {
        **language.write_decoder(config, "gpt_oss", "GptOssForCausalLM"),
        "attention_bias": config.attention_bias,
        "sliding_window": language.window_of(config),
        "layer_types": language.layer_types(config),
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "intermediate_size": experts.width,
        "swiglu_limit": experts.swiglu_limit,
        "swiglu_alpha": experts.swiglu_alpha,
    }


FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    rows=language.decoder_rows(
        language.NORMS,
        language.ATTENTION,
        language.ATTENTION_BIASES,
        language.OUTPUT_BIAS,
        (Row("attention.sinks", "self_attn.sinks", "h -> h"),),
        _EXPERTS,
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
