"""What the config.json of vision-language families have in common: a tower, features of it, a text model."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import MllamaVisionConfig, ModelConfig, VisionConfig, ViTConfig

_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP = {
    **_CLIP,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
DEFAULTS: dict[str, Json] = {"clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP}
"""What a vision_config of each type means where it says nothing."""

CLIP_LARGE: Json = {
    "model_type": "clip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""LLaVA's tower."""

SIGLIP_LARGE: Json = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
"""LLaVA-OneVision's."""


def settings(config: Json, family: str) -> Settings:
    """The top level of a config.json, without keys that say nothing of the model."""
    s = Settings(config, family)
    s.ignore(
        "model_type",
        "ignore_index",
        "image_seq_length",
        "image_seq_len",
        "video_token_index",
        "vocab_size",
        "initializer_range",
        "use_image_newline_parameter",
        "boi_token_index",
        "eoi_token_index",
        "hidden_size",
    )
    return s


def inner(s: Settings, key: str, defaults: Json) -> Settings:
    """A group of keys."""
    found = Settings(s.value(key, {}), s.family, defaults, within=f"{key}.")
    found.ignore("model_type", "initializer_range", "vocab_size", "projection_dim", "tie_word_embeddings")
    return found


def square(s: Settings, key: str) -> int:
    """A size that may be told as [height, width].

    Raises:
      UserError: these differ.
    """
    found = s.value(key)
    if isinstance(found, list | tuple) and len(found) == 2 and found[0] == found[1]:
        found = found[0]
    if type(found) is not int or not 1 <= found < 1 << 20:
        raise s.wrong(key, "a whole number, or one twice: other than squares is not supported")
    return found


def build[Made](make: Callable[..., Made], **fields: Any) -> Made:
    """A config from the fields that a config.json tells.

    Raises:
      UserError: they do not fit together.
    """
    try:
        return make(**fields)
    except ConfigError as error:
        raise UserError(f"config.json: no such model can be: {error}") from None


def read_tower(v: Settings, image_token: int, vit: Json) -> ViTConfig:
    """The tower with the sizes that every vision_config tells, and the fields `vit` that the family says."""
    return build(ViTConfig, **read_sizes(v, image_token), **vit)


def read_sizes(v: Settings, image_token: int) -> Json:
    """The fields that every vision_config tells; all its keys have to be accounted for."""
    fields = {
        "num_layers": v.whole("num_hidden_layers", most=1 << 12),
        "image_size": square(v, "image_size"),
        "patch_size": square(v, "patch_size"),
        "channels": v.whole("num_channels"),
        "width": v.whole("hidden_size"),
        "num_heads": v.whole("num_attention_heads"),
        "mlp_width": v.whole("intermediate_size"),
    }
    v.done()
    return {**fields, "image_token": image_token}


def write_tower(v: ViTConfig | MllamaVisionConfig) -> Json:
    """The keys of `read_sizes`."""
    return {
        "num_hidden_layers": v.num_layers,
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "num_channels": v.channels,
        "hidden_size": v.width,
        "num_attention_heads": v.num_heads,
        "intermediate_size": v.mlp_width,
    }


def read_clip(
    s: Settings, image_token: int, vit: Json, default: Json, known: tuple[str, ...] = tuple(DEFAULTS)
) -> ViTConfig:
    """A tower of CLIP or SigLIP from `vision_config`.

    Args:
      vit: fields, what the family says of features and connector.
      default: the vision_config of a config.json that has none.
      known: types of towers that the family takes.
    """
    given = s.value("vision_config")
    if given is None:
        s.config["vision_config"] = default
    v = inner(s, "vision_config", default)
    kind = v.word("model_type", "")
    if kind not in known:
        raise v.refuse("model_type", f"supported: {', '.join(known)}")
    v = inner(s, "vision_config", DEFAULTS[kind])
    v.ignore("projector_hidden_act", "num_image_tokens", "initializer_factor")
    clip = kind == "clip_vision_model"
    own = {
        "class_token": clip,
        "pre_norm": clip,
        "patch_bias": not clip,
        "norm_eps": v.number("layer_norm_eps"),
        "activation": language.activation(v, "hidden_act", "gelu"),
        "pooling_head": not clip and v.flag("vision_use_head"),
    }
    return read_tower(v, image_token, {**vit, **own})


