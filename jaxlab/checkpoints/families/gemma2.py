"""Gemma 2: norms before and after, softcaps, every other layer in a window."""

from typing import Any

from jaxlab.checkpoints.families import gemma, language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import LayerKind, ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
NORMS: Rows = (
    Row("attention_norm.scale", "input_layernorm.weight", "d -> d"),
    Row("attention_post_norm.scale", "post_attention_layernorm.weight", "d -> d"),
    Row("mlp_norm.scale", "pre_feedforward_layernorm.weight", "d -> d"),
    Row("mlp_post_norm.scale", "post_feedforward_layernorm.weight", "d -> d"),
)


def read_common(s: Settings) -> dict[str, Any]:
    """What Gemma 2 and 3 have, besides Gemma's."""
    s.ignore("hidden_act")  # written beside hidden_activation, which is the one that counts
    return {
        **gemma.read_common(s),
        "post_norms": True,
        "activation": language.activation(s, "hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": s.number("query_pre_attn_scalar", 256.0) ** -0.5,
    }


def scalar(scale: float) -> int | float:
    """query_pre_attn_scalar, a whole number where it can be one."""
    found = scale**-2
    return round(found) if round(found) ** -0.5 == scale else found


def read_config(config: Json) -> ModelConfig:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    s = Settings(config, "gemma2", _DEFAULTS | caps)
    layers = s.whole("num_hidden_layers", most=1 << 12)
    window = s.maybe_whole("sliding_window", 4096)
    if s.value("sliding_window_size", window) != window:  # an older name, which transformers does not read
        raise s.refuse("sliding_window_size", f"sliding_window is {window}")
    default: list[LayerKind] = ["full" if i % 2 else "sliding" for i in range(layers)]
    return language.read_decoder(
        s,
        **read_common(s),
        attention=language.read_kinds(s, layers, default, window),
        attention_softcap=s.maybe_number("attn_logit_softcapping"),
        logit_softcap=s.maybe_number("final_logit_softcapping"),
    )


def write_config(config: ModelConfig) -> Json:
    keys: Json = {
        **gemma.write_common(config, "gemma2", "Gemma2ForCausalLM"),
        "query_pre_attn_scalar": scalar(config.attention_scale or config.key_dim**-0.5),
        "sliding_window": language.window_of(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    if config.kinds != tuple("full" if i % 2 else "sliding" for i in range(config.num_layers)):
        keys["layer_types"] = language.layer_types(config)
    return keys


FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    rows=language.decoder_rows(
        NORMS, language.ATTENTION, language.ATTENTION_BIASES, language.OUTPUT_BIAS, language.MLP
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
