"""What vision-language families share: rows and configs of CLIP and SigLIP, the text model's config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlab.checkpoints.families.base import Json, Renames
from jaxlab.checkpoints.names import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig, VisionConfig
from jaxlab.models.vit_config import ViTConfig

WITHIN_LLAVA: Renames = ((r"^", "language_model."),)
"""From a language model's names to those inside LLaVA and the families that follow it."""

_MEMORY: Renames = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
)
_FLAT: Renames = ((r"vision_tower\.vision_model\.", "vision_tower."),)
LLAVA_VARIANTS: Mapping[str, Renames] = {
    "flat": _FLAT,
    "memory": _MEMORY,
    "memory_flat": (*_MEMORY, *_FLAT),
}
"""flat: as transformers 5.24 writes models that it made. memory: as transformers names parameters in memory
since 4.52 (flat since 5.24), and as some folders have them."""

ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip


def activation(config: Json, key: str, default: str) -> Any:
    """Our name of an activation. Raises UserError for one that is not known."""
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise UserError(f"{key} {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_name(ours: str) -> str:
    """Theirs of ours."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def linear(path: str, name: str, layout: str) -> Rows:
    """A matrix and its bias."""
    out = layout.partition("->")[0].split()[0]
    return (
        Row(path, f"{name}.weight", layout),
        Row(f"{path}_bias", f"{name}.bias", f"{out} -> {out}"),
    )


def norm(path: str, name: str) -> Rows:
    return (
        Row(f"{path}.scale", f"{name}.weight", "d -> d"),
        Row(f"{path}.bias", f"{name}.bias", "d -> d"),
    )


def attention(path: str, name: str, output: str) -> Rows:
    """Projections of attention; their output projection is named differently from family to family."""
    rows: Rows = ()
    for ours in ("query", "key", "value"):
        theirs = f"{name}.{ours[0]}_proj"
        rows += (
            Row(f"{path}.{ours}", f"{theirs}.weight", "(h k) d -> d h k"),
            Row(f"{path}.{ours}_bias", f"{theirs}.bias", "(h k) -> h k"),
        )
    return (
        *rows,
        Row(f"{path}.output", f"{name}.{output}.weight", "d (h k) -> h k d"),
        Row(f"{path}.output_bias", f"{name}.{output}.bias", "d -> d"),
    )


def plain_mlp(path: str, name: str) -> Rows:
    return (
        *linear(f"{path}.up", f"{name}.fc1", "f d -> d f"),
        *linear(f"{path}.down", f"{name}.fc2", "d f -> f d"),
    )


def gated_mlp(path: str, name: str) -> Rows:
    return (
        Row(f"{path}.gate", f"{name}.gate_proj.weight", "f d -> d f"),
        Row(f"{path}.up", f"{name}.up_proj.weight", "f d -> d f"),
        Row(f"{path}.down", f"{name}.down_proj.weight", "d f -> f d"),
    )


def clip_rows(name: str) -> Rows:
    """A tower of CLIP, SigLIP or Idefics at `name`."""
    head = tuple(f"vision.head.attention.{part}" for part in ("query", "key", "value"))
    layer = (
        *norm("attention_norm", "layer_norm1"),
        *norm("mlp_norm", "layer_norm2"),
        *attention("attention", "self_attn", "out_proj"),
        *plain_mlp("mlp", "mlp"),
    )
    return (
        Row("vision.class_token", f"{name}.embeddings.class_embedding", "d -> d"),
        Row("vision.patch.table", f"{name}.embeddings.patch_embedding.weight", "d c y x -> c y x d"),
        Row("vision.patch.bias", f"{name}.embeddings.patch_embedding.bias", "d -> d"),
        Row("vision.position.table", f"{name}.embeddings.position_embedding.weight", "p d -> p d"),
        *norm("vision.pre_norm", f"{name}.pre_layrnorm"),
        *in_layers("vision.layers", f"{name}.encoder.layers", layer),
        *norm("vision.final_norm", f"{name}.post_layernorm"),
        Row("vision.head.probe", f"{name}.head.probe", "() () d -> d"),
        Row(head, f"{name}.head.attention.in_proj_weight", "(h k) d -> d h k"),
        Row(tuple(f"{path}_bias" for path in head), f"{name}.head.attention.in_proj_bias", "(h k) -> h k"),
        Row("vision.head.attention.output", f"{name}.head.attention.out_proj.weight", "d (h k) -> h k d"),
        Row("vision.head.attention.output_bias", f"{name}.head.attention.out_proj.bias", "d -> d"),
        *norm("vision.head.norm", f"{name}.head.layernorm"),
        *plain_mlp("vision.head.mlp", f"{name}.head.mlp"),
    )


CLIP_IGNORED = (r".*\.embeddings\.position_ids",)
"""Buffers that older versions wrote: 0, 1, 2, ..."""

MLP_ROWS: Rows = (
    *linear("projector.hidden", "multi_modal_projector.linear_1", "d v -> v d"),
    *linear("projector.output", "multi_modal_projector.linear_2", "d v -> v d"),
)

_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP = {
    **_CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}  # fmt: skip
DEFAULTS: Mapping[str, Json] = {"clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP}
"""What a vision_config of each type means where it says nothing."""


def square(value: Any, key: str) -> int:
    """A size that may be told as [height, width]."""
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise UserError(f"{key} {list(value)} is no square, which is not supported")
        value = value[0]
    return int(value)


def read_tower(vision: Json, image_token: int, vit: ViTConfig) -> VisionConfig:
    """The sizes that every vision_config tells, with what the family says of the rest."""
    return VisionConfig(
        num_layers=vision["num_hidden_layers"],
        kind="vit",
        image_size=square(vision["image_size"], "image_size"),
        patch_size=square(vision["patch_size"], "patch_size"),
        channels=vision["num_channels"],
        width=vision["hidden_size"],
        num_heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        image_token=image_token,
        vit=vit,
    )


def read_clip(config: Json, image_token: int, vit: ViTConfig, default: Json) -> VisionConfig:
    """A tower of CLIP or SigLIP from `vision_config`.

    Args:
      vit: what the family says of features and connector.
      default: the vision_config of a config.json that has none.
    """
    vision = config.get("vision_config") or default
    kind = str(vision.get("model_type", default["model_type"]))
    if kind not in DEFAULTS:
        raise UserError(
            f"a vision tower of type {kind!r} is not supported here; supported: {', '.join(DEFAULTS)}"
        )
    vision = {**DEFAULTS[kind], **vision}
    clip = kind == "clip_vision_model"
    vit = dataclasses.replace(
        vit, class_token=clip, pre_norm=clip, patch_bias=not clip, norm_eps=vision["layer_norm_eps"],
        activation=activation(vision, "hidden_act", ""),
        pooling_head=not clip and bool(vision["vision_use_head"]),
    )  # fmt: skip
    return read_tower(vision, image_token, vit)


def write_tower(v: VisionConfig) -> Json:
    """The keys of `read_tower`."""
    return {
        "num_hidden_layers": v.num_layers, "image_size": v.image_size, "patch_size": v.patch_size,
        "num_channels": v.channels, "hidden_size": v.width, "num_attention_heads": v.num_heads,
        "intermediate_size": v.mlp_width,
    }  # fmt: skip


def write_clip(v: VisionConfig) -> Json:
    """The vision_config of `read_clip`."""
    extra = {} if v.vit.class_token else {"vision_use_head": v.vit.pooling_head}
    return {
        "model_type": "clip_vision_model" if v.vit.class_token else "siglip_vision_model", **write_tower(v),
        "hidden_act": activation_name(v.vit.activation), "layer_norm_eps": v.vit.norm_eps, **extra,
    }  # fmt: skip


def image_token(config: Json, default: int) -> int:
    """The placeholder's id, by either of its keys."""
    key = "image_token_index" if "image_token_index" in config else "image_token_id"
    return int(config.get(key, default))


def feature_layers(config: Json, default: int) -> tuple[int, ...]:
    layers = config.get("vision_feature_layer", default)
    return tuple(layers) if isinstance(layers, list) else (int(layers),)


def write_feature_layers(layers: tuple[int, ...]) -> int | list[int]:
    return layers[0] if len(layers) == 1 else list(layers)


def drop_first(config: Json, default: str) -> bool:
    """Whether the first feature is dropped, from `vision_feature_select_strategy`."""
    strategy = config.get("vision_feature_select_strategy", default)
    if strategy not in ("default", "full"):
        raise UserError(f"vision_feature_select_strategy {strategy!r} is not supported; use default or full")
    return bool(strategy == "default")


def tied(config: Json, *, either: bool, default: bool) -> bool:
    """Whether the head is the embedding, which may be said at the top, in text_config, or nowhere.

    Where both speak and differ, transformers 5 heeds the top and transformers 4 the text_config; with
    `either`, one that says so is enough.
    """
    top = config.get("tie_word_embeddings")
    inner = (config.get("text_config") or {}).get("tie_word_embeddings")
    if top is None or inner is None:
        said = inner if top is None else top
        return default if said is None else bool(said)
    if either:
        return bool(top or inner)
    return bool(top if int(str(config.get("transformers_version", "5")).partition(".")[0]) >= 5 else inner)


def read_text(
    config: Json, vision: VisionConfig, family: str, *, default: str, tie: bool, known: tuple[str, ...] = ()
) -> ModelConfig:
    """The whole model: the text model of `text_config`, as its own family reads it, with a tower.

    Args:
      default: the type of a text_config that says none.
      tie: whether the head is tied.
      known: the types that the family takes; empty: all.
    """
    from jaxlab.checkpoints import families

    text = dict(config.get("text_config") or {})
    kind = text.setdefault("model_type", default)
    if known and kind not in known:
        raise UserError(f"{family} around a language model of type {kind!r} is not supported")
    inner = families.find_by_model_type(kind)
    language = inner.read_config({**text, "tie_word_embeddings": tie})
    return dataclasses.replace(language, vision=vision, family=f"{family}+{language.family}")


def write_text(config: ModelConfig) -> Json:
    """The text_config of `read_text`."""
    from jaxlab.checkpoints import families

    name = config.family.partition("/")[0].partition("@")[0].partition("+")[2]
    text = families.find(name).write_config(dataclasses.replace(config.language, family=name))
    return {key: value for key, value in text.items() if key != "architectures"}