def write_clip(v: ViTConfig) -> Json:
    """The vision_config of `read_clip`."""
    extra = {} if v.class_token else {"vision_use_head": v.pooling_head}
    return {
        "model_type": "clip_vision_model" if v.class_token else "siglip_vision_model",
        **write_tower(v),
        "hidden_act": language.activation_name(v.activation),
        "layer_norm_eps": v.norm_eps,
        **extra,
    }


def image_token(s: Settings, default: int) -> int:
    """The placeholder's id, by either of its keys."""
    by_id = s.whole("image_token_id", default, least=0)
    return s.whole("image_token_index", by_id, least=0)


def feature_layers(s: Settings, default: int) -> tuple[int, ...]:
    found = s.value("vision_feature_layer", default)
    layers = tuple(found) if isinstance(found, list) else (found,)
    if not layers or any(type(layer) is not int for layer in layers):
        raise s.wrong("vision_feature_layer", "a whole number or a list of them")
    return layers


def write_feature_layers(layers: tuple[int, ...]) -> int | list[int]:
    return layers[0] if len(layers) == 1 else list(layers)


def drop_first(s: Settings, default: str) -> bool:
    """Whether the first feature is dropped, from `vision_feature_select_strategy`."""
    strategy = s.word("vision_feature_select_strategy", default)
    if strategy not in ("default", "full"):
        raise s.wrong("vision_feature_select_strategy", "default or full")
    return strategy == "default"


def grid(s: Settings, default: list[list[int]]) -> tuple[tuple[int, int], ...]:
    """Heights and widths to which images are fitted, from `image_grid_pinpoints`."""
    found = s.value("image_grid_pinpoints", default)
    sizes = found if isinstance(found, list) else [found]
    if not sizes or not all(
        isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size) for size in sizes
    ):
        raise s.wrong("image_grid_pinpoints", "a list of heights and widths")
    return tuple((height, width) for height, width in sizes)


def tied(s: Settings, *, either: bool, default: bool) -> bool:
    """Whether the head is the embedding, which may be said at the top, in text_config, or nowhere.

    Where both speak and differ, transformers 5 heeds the top and transformers 4 the text_config; with
    `either`, one that says so is enough.
    """
    text = Settings(s.value("text_config", {}), s.family, within="text_config.")
    told = [level.flag("tie_word_embeddings") for level in (s, text) if "tie_word_embeddings" in level]
    s.ignore("tie_word_embeddings")
    if len(told) < 2:
        return told[0] if told else default
    if either:
        return any(told)
    return told[0] if s.word("transformers_version", "5").partition(".")[0] != "4" else told[1]


def read_text(
    s: Settings,
    vision: VisionConfig | None,
    *,
    default: str,
    tie: bool,
    known: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    key: str = "text_config",
    **changed: Any,
) -> ModelConfig:
    """The whole model: the text model of `text_config` (or `key`), as its own family reads it, with a tower.

    Args:
      default: the type of a text_config that says none.
      tie: whether the head is tied.
      known: the types that the family takes; empty: all.
      without: keys of text_config that the family itself understands.
      changed: keys of text_config that the family replaces.
    """
    from jaxlab.checkpoints import families

    text = Settings(s.value(key, {}), s.family, within=f"{key}.")
    kind = text.word("model_type", default)
    s.done()
    if known and kind not in known:
        raise text.refuse("model_type", f"supported: {', '.join(known)}")
    told = {key: value for key, value in text.config.items() if key not in without}
    told |= {"model_type": kind, "tie_word_embeddings": tie, **changed}
    try:
        language_model = families.find_by_model_type(told["model_type"]).read_config(told)
    except UserError as error:
        raise UserError(str(error).replace("config.json: ", f"config.json: {key}.", 1)) from None
    if language_model.has_vision:
        raise text.refuse("model_type", "it is no language model")
    name = f"{s.family}+{language_model.family}"
    return build(partial(dataclasses.replace, language_model), family=name, vision=vision)


def write_text(config: ModelConfig, architectures: bool = False) -> Json:
    """The text_config of `read_text`; `architectures`: with this key."""
    from jaxlab.checkpoints import families

    name = config.family.partition("/")[0].partition("@")[0].partition("+")[2]
    text = families.find(name).write_config(dataclasses.replace(config.language, family=name))
    return {key: value for key, value in text.items() if architectures or key != "architectures"}
