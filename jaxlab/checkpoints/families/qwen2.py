"""Qwen2 and Qwen2.5: biases on queries, keys and values; later layers may slide."""

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import AttentionConfig, LayerKind, ModelConfig

DEFAULTS: Json = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}


def read_window(s: Settings) -> AttentionConfig:
    """Attention of the layers: from `max_window_layers` on they slide, if `use_sliding_window` says so."""
    layers = s.whole("num_hidden_layers", most=1 << 12)
    slides, window = s.flag("use_sliding_window"), s.maybe_whole("sliding_window", 4096)
    first = s.whole("max_window_layers", 28, least=0)
    if not slides or window is None:
        first = layers
    default: list[LayerKind] = ["full" if i < first else "sliding" for i in range(layers)]
    return language.read_kinds(s, layers, default, window if slides else None)


def write_window(config: ModelConfig) -> Json:
    """The keys of `read_window`, of either version of transformers."""
    window, kinds = language.window_of(config), config.kinds
    first = kinds.index("sliding") if window is not None else len(kinds)
    keys: Json = {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
    }
    if "full" in kinds[first:]:
        keys["layer_types"] = language.layer_types(config)
    return keys


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "qwen2", DEFAULTS)
    return language.read_decoder(s, attention_bias=True, output_bias=False, attention=read_window(s))


def write_config(config: ModelConfig) -> Json:
    return {**language.write_decoder(config, "qwen2", "Qwen2ForCausalLM"), **write_window(config)}


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    rows=language.decoder_rows(language.NORMS, language.ATTENTION, language.ATTENTION_BIASES, language.MLP),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
