"""Phi-1.5 and 2: attention and MLP read one norm, a part of each head turns, the logits have a bias."""

from jaxlab.checkpoints.families import language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
}
_LAYER: Rows = (
    Row("attention_norm.scale", "input_layernorm.weight", "d -> d"),
    Row("attention_norm.bias", "input_layernorm.bias", "d -> d"),
    *language.ATTENTION[:3],
    *language.ATTENTION_BIASES,
    Row("attention.output", "self_attn.dense.weight", "d (h k) -> h k d"),
    Row("attention.output_bias", "self_attn.dense.bias", "d -> d"),
    Row("attention.query_norm.scale", "self_attn.q_layernorm.weight", "k -> k"),
    Row("attention.query_norm.bias", "self_attn.q_layernorm.bias", "k -> k"),
    Row("attention.key_norm.scale", "self_attn.k_layernorm.weight", "k -> k"),
    Row("attention.key_norm.bias", "self_attn.k_layernorm.bias", "k -> k"),
    Row("mlp.up", "mlp.fc1.weight", "f d -> d f"),
    Row("mlp.up_bias", "mlp.fc1.bias", "f -> f"),
    Row("mlp.down", "mlp.fc2.weight", "d f -> f d"),
    Row("mlp.down_bias", "mlp.fc2.bias", "d -> d"),
)
ROWS: Rows = (
    Row("embedding.table", "model.embed_tokens.weight", "v d -> v d"),
    *in_layers("layers", "model.layers", _LAYER),
    Row("final_norm.scale", "model.final_layernorm.weight", "d -> d"),
    Row("final_norm.bias", "model.final_layernorm.bias", "d -> d"),
    Row("head.table", "lm_head.weight", "v d -> d v"),
    Row("head.bias", "lm_head.bias", "v -> v"),
)


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "phi", _DEFAULTS)
    return language.read_decoder(
        s,
        partial=0.5,
        norm="layer",
        parallel=True,
        mlp="plain",
        mlp_bias=True,
        attention_bias=True,
        output_bias=True,
        head_bias=True,
        qk_norm="head" if s.flag("qk_layernorm") else "none",
        activation=language.activation(s, "hidden_act", "gelu_new"),
    )


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "phi", "PhiForCausalLM"),
        "partial_rotary_factor": rope.partial_factor(config),
        "qk_layernorm": config.qk_norm == "head",
    }


FAMILY = Family(
    name="phi",
    model_types=("phi",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
