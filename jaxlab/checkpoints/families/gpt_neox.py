"""GPT-NeoX and Pythia: a part of each head turns; one tensor has query, key and value of head after head."""

from jaxlab.checkpoints.families import language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
}
_PARTS = ("attention.query", "attention.key", "attention.value")
_LAYER: Rows = (
    Row("attention_norm.scale", "input_layernorm.weight", "d -> d"),
    Row("attention_norm.bias", "input_layernorm.bias", "d -> d"),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", "d -> d"),
    Row("mlp_norm.bias", "post_attention_layernorm.bias", "d -> d"),
    Row(_PARTS, "attention.query_key_value.weight", "(h k) d -> d h k", runs="h"),
    Row(
        tuple(f"{part}_bias" for part in _PARTS),
        "attention.query_key_value.bias",
        "(h k) -> h k",
        runs="h",
    ),
    Row("attention.output", "attention.dense.weight", "d (h k) -> h k d"),
    Row("attention.output_bias", "attention.dense.bias", "d -> d"),
    Row("mlp.up", "mlp.dense_h_to_4h.weight", "f d -> d f"),
    Row("mlp.up_bias", "mlp.dense_h_to_4h.bias", "f -> f"),
    Row("mlp.down", "mlp.dense_4h_to_h.weight", "d f -> f d"),
    Row("mlp.down_bias", "mlp.dense_4h_to_h.bias", "d -> d"),
)
ROWS: Rows = (
    Row("embedding.table", "gpt_neox.embed_in.weight", "v d -> v d"),
    *in_layers("layers", "gpt_neox.layers", _LAYER),
    Row("final_norm.scale", "gpt_neox.final_layer_norm.weight", "d -> d"),
    Row("final_norm.bias", "gpt_neox.final_layer_norm.bias", "d -> d"),
    Row("head.table", "embed_out.weight", "v d -> d v"),
)


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "gpt_neox", _DEFAULTS)
    theta = s.number("rotary_emb_base", s.number("rope_theta", 10000.0))
    if s.number("rope_theta", theta) != theta:
        raise s.refuse("rope_theta", f"rotary_emb_base says {theta}")
    width, heads = s.whole("hidden_size"), s.whole("num_attention_heads")
    partial = rope.Partial(language.head_dim(s, width, heads), 0.25, "rotary_pct")
    bias, parallel = s.flag("attention_bias", True), s.flag("use_parallel_residual", True)
    return language.read_decoder(
        s,
        position=rope.read_rope(s, theta, partial=partial),
        norm="layer",
        parallel=parallel,
        parallel_norms=parallel,
        mlp="plain",
        mlp_bias=True,
        attention_bias=bias,
        output_bias=bias,
        activation=language.activation(s, "hidden_act", "gelu"),
    )


def write_config(config: ModelConfig) -> Json:
    keys = language.write_decoder(config, "gpt_neox", "GPTNeoXForCausalLM")
    for key in ("num_key_value_heads", "head_dim", "rope_theta"):
        del keys[key]
    return {
        **keys,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.attention_bias,
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": rope.partial_factor(config),
    }


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=(*language.IGNORED, r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias)"),  # masks
    variants={
        "base": ((r"^gpt_neox\.", ""),),
        "memory": ((r"^embed_out\.", "lm_head."),),
    },
)
"""memory: as transformers names the head in memory since 5."""
