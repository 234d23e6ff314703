"""SmolLM3: every fourth layer knows no positions."""

from jaxlab.checkpoints.families import language, llama, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import LayerKind, ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "smollm3", _DEFAULTS)
    layers = s.whole("num_hidden_layers", most=1 << 12)
    turned = _rotary_layers(s, layers)
    window, slides = s.maybe_whole("sliding_window"), s.flag("use_sliding_window")
    s.ignore("max_window_layers")  # of Qwen2's, never read
    default: list[LayerKind] = ["sliding" if slides and window and not turns else "full" for turns in turned]
    attention = language.read_kinds(s, layers, default, window)
    if attention.kind == "sliding" and not slides:
        raise s.refuse("layer_types", "use_sliding_window is false")
    bias = s.flag("attention_bias")
    return language.read_decoder(
        s,
        attention=attention,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=s.flag("mlp_bias"),
        position=rope.in_layers(rope.read_rope(s, 2000000.0), turned),
    )


def _rotary_layers(s: Settings, layers: int) -> list[bool]:
    interval = s.whole("no_rope_layer_interval", 4)
    given = s.value("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    numbers = isinstance(given, list) and all(type(n) in (int, bool) and n in (0, 1) for n in given)
    if not numbers or len(given) < layers:
        raise s.wrong("no_rope_layers", f"a list with 1 or 0 for each of {layers} layers")
    return [bool(n) for n in given[:layers]]


def write_config(config: ModelConfig) -> Json:
    window = language.window_of(config)
    return {
        **language.write_decoder(config, "smollm3", "SmolLM3ForCausalLM"),
        "no_rope_layers": [int(turns) for turns in config.rotary_layers],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": window is not None,
        "pad_token_id": None,  # the class's own may lie outside of the vocabulary
        "sliding_window": window,
        "layer_types": language.layer_types(config),
    }


FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    rows=llama.FAMILY.rows,
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
