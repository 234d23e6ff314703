"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share in a Hugging Face folder."""

import dataclasses
import math
from functools import partial
from typing import Any

from jaxlab.checkpoints.families import language, vlm
from jaxlab.checkpoints.families.base import Json, Renames
from jaxlab.checkpoints.families.rope import max_length, read_rope, write_rope
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.families.towers import linear
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, QwenVisionConfig, VisionConfig

_QKV = tuple(f"attention.{part}" for part in ("query", "key", "value"))
ATTENTION: Rows = (
    Row(_QKV, "attn.qkv.weight", "(h k) d -> d h k"),
    Row(tuple(f"{path}_bias" for path in _QKV), "attn.qkv.bias", "(h k) -> h k"),
    Row("attention.output", "attn.proj.weight", "d (h k) -> h k d"),
    Row("attention.output_bias", "attn.proj.bias", "d -> d"),
)
MEMORY: Renames = ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual."))
"""From the names of Qwen2-VL and 2.5 on the hub to those that transformers has in memory since 4.52."""
BASE: Renames = ((r"^model\.", "language_model."),)
"""To those of a model saved without its head."""

_EDGE = ("rope_scaling", "rope_parameters", "rope_theta")
_TEXT_KEYS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
        "attention_bias",
        *_EDGE,
    ]
)
"""Keys of the text model, which older versions wrote at the top; text_config goes before them."""


def rows(root: str, layer: Rows, merger: tuple[str, str, str]) -> Rows:
    """The rows of a tower at `root`, with the names of the norm and the two matrices of its merger."""
    return (
        Row("vision.patch.table", f"{root}.patch_embed.proj.weight", "d c t y x -> c t y x d"),
        Row("vision.patch.bias", f"{root}.patch_embed.proj.bias", "d -> d"),
        *in_layers("vision.layers", f"{root}.blocks", (*layer, *ATTENTION)),
        *merger_rows("projector", f"{root}.merger", merger),
    )


def merger_rows(path: str, name: str, parts: tuple[str, str, str]) -> Rows:
    norm, first, second = parts
    return (
        Row(f"{path}.norm.scale", f"{name}.{norm}.weight", "v -> v"),
        Row(f"{path}.norm.bias", f"{name}.{norm}.bias", "v -> v"),
        *linear(f"{path}.hidden", f"{name}.{first}", "f v -> v f"),
        *linear(f"{path}.output", f"{name}.{second}", "d f -> f d"),
    )


def settings(config: Json, family: str) -> Settings:
    """The top level of a config.json, its text model in text_config if it was at the top."""
    if config.get("text_config") is None:
        text = {key: config[key] for key in _TEXT_KEYS if key in config}
        config = {**{key: value for key, value in config.items() if key not in text}, "text_config": text}
    s = vlm.settings(config, family)
    s.ignore(*_TEXT_KEYS)
    return s


def tower_settings(s: Settings, defaults: Json) -> Settings:
    """The vision_config, with the channels of either spelling, and positions by row and column."""
    v = vlm.inner(s, "vision_config", defaults)
    v.ignore("spatial_patch_size", "tokens_per_second")
    if v.whole("in_chans", v.whole("in_channels", 3)) != v.whole("in_channels", 3):
        raise v.refuse("in_chans", "it differs from in_channels")
    rope = Settings(v.value("rope_parameters", {}), s.family, within="vision_config.rope_parameters.")
    if rope.word("rope_type", "axial") != "axial":
        raise rope.refuse("rope_type", "supported: axial")
    if rope.number("rope_theta", 10000.0) != 10000.0:
        raise rope.refuse("rope_theta", "supported: 10000")
    rope.done()
    return v


