"""GPT-2: learned positions; matrices lie the other way round; queries, keys and values are one tensor."""

from typing import Any

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import LearnedPositions, ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
_PARTS = ("attention.query", "attention.key", "attention.value")
_LAYER: Rows = (
    Row("attention_norm.scale", "ln_1.weight", "d -> d"),
    Row("attention_norm.bias", "ln_1.bias", "d -> d"),
    Row(_PARTS, "attn.c_attn.weight", "d (h k) -> d h k", join=1),
    Row(tuple(f"{part}_bias" for part in _PARTS), "attn.c_attn.bias", "(h k) -> h k"),
    Row("attention.output", "attn.c_proj.weight", "(h k) d -> h k d"),
    Row("attention.output_bias", "attn.c_proj.bias", "d -> d"),
    Row("mlp_norm.scale", "ln_2.weight", "d -> d"),
    Row("mlp_norm.bias", "ln_2.bias", "d -> d"),
    Row("mlp.up", "mlp.c_fc.weight", "d f -> d f"),
    Row("mlp.up_bias", "mlp.c_fc.bias", "f -> f"),
    Row("mlp.down", "mlp.c_proj.weight", "f d -> f d"),
    Row("mlp.down_bias", "mlp.c_proj.bias", "d -> d"),
)
ROWS: Rows = (
    Row("embedding.table", "transformer.wte.weight", "v d -> v d"),
    Row("position.table", "transformer.wpe.weight", "p d -> p d"),
    *in_layers("layers", "transformer.h", _LAYER),
    Row("final_norm.scale", "transformer.ln_f.weight", "d -> d"),
    Row("final_norm.bias", "transformer.ln_f.bias", "d -> d"),
    Row("head.table", "lm_head.weight", "v d -> d v"),
)


def read_common(s: Settings) -> dict[str, Any]:
    """The keys that GPT-2 and GPT-J share."""
    width, heads = s.whole("n_embd"), s.whole("n_head")
    if width % heads:
        raise s.wrong("n_head", f"a divisor of n_embd {width}")
    return {
        "vocab_size": s.whole("vocab_size"),
        "width": width,
        "num_layers": s.whole("n_layer", most=1 << 12),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "mlp": "plain",
        "mlp_width": s.whole("n_inner", 4 * width),
        "mlp_bias": True,
        "norm": "layer",
        "activation": language.activation(s, "activation_function", "gelu_new"),
        "norm_eps": s.number("layer_norm_epsilon"),
        "max_length": s.whole("n_positions"),
        "tie_embeddings": s.flag("tie_word_embeddings"),
    }


def write_common(config: ModelConfig, model_type: str, architecture: str) -> Json:
    name = config.activation
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(name, language.activation_name(name)),
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "gpt2", _DEFAULTS)
    if s.flag("scale_attn_by_inverse_layer_idx"):
        raise s.refuse("scale_attn_by_inverse_layer_idx", "all layers scale their scores alike")
    scale = None if s.flag("scale_attn_weights", True) else 1.0
    fields = {
        **read_common(s),
        "position": LearnedPositions(),
        "attention_bias": True,
        "output_bias": True,
        "attention_scale": scale,
    }
    return language.finish(s, fields)


def write_config(config: ModelConfig) -> Json:
    keys = write_common(config, "gpt2", "GPT2LMHeadModel")
    return {**keys, "scale_attn_weights": config.attention_scale is None}


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),  # masks
    variants={"hub": ((r"^transformer\.", ""),)},
)
