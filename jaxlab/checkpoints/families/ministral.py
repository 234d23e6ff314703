"""Ministral, whose config.json tells layer by layer which slide; otherwise Mistral."""

from jaxlab.checkpoints.families import language, mistral
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import LayerKind, ModelConfig


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "ministral", mistral.DEFAULTS)
    layers = s.whole("num_hidden_layers", most=1 << 12)
    window = s.maybe_whole("sliding_window", 4096)
    default: list[LayerKind] = ["full" if window is None else "sliding"] * layers
    return language.read_decoder(s, attention=language.read_kinds(s, layers, default, window))


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "ministral", "MinistralForCausalLM"),
        "sliding_window": language.window_of(config),
        "layer_types": language.layer_types(config),
    }


FAMILY = Family(
    name="ministral",
    model_types=("ministral",),
    rows=mistral.FAMILY.rows,
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
