"""EXAONE 4: norms after attention and MLP only; where some layers slide, the others have no positions."""

from jaxlab.checkpoints.families import language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.errors import UserError
from jaxlab.models import FullAttentionConfig, LayerKind, ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
_NORMS: Rows = (
    Row("attention_post_norm.scale", "post_attention_layernorm.weight", "d -> d"),
    Row("mlp_post_norm.scale", "post_feedforward_layernorm.weight", "d -> d"),
)


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "exaone4", _DEFAULTS)
    layers, window = s.whole("num_hidden_layers", most=1 << 12), s.maybe_whole("sliding_window", 4096)
    if "layer_types" in s:
        s.ignore("sliding_window_pattern")  # "LLLG" and 4 alike
        period = 1
    else:
        period = 1 if window is None else s.whole("sliding_window_pattern", 4)
    default: list[LayerKind] = ["sliding" if (i + 1) % period else "full" for i in range(layers)]
    attention = language.read_kinds(s, layers, default, window)
    if window is not None and isinstance(attention, FullAttentionConfig):
        raise s.refuse("sliding_window", "no layer slides, and full layers would have no positions")
    position = rope.read_rope(s)
    return language.read_decoder(
        s,
        position=rope.in_sliding_layers(position, attention),
        attention=attention,
        pre_norms=False,
        post_norms=True,
        qk_norm="head",
    )


def write_config(config: ModelConfig) -> Json:
    window = language.window_of(config)
    slides = tuple(window is None or kind == "sliding" for kind in config.kinds)
    if config.rotary_layers != slides:
        raise UserError(
            f"the family {config.family} has positions in sliding layers, or in all where none slides"
        )
    return {
        **language.write_decoder(config, "exaone4", "Exaone4ForCausalLM"),
        "sliding_window": window,
        "sliding_window_pattern": None,
        "layer_types": language.layer_types(config),
    }


FAMILY = Family(
    name="exaone4",
    model_types=("exaone4",),
    rows=language.decoder_rows(_NORMS, language.ATTENTION, language.QK_NORMS, language.MLP),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
