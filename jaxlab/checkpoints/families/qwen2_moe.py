"""Qwen2-MoE (Qwen1.5-MoE): Qwen2's attention; routed experts, and a shared one behind a gate of its own."""

from jaxlab.checkpoints.families import language, moe, qwen2
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import AttentionConfig, LayerKind, ModelConfig, MoEConfig

_DEFAULTS: Json = {
    **qwen2.DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
}
_LAYER: Rows = (*language.NORMS, *language.ATTENTION, *language.ATTENTION_BIASES)
_SHARED: Rows = (
    Row("moe.shared.gate", "mlp.shared_expert.gate_proj.weight", "f d -> d f"),
    Row("moe.shared.up", "mlp.shared_expert.up_proj.weight", "f d -> d f"),
    Row("moe.shared.down", "mlp.shared_expert.down_proj.weight", "d f -> f d"),
    Row("moe.shared_gate", "mlp.shared_expert_gate.weight", "() d -> d"),
)


def _rows(experts: Rows) -> Rows:
    return (
        *language.decoder_rows(_LAYER, moe.ROUTER, experts, _SHARED),
        *in_layers("dense_layers", "model.layers", (*_LAYER, *language.MLP)),
    )


def _default_kinds(layers: int, last: int) -> list[LayerKind]:
    return ["full" if i % 2 or i >= last else "sliding" for i in range(layers)]


def _read_window(s: Settings) -> AttentionConfig:
    """Every other layer below `max_window_layers` slides, if `use_sliding_window` says so."""
    layers = s.whole("num_hidden_layers", most=1 << 12)
    last = s.whole("max_window_layers", 28, least=0)
    if not s.flag("use_sliding_window"):
        s.ignore("sliding_window")  # transformers 5 writes 0
        return language.read_kinds(s, layers, _default_kinds(layers, 0), None)
    return language.read_kinds(s, layers, _default_kinds(layers, last), s.maybe_whole("sliding_window", 4096))


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "qwen2_moe", _DEFAULTS)
    count = s.whole("num_experts", s.whole("num_local_experts", 60), most=1 << 16)
    experts = MoEConfig(
        num_experts=count,
        experts_per_token=moe.chosen(s, count),
        width=s.whole("moe_intermediate_size"),
        shared_width=s.whole("shared_expert_intermediate_size"),
        shared_gate=True,
        normalize=s.flag("norm_topk_prob"),
        first_dense=moe.read_dense(s),
    )
    return language.read_decoder(
        s,
        attention_bias=s.flag("qkv_bias", True),
        output_bias=False,
        moe=experts,
        attention=_read_window(s),
    )


def write_config(config: ModelConfig) -> Json:
    window, experts = language.window_of(config), moe.experts_of(config)
    return {
        **language.write_decoder(config, "qwen2_moe", "Qwen2MoeForCausalLM"),
        "qkv_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.num_layers,
        "layer_types": language.layer_types(config),
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.width,
        "shared_expert_intermediate_size": experts.shared_width,
        "norm_topk_prob": experts.normalize,
        **moe.write_dense(config),
    }


FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    rows=_rows(moe.EXPERTS),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
    layouts={"stacked": _rows(moe.STACKED)},
)