def read_tower(
    s: Settings, v: Settings, *, width: str, out: str, mlp_width: int, qwen: Json
) -> QwenVisionConfig:
    """The sizes of a vision_config.

    Args:
      width, out: the keys of the tower's width and of the text model's.
      qwen: fields, what the family says of the rest.
    """
    fields: dict[str, Any] = {
        "num_layers": v.whole("depth", most=1 << 12),
        "patch_size": vlm.square(v, "patch_size"),
        "channels": v.whole("in_channels", 3),
        "width": v.whole(width),
        "num_heads": v.whole("num_heads"),
        "mlp_width": mlp_width,
        "image_token": vlm.image_token(s, 151655),
        "frames": vlm.square(v, "temporal_patch_size"),
        "merge": v.whole("spatial_merge_size"),
        "activation": language.activation(v, "hidden_act", "gelu"),
        **qwen,
    }
    text = Settings(s.value("text_config", {}), s.family, within="text_config.")
    if "hidden_size" in text and v.whole(out) != text.whole("hidden_size"):
        raise v.refuse(out, f"the text model's hidden_size is {text.config['hidden_size']}")
    v.done()
    return vlm.build(QwenVisionConfig, **fields)


def numbers(s: Settings, key: str) -> tuple[int, ...]:
    """A list of layer numbers."""
    found = s.value(key, [])
    if not isinstance(found, list | tuple) or any(type(n) is not int or n < 0 for n in found):
        raise s.wrong(key, "a list of layer numbers")
    return tuple(found)


def write_tower(config: ModelConfig) -> Json:
    """The keys that all three share."""
    v = config.vision_as(QwenVisionConfig)
    return {
        "depth": v.num_layers,
        "num_heads": v.num_heads,
        "in_channels": v.channels,
        "patch_size": v.patch_size,
        "spatial_merge_size": v.merge,
        "temporal_patch_size": v.frames,
        "hidden_act": language.activation_name(v.activation),
    }


def read_text(
    s: Settings,
    vision: VisionConfig,
    *,
    like: str,
    defaults: Json,
    theta: float,
    sections: tuple[int, ...],
    interleaved: bool,
    tie: bool,
) -> ModelConfig:
    """The whole model: the text model as the family `like` reads it, with positions of three coordinates.

    Args:
      sections: the pairs that turn by each coordinate, where the config.json does not say it.
      interleaved: whether coordinates alternate over the pairs.
    """
    from jaxlab.checkpoints import families

    given = s.value("text_config", {})
    text = Settings(given, s.family, defaults, within="text_config.")
    if text.word("model_type", f"{s.family}_text") not in (f"{s.family}_text", s.family):
        raise text.refuse("model_type", f"supported: {s.family}_text")
    s.done()
    rope = read_rope(text, theta, sections=True)
    if rope.sections_interleaved and not interleaved:
        raise text.refuse("rope_scaling", "coordinates do not alternate in this family")
    heads, width = text.whole("num_attention_heads"), text.whole("hidden_size")
    if like == "qwen2" and text.whole("head_dim", width // heads) * heads != width:
        raise text.refuse("head_dim", f"this family cuts hidden_size {width} into {heads} heads")
    told = {key: value for key, value in text.config.items() if key not in _EDGE}
    told |= {"model_type": like, "tie_word_embeddings": tie}
    try:
        model = families.find(like).read_config(told)
    except UserError as error:
        raise UserError(str(error).replace("config.json: ", "config.json: text_config.", 1)) from None
    rope = dataclasses.replace(rope, sections=rope.sections or sections, sections_interleaved=interleaved)
    return vlm.build(
        partial(dataclasses.replace, model),
        family=f"{s.family}+{like}",
        vision=vision,
        position=rope,
        max_length=max_length(text, rope),
    )


def write_config(config: ModelConfig, family: str, architecture: str, *, flat: bool) -> Json:
    """A config.json; `flat`: the text model's keys at the top, as every version of transformers reads it."""
    text = {**vlm.write_text(config), **write_rope(config)}
    kind = "mrope" if config.rope.scaling == "none" else config.rope.scaling
    text["rope_scaling"] = {**(text["rope_scaling"] or {}), "type": kind}
    del text["tie_word_embeddings"]
    inner = {**text, "model_type": f"{family}_text"}
    return {
        **(text if flat else {"text_config": inner}),
        "architectures": [architecture],
        "model_type": family,
        "tie_word_embeddings": config.tie_embeddings,
        "image_token_id": config.image_token,
    }


def side_of(s: Settings, key: str) -> int:
    """The side of a square table of positions."""
    count = s.whole(key)
    if math.isqrt(count) ** 2 != count:
        raise s.wrong(key, "a square number")
    return math.isqrt(count)
