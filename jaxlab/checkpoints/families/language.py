"""What language-model families share: the rows of Llama's names, and the common keys of config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlab.checkpoints.families.base import Json, Renames
from jaxlab.checkpoints.families.rope import Partial, max_length, period_of, read_rope, write_rope
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.families.towers import ACTIVATIONS
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import (
    AttentionConfig,
    FullAttentionConfig,
    LayerKind,
    ModelConfig,
    SlidingAttentionConfig,
)

_KINDS: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}

NORMS: Rows = (
    Row("attention_norm.scale", "input_layernorm.weight", "d -> d"),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", "d -> d"),
)
ATTENTION: Rows = (
    Row("attention.query", "self_attn.q_proj.weight", "(h k) d -> d h k"),
    Row("attention.key", "self_attn.k_proj.weight", "(h k) d -> d h k"),
    Row("attention.value", "self_attn.v_proj.weight", "(h k) d -> d h k"),
    Row("attention.output", "self_attn.o_proj.weight", "d (h k) -> h k d"),
)
ATTENTION_BIASES: Rows = (
    Row("attention.query_bias", "self_attn.q_proj.bias", "(h k) -> h k"),
    Row("attention.key_bias", "self_attn.k_proj.bias", "(h k) -> h k"),
    Row("attention.value_bias", "self_attn.v_proj.bias", "(h k) -> h k"),
)
OUTPUT_BIAS: Rows = (Row("attention.output_bias", "self_attn.o_proj.bias", "d -> d"),)
QK_NORMS: Rows = (
    Row("attention.query_norm.scale", "self_attn.q_norm.weight", "k -> k"),
    Row("attention.key_norm.scale", "self_attn.k_norm.weight", "k -> k"),
)
MLP: Rows = (
    Row("mlp.gate", "mlp.gate_proj.weight", "f d -> d f"),
    Row("mlp.up", "mlp.up_proj.weight", "f d -> d f"),
    Row("mlp.down", "mlp.down_proj.weight", "d f -> f d"),
)
MLP_BIASES: Rows = (
    Row("mlp.gate_bias", "mlp.gate_proj.bias", "f -> f"),
    Row("mlp.up_bias", "mlp.up_proj.bias", "f -> f"),
    Row("mlp.down_bias", "mlp.down_proj.bias", "d -> d"),
)
EDGES: Rows = (
    Row("embedding.table", "model.embed_tokens.weight", "v d -> v d"),
    Row("final_norm.scale", "model.norm.weight", "d -> d"),
    Row("head.table", "lm_head.weight", "v d -> d v"),
)

IGNORED = (r".*\.rotary_emb\.inv_freq",)
"""Tables of rotary positions that older versions wrote; the config implies them."""

VARIANTS: Mapping[str, Renames] = {"base": ((r"^model\.", ""),)}
"""base: a model saved without its head, and so without the prefix."""


def decoder_rows(*layer: Rows) -> Rows:
    """Rows of a whole model with Llama's names from the rows of one layer."""
    rows = tuple(row for part in layer for row in part)
    return EDGES + in_layers("layers", "model.layers", rows)


def read_decoder(
    s: Settings, *, theta: float = 10000.0, partial: float | None = None, **more: Any
) -> ModelConfig:
    """The model from the keys that Llama and its kin share, with what the family adds in `more`.

    Args:
      theta: base of rotary positions where none is given.
      partial: the part of each head's dimensions that turns where none is given; None: all turn, always.

    Raises:
      UserError: a key that is wrong, not known, or known and not supported.
    """
    heads = s.whole("num_attention_heads")
    fields: dict[str, Any] = {
        "vocab_size": s.whole("vocab_size"),
        "width": s.whole("hidden_size"),
        "num_layers": s.whole("num_hidden_layers", most=1 << 12),
        "num_heads": heads,
        "num_kv_heads": s.whole("num_key_value_heads", heads),
        "mlp_width": s.whole("intermediate_size"),
        "norm_eps": s.number(_norm_key(more.get("norm", "rms"))),
        "tie_embeddings": s.flag("tie_word_embeddings"),
    }
    fields["head_dim"] = head_dim(s, fields["width"], heads)
    if "activation" not in more:
        fields["activation"] = activation(s, "hidden_act", "silu")
    turning = None if partial is None else Partial(fields["head_dim"], partial)
    rope = more["position"] if "position" in more else read_rope(s, theta, partial=turning)
    fields |= {"position": rope, "max_length": max_length(s, rope)}
    return finish(s, {**fields, **more})


