"""DeepSeek-V2 and V3: latent attention, experts in groups; R1, V2-Lite and what shares their names."""

import dataclasses
import math
from typing import Any, Literal

from jaxlab.checkpoints.families import language, moe, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models import LatentConfig, ModelConfig, MoEConfig, RopeConfig

_V2_DEFAULTS: Json = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "q_lora_rank": 1536,
}
_V3_DEFAULTS: Json = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
}
_ATTENTION: Rows = (
    Row("attention.query", "self_attn.q_proj.weight", "(h k) d -> d h k"),
    Row("attention.query_down", "self_attn.q_a_proj.weight", "r d -> d r"),
    Row("attention.query_latent_norm.scale", "self_attn.q_a_layernorm.weight", "r -> r"),
    Row("attention.query_up", "self_attn.q_b_proj.weight", "(h k) r -> r h k"),
    Row(("attention.kv_down", "attention.shared_key"), "self_attn.kv_a_proj_with_mqa.weight", "r d -> d r"),
    Row("attention.kv_latent_norm.scale", "self_attn.kv_a_layernorm.weight", "r -> r"),
    Row(
        ("attention.key_up", "attention.value_up"),
        "self_attn.kv_b_proj.weight",
        "(h k) r -> r h k",
        runs="h",
    ),
    Row("attention.output", "self_attn.o_proj.weight", "d (h k) -> h k d"),
)
_SHARED: Rows = (
    Row("moe.shared.gate", "mlp.shared_experts.gate_proj.weight", "f d -> d f"),
    Row("moe.shared.up", "mlp.shared_experts.up_proj.weight", "f d -> d f"),
    Row("moe.shared.down", "mlp.shared_experts.down_proj.weight", "d f -> f d"),
)
CHOICE: Rows = (Row("moe.choice_bias", "mlp.gate.e_score_correction_bias", "e -> e"),)


def rows(layer: Rows, more: Rows = (), *, stacked: bool = False) -> Rows:
    """Of a whole model: `layer` without its MLP or experts; `more` of layers with experts."""
    experts = (*moe.ROUTER, *(moe.STACKED if stacked else moe.EXPERTS), *_SHARED, *more)
    return (
        *language.decoder_rows(layer, experts),
        *in_layers("dense_layers", "model.layers", (*layer, *language.MLP)),
    )


def read_experts(s: Settings) -> MoEConfig:
    """A mixture as DeepSeek-V3 has it (arXiv 2412.19437, sec. 2.1.2)."""
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if s.value(key, only) != only:
            raise s.refuse(key, f"known is {only}")
    return _mixture(
        s,
        scoring="sigmoid",
        choice_bias=True,
        normalize=s.flag("norm_topk_prob"),
        num_groups=s.whole("n_group", 1),
        groups_per_token=s.whole("topk_group", 1),
        group_score="top2",
    )


def _mixture(s: Settings, **more: Any) -> MoEConfig:
    if s.value("moe_layer_freq", 1) != 1:
        raise s.refuse("moe_layer_freq", "all layers after the first ones have experts")
    s.ignore("num_nextn_predict_layers", "num_mtp_layers")  # such layers are left out, as in transformers
    count = s.whole("num_local_experts", s.whole("n_routed_experts"), most=1 << 16)
    width = s.whole("moe_intermediate_size")
    return MoEConfig(
        num_experts=count,
        experts_per_token=moe.chosen(s, count),
        width=width,
        shared_width=width * s.whole("n_shared_experts", 1, most=1 << 12),
        scale=s.number("routed_scaling_factor", 1.0),
        router_dtype="float32",
        first_dense=s.whole("first_k_dense_replace", 0, least=0),
        **more,
    )


def write_experts(config: ModelConfig) -> Json:
    """The keys of `read_experts`."""
    m = moe.experts_of(config)
    if m.shared_width % m.width:
        raise UserError(
            f"the family {config.family} has whole shared experts of {m.width}, not {m.shared_width}"
        )
    return {
        "n_routed_experts": m.num_experts,
        "n_shared_experts": m.shared_width // m.width,
        "num_experts_per_tok": m.experts_per_token,
        "moe_intermediate_size": m.width,
        "first_k_dense_replace": m.first_dense,
        "routed_scaling_factor": m.scale,
        "norm_topk_prob": m.normalize,
        "n_group": m.num_groups,
        "topk_group": m.groups_per_token,
    }


