"""Llama 2, 3 and 3.1+, and what shares their names and config."""

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "llama", _DEFAULTS)
    bias = s.flag("attention_bias")
    if set(s.words("layer_types") or ()) - {"full_attention"}:
        raise s.refuse("layer_types", "all layers have full attention")
    return language.read_decoder(s, attention_bias=bias, output_bias=bias, mlp_bias=s.flag("mlp_bias"))


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "llama", "LlamaForCausalLM"),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    rows=language.decoder_rows(
        language.NORMS,
        language.ATTENTION,
        language.ATTENTION_BIASES,
        language.OUTPUT_BIAS,
        language.MLP,
        language.MLP_BIASES,
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
