"""Mixtral and Qwen3-MoE: experts in place of the MLP."""

import dataclasses

from jaxlab.checkpoints.families import language, qwen2
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, MoEConfig

_MIXTRAL_DEFAULTS: Json = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN3_DEFAULTS: Json = {
    **qwen2.DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
}

_MIXTRAL_EXPERTS: Rows = (
    Row("moe.router", "block_sparse_moe.gate.weight", "e d -> d e"),
    Row("moe.gate", "block_sparse_moe.experts.{e}.w1.weight", "f d -> d f"),
    Row("moe.up", "block_sparse_moe.experts.{e}.w3.weight", "f d -> d f"),
    Row("moe.down", "block_sparse_moe.experts.{e}.w2.weight", "d f -> f d"),
)
ROUTER: Rows = (Row("moe.router", "mlp.gate.weight", "e d -> d e"),)
EXPERTS: Rows = (
    Row("moe.gate", "mlp.experts.{e}.gate_proj.weight", "f d -> d f"),
    Row("moe.up", "mlp.experts.{e}.up_proj.weight", "f d -> d f"),
    Row("moe.down", "mlp.experts.{e}.down_proj.weight", "d f -> f d"),
)
STACKED: Rows = (
    Row(("moe.gate", "moe.up"), "mlp.experts.gate_up_proj", "e f d -> e d f", join=1),
    Row("moe.down", "mlp.experts.down_proj", "e d f -> e f d"),
)
"""All experts of a layer in one tensor, as transformers 5 has them in memory."""
_QWEN3_LAYER: Rows = (
    *language.NORMS,
    *language.ATTENTION,
    *language.ATTENTION_BIASES,
    *language.OUTPUT_BIAS,
    *language.QK_NORMS,
)


def _qwen3_rows(experts: Rows) -> Rows:
    return (
        *language.decoder_rows(_QWEN3_LAYER, ROUTER, experts),
        *in_layers("dense_layers", "model.layers", (*_QWEN3_LAYER, *language.MLP)),
    )


def read_mixtral(config: Json) -> ModelConfig:
    s = Settings(config, "mixtral", _MIXTRAL_DEFAULTS)
    window = s.maybe_whole("sliding_window")
    moe = MoEConfig(
        num_experts=s.whole("num_local_experts", most=1 << 16),
        experts_per_token=chosen(s, s.whole("num_local_experts")),
        width=s.whole("intermediate_size"),
    )
    return language.read_decoder(s, theta=1e6, moe=moe, attention=language.attention_of(window))


def experts_of(config: ModelConfig) -> MoEConfig:
    """The mixture of a model of a family that has one.

    Raises:
      UserError: it has none.
    """
    if config.moe is None:
        raise UserError(f"the family {config.family} has experts; set moe")
    return config.moe


def write_mixtral(config: ModelConfig) -> Json:
    moe = experts_of(config)
    return {
        **language.write_decoder(config, "mixtral", "MixtralForCausalLM"),
        "sliding_window": language.window_of(config),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "intermediate_size": moe.width,
    }


def read_dense(s: Settings) -> int:
    """How many first layers have an MLP, by `mlp_only_layers` and `decoder_sparse_step`.

    Raises:
      UserError: layers with an MLP come after others with experts, or all have one.
    """
    layers = s.whole("num_hidden_layers", most=1 << 12)
    step, dense = s.whole("decoder_sparse_step", 1), s.value("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise s.wrong("mlp_only_layers", "a list of layer numbers")
    plain = [i for i in range(layers) if i in dense or (i + 1) % step]
    key = "mlp_only_layers" if dense else "decoder_sparse_step"
    if plain != list(range(len(plain))) or len(plain) == layers:
        raise s.refuse(key, "layers with an MLP must be the first ones, before others with experts")
    return len(plain)


def read_qwen3(config: Json) -> ModelConfig:
    """Layers with an MLP must come before all those with experts."""
    s = Settings(config, "qwen3_moe", _QWEN3_DEFAULTS)
    count = s.whole("num_experts", s.whole("num_local_experts", 128), most=1 << 16)
    moe = MoEConfig(
        num_experts=count,
        experts_per_token=chosen(s, count),
        width=s.whole("moe_intermediate_size"),
        normalize=s.flag("norm_topk_prob"),
        first_dense=read_dense(s),
    )
    window = s.maybe_whole("sliding_window", 4096)
    slides = s.flag("use_sliding_window") and window is not None
    s.ignore("max_window_layers")  # of Qwen2's; here all layers slide or none
    if not s.flag("use_qk_norm", True):
        raise s.refuse("use_qk_norm", "queries and keys are always normed")
    attention = language.attention_of(window if slides else None)
    bias = s.flag("attention_bias")
    return language.read_decoder(
        s, attention_bias=bias, output_bias=bias, qk_norm="head", moe=moe, attention=attention
    )


def write_qwen3(config: ModelConfig) -> Json:
    window, moe = language.window_of(config), experts_of(config)
    return {
        **language.write_decoder(config, "qwen3_moe", "Qwen3MoeForCausalLM"),
        "attention_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.width,
        "norm_topk_prob": moe.normalize,
        **write_dense(config),
    }


def write_dense(config: ModelConfig) -> Json:
    """The keys of `read_dense`."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(range(config.dense_layers))}


def chosen(s: Settings, count: int) -> int:
    """Experts that a token passes through.

    Raises:
      UserError: more than there are.
    """
    found = s.whole("num_experts_per_tok")
    if found > count:
        raise s.wrong("num_experts_per_tok", f"at most the {count} experts")
    return found


MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    rows=language.decoder_rows(language.NORMS, language.ATTENTION, _MIXTRAL_EXPERTS),
    read_config=read_mixtral,
    write_config=write_mixtral,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
    layouts={"stacked": language.decoder_rows(language.NORMS, language.ATTENTION, ROUTER, STACKED)},
)
QWEN3 = dataclasses.replace(
    MIXTRAL,
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    rows=_qwen3_rows(EXPERTS),
    read_config=read_qwen3,
    write_config=write_qwen3,
    layouts={"stacked": _qwen3_rows(STACKED)},
)
FAMILIES = (MIXTRAL, QWEN3)