def _read_latent(s: Settings, interleaved: bool) -> dict[str, Any]:
    """Latent attention, whose rotary positions scale the scores too where they are stretched."""
    turning, other = s.whole("qk_rope_head_dim", 64), s.whole("qk_nope_head_dim", 128)
    s.ignore("head_dim", "qk_head_dim")  # of transformers' own making
    heads = s.whole("num_attention_heads")
    if s.whole("num_key_value_heads", heads) != heads:
        raise s.refuse("num_key_value_heads", f"each of the {heads} heads has a key of its own")
    position = dataclasses.replace(rope.read_rope(s), dim=turning, interleaved=interleaved)
    group = s.value("rope_scaling") or s.value("rope_parameters") or {}
    return {
        "position": position,
        "latent": LatentConfig(s.whole("kv_lora_rank", 512), s.maybe_whole("q_lora_rank")),
        "num_kv_heads": heads,
        "head_dim": turning + other,
        "value_head_dim": s.whole("v_head_dim", 128),
        "attention_scale": _scale(turning + other, position, group.get("mscale_all_dim") or 0.0),
    }


def _scale(dim: int, position: RopeConfig, grown: float) -> float | None:
    """Factor on scores; none where it is the usual one."""
    if position.scaling == "none" or not grown:
        return None
    factor = 0.1 * grown * math.log(position.factor) + 1.0 if position.factor > 1 else 1.0
    return dim**-0.5 * factor * factor


def _write_latent(config: ModelConfig, model_type: str, architecture: str) -> Json:
    if config.latent is None:
        raise UserError(f"the family {config.family} has latent attention; set latent")
    keys = language.write_decoder(config, model_type, architecture)
    del keys["head_dim"]
    if config.attention_scale is not None:
        if keys["rope_scaling"] is None or config.rope.factor <= 1:
            raise UserError(f"the family {config.family} scales scores by stretched positions alone")
        keys["rope_scaling"]["mscale_all_dim"] = _grown(config, config.attention_scale)
    return {
        **keys,
        "kv_lora_rank": config.latent.kv_rank,
        "q_lora_rank": config.latent.query_rank,
        "qk_rope_head_dim": config.rotary_dim,
        "qk_nope_head_dim": config.key_dim - config.rotary_dim,
        "v_head_dim": config.value_dim,
    }


def _grown(config: ModelConfig, scale: float) -> float:
    """The `mscale_all_dim` that gives a model's factor on scores, of few digits if such a one does."""
    exact = (math.sqrt(scale * config.key_dim**0.5) - 1.0) / (0.1 * math.log(config.rope.factor))
    found = [round(exact, digits) for digits in range(12)]
    same = lambda grown: grown > 0 and _scale(config.key_dim, config.rope, grown) == scale
    return next(filter(same, found), exact)


def read_second(config: Json) -> ModelConfig:
    s = Settings(config, "deepseek_v2", _V2_DEFAULTS)
    if s.value("scoring_func", "softmax") != "softmax":
        raise s.refuse("scoring_func", "known is softmax")
    if s.flag("norm_topk_prob"):
        raise s.refuse(
            "norm_topk_prob", "DeepSeek's own code normalises weights then, and transformers does not"
        )
    method = s.word("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise s.refuse("topk_method", "known are greedy and group_limited_greedy")
    groups, best = s.whole("n_group", 1), s.whole("topk_group", 1)
    if method == "greedy":
        groups = best = 1
    experts = _mixture(s, normalize=False, num_groups=groups, groups_per_token=best)
    return language.read_decoder(s, **_read_latent(s, interleaved=True), moe=experts)


def write_second(config: ModelConfig) -> Json:
    experts = write_experts(config)
    return {
        **_write_latent(config, "deepseek_v2", "DeepseekV2ForCausalLM"),
        **experts,
        "topk_method": "greedy" if experts["n_group"] == 1 else "group_limited_greedy",
    }


def read_third(config: Json) -> ModelConfig:
    s = Settings(config, "deepseek_v3", _V3_DEFAULTS)
    latent = _read_latent(s, s.flag("rope_interleave", True))
    return language.read_decoder(s, **latent, moe=read_experts(s))


def write_third(config: ModelConfig) -> Json:
    return {
        **_write_latent(config, "deepseek_v3", "DeepseekV3ForCausalLM"),
        **write_experts(config),
        "rope_interleave": config.rope.interleaved,
    }


def _family(number: Literal[2, 3], **functions: Any) -> Family:
    layer, more = (*language.NORMS, *_ATTENTION), CHOICE if number == 3 else ()
    return Family(
        name=f"deepseek_v{number}",
        model_types=(f"deepseek_v{number}",),
        rows=rows(layer, more),
        ignored=(*language.IGNORED, r"(model\.)?layers\.61\..*"),  # V3's layer that predicts a second token
        variants=language.VARIANTS,
        layouts={"stacked": rows(layer, more, stacked=True)},
        **functions,
    )


SECOND = _family(2, read_config=read_second, write_config=write_second)
THIRD = _family(3, read_config=read_third, write_config=write_third)
FAMILIES = (SECOND, THIRD)
