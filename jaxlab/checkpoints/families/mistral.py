"""Mistral: Llama's names, all layers in a window or none."""

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import ModelConfig

DEFAULTS: Json = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
}


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "mistral", DEFAULTS)
    window = s.maybe_whole("sliding_window", 4096)
    return language.read_decoder(s, attention=language.attention_of(window))


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "mistral", "MistralForCausalLM"),
        "sliding_window": language.window_of(config),
    }


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    rows=language.decoder_rows(language.NORMS, language.ATTENTION, language.MLP),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
