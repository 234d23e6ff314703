"""Gemma 3, text: norms on queries and keys, most layers in a window with rotary positions of their own."""

from jaxlab.checkpoints.families import gemma, gemma2, language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import LayerKind, ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "gemma3_text", _DEFAULTS)
    s.ignore("attn_logit_softcapping")  # stored, and never applied by transformers
    of_full, local = rope.read_two_ropes(s, 1000000.0, s.number("rope_local_base_freq", 10000.0))
    layers = s.whole("num_hidden_layers", most=1 << 12)
    period = s.whole("sliding_window_pattern", s.whole("_sliding_window_pattern", 6))
    default: list[LayerKind] = ["sliding" if (i + 1) % period else "full" for i in range(layers)]
    return language.read_decoder(
        s,
        **gemma2.read_common(s),
        position=of_full,
        qk_norm="head",
        attention=language.read_kinds(s, layers, default, s.maybe_whole("sliding_window", 4096), local),
        logit_softcap=s.maybe_number("final_logit_softcapping"),
    )


def write_config(config: ModelConfig) -> Json:
    return {
        **gemma.write_common(config, "gemma3_text", "Gemma3ForCausalLM"),
        "query_pre_attn_scalar": gemma2.scalar(config.attention_scale or config.key_dim**-0.5),
        "sliding_window": language.window_of(config),
        "layer_types": language.layer_types(config),
        "rope_local_base_freq": getattr(config.attention, "rope_theta", None),
        "final_logit_softcapping": config.logit_softcap,
    }


FAMILY = Family(
    name="gemma3_text",
    model_types=("gemma3_text",),
    rows=language.decoder_rows(
        gemma2.NORMS,
        language.ATTENTION,
        language.ATTENTION_BIASES,
        language.OUTPUT_BIAS,
        language.QK_NORMS,
        language.MLP,
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