def finish(s: Settings, fields: Mapping[str, Any]) -> ModelConfig:
    """The model of `fields`, once all keys are accounted for.

    Raises:
      UserError: they do not fit.
    """
    s.done()
    try:
        return ModelConfig(**fields, family=s.family)
    except ConfigError as error:
        raise UserError(f"config.json: no such model can be: {error}") from None


def write_decoder(config: ModelConfig, model_type: str, architecture: str) -> Json:
    """The keys of `read_decoder`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.key_dim,
        "hidden_act": activation_name(config.activation),
        _norm_key(config.norm): config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config),
    }


def activation(s: Settings, key: str, default: str) -> str:
    """Our name of an activation.

    Raises:
      UserError: it is not known.
    """
    name = s.word(key, default)
    if name not in ACTIVATIONS:
        raise s.refuse(key, f"supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_name(ours: str) -> str:
    """Theirs of ours."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def read_kinds(
    s: Settings,
    layers: int,
    default: Sequence[LayerKind],
    window: int | None,
    rope_theta: float | None = None,
) -> AttentionConfig:
    """Kinds of attention, layer by layer.

    Args:
      default: the kinds where `layer_types` does not tell them.
      window: of the sliding layers.
      rope_theta: of the sliding layers, where theirs is another.
    """
    types = s.words("layer_types")
    kinds = tuple(default)
    if types is not None:
        unknown = [kind for kind in types if kind not in _KINDS]
        if unknown or len(types) != layers:
            why = f"supported: {', '.join(_KINDS)}" if unknown else f"there are {layers} layers"
            raise s.refuse("layer_types", why)
        kinds = tuple(_KINDS[kind] for kind in types)
    if "sliding" not in kinds:
        return FullAttentionConfig()
    if window is None:
        raise s.wrong("sliding_window", "a whole number, since layers slide")
    if set(kinds) == {"sliding"}:
        return SlidingAttentionConfig(window=window, rope_theta=rope_theta)
    return SlidingAttentionConfig(window=window, pattern=period_of(kinds), rope_theta=rope_theta)


def layer_types(config: ModelConfig) -> list[str]:
    """The kinds of a model's layers in transformers' words.

    Raises:
      UserError: others than these.
    """
    names: dict[str, str] = {ours: theirs for theirs, ours in _KINDS.items()}
    for kind in config.kinds:
        if kind not in names:
            raise UserError(f"the family {config.family} has no attention of kind {kind}")
    return [names[kind] for kind in config.kinds]


def attention_of(window: int | None) -> AttentionConfig:
    """Of a model whose layers all slide, or none."""
    return FullAttentionConfig() if window is None else SlidingAttentionConfig(window=window)


def window_of(config: ModelConfig) -> int | None:
    """The window of a model's sliding layers, if there are any."""
    return config.attention.window if isinstance(config.attention, SlidingAttentionConfig) else None


def head_dim(s: Settings, width: int, heads: int) -> int:
    """What `head_dim` says, or the width split over the heads.

    Raises:
      UserError: it says nothing, and the heads do not divide the width.
    """
    if "head_dim" not in s and width % heads:
        raise s.wrong("num_attention_heads", f"a divisor of hidden_size {width} where there is no head_dim")
    return s.whole("head_dim", width // heads)


def _norm_key(norm: str) -> str:
    return "layer_norm_eps" if norm == "layer" else "rms_norm_eps"
