"""OPT: learned positions after two rows that stand for none; biases everywhere."""

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import LearnedPositions, ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
}
_OFFSET = 2
_NORM_EPS = 1e-5
_LAYER: Rows = (
    Row("attention_norm.scale", "self_attn_layer_norm.weight", "d -> d"),
    Row("attention_norm.bias", "self_attn_layer_norm.bias", "d -> d"),
    *language.ATTENTION[:3],
    *language.ATTENTION_BIASES,
    Row("attention.output", "self_attn.out_proj.weight", "d (h k) -> h k d"),
    Row("attention.output_bias", "self_attn.out_proj.bias", "d -> d"),
    Row("mlp_norm.scale", "final_layer_norm.weight", "d -> d"),
    Row("mlp_norm.bias", "final_layer_norm.bias", "d -> d"),
    Row("mlp.up", "fc1.weight", "f d -> d f"),
    Row("mlp.up_bias", "fc1.bias", "f -> f"),
    Row("mlp.down", "fc2.weight", "d f -> f d"),
    Row("mlp.down_bias", "fc2.bias", "d -> d"),
)
ROWS: Rows = (
    Row("embedding.table", "model.decoder.embed_tokens.weight", "v d -> v d"),
    Row("position.table", "model.decoder.embed_positions.weight", "p d -> p d"),
    *in_layers("layers", "model.decoder.layers", _LAYER),
    Row("final_norm.scale", "model.decoder.final_layer_norm.weight", "d -> d"),
    Row("final_norm.bias", "model.decoder.final_layer_norm.bias", "d -> d"),
    Row("head.table", "lm_head.weight", "v d -> d v"),
)


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "opt", _DEFAULTS)
    width, heads = s.whole("hidden_size"), s.whole("num_attention_heads")
    if not s.flag("do_layer_norm_before", True):
        raise s.refuse("do_layer_norm_before", "norms stand before attention and MLP, not after the sum")
    if s.whole("word_embed_proj_dim", width) != width:
        raise s.refuse("word_embed_proj_dim", f"embeddings are as wide as the model, {width}")
    if s.flag("_remove_final_layer_norm"):
        raise s.refuse("_remove_final_layer_norm", "there is a norm before the head")
    if not s.flag("layer_norm_elementwise_affine", True):
        raise s.refuse("layer_norm_elementwise_affine", "norms have parameters")
    s.ignore("output_projection")  # of the larger ones' converter: the head, tied or not
    bias, dim = s.flag("enable_bias", True), language.head_dim(s, width, heads)
    fields = {
        "vocab_size": s.whole("vocab_size"),
        "width": width,
        "num_layers": s.whole("num_hidden_layers", most=1 << 12),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": dim,
        "mlp": "plain",
        "mlp_width": s.whole("ffn_dim"),
        "mlp_bias": bias,
        "attention_bias": bias,
        "output_bias": bias,
        "activation": language.activation(s, "activation_function", "relu"),
        "norm": "layer",
        "norm_eps": _NORM_EPS,
        "position": LearnedPositions(offset=_OFFSET),
        "max_length": s.whole("max_position_embeddings"),
        "tie_embeddings": s.flag("tie_word_embeddings", True),
    }
    return language.finish(s, fields)


def write_config(config: ModelConfig) -> Json:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "ffn_dim": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_length,
        "activation_function": language.activation_name(config.activation),
        "enable_bias": config.attention_bias,
        "do_layer_norm_before": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=(r"(model\.)?decoder\.version",),
    variants=language.VARIANTS,
)
