"""Phi-3, 3.5-mini, 4 and 4-mini: fused projections; factors on wavelengths for short and long texts."""

from jaxlab.checkpoints.families import language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_FUSED: Rows = (
    Row(
        ("attention.query", "attention.key", "attention.value"),
        "self_attn.qkv_proj.weight",
        "(h k) d -> d h k",
    ),
    Row("attention.output", "self_attn.o_proj.weight", "d (h k) -> h k d"),
    Row(("mlp.gate", "mlp.up"), "mlp.gate_up_proj.weight", "f d -> d f"),
    Row("mlp.down", "mlp.down_proj.weight", "d f -> f d"),
)
_INERT = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
"""Keys of Phi-4-mini, and the only values that they have there."""


def read_config(config: Json) -> ModelConfig:
    s = Settings(rope.renamed_kind(config, {"su": "longrope", "yarn": "longrope"}), "phi3", _DEFAULTS)
    for key, value in _INERT.items():
        if s.value(key, value) != value:
            raise s.refuse(key, f"it is always {value}")
    attention = language.attention_of(s.maybe_whole("sliding_window"))
    return language.read_decoder(s, partial=1.0, attention=attention)


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "phi3", "Phi3ForCausalLM"),
        "partial_rotary_factor": rope.partial_factor(config),
        "pad_token_id": None,  # the class's own may lie outside of the vocabulary
        "sliding_window": language.window_of(config),
    }


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    rows=language.decoder_rows(language.NORMS, _FUSED),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
