"""LLaVA-1.5: CLIP or SigLIP, a two-layer MLP, and any language model."""

from typing import Any

from jaxlab import processing
from jaxlab.checkpoints.families import language, llava_original, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import ModelConfig, ViTConfig


def read_vit(s: Settings, *, layer: int = -2, strategy: str = "default", **more: Any) -> Json:
    """What LLaVA and its successors say of features and projector."""
    return dict(
        final_norm="unused",
        feature_layers=vlm.feature_layers(s, layer),
        drop_first=vlm.drop_first(s, strategy),
        connector="mlp",
        connector_bias=s.flag("multimodal_projector_bias", True),
        connector_activation=language.activation(s, "projector_hidden_act", "gelu"),
        **more,
    )


def write_llava(config: ModelConfig, model_type: str, model_class: str) -> Json:
    """The keys that LLaVA shares with its successors."""
    v = config.vision_as(ViTConfig)
    return {
        "architectures": [model_class],
        "model_type": model_type,
        "image_token_index": v.image_token,
        "vision_feature_layer": vlm.write_feature_layers(v.feature_layers),
        "vision_feature_select_strategy": "default" if v.drop_first else "full",
        "projector_hidden_act": language.activation_name(v.connector_activation),
        "multimodal_projector_bias": v.connector_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": vlm.write_text(config),
        "vision_config": vlm.write_clip(v),
    }


def read_config(config: Json) -> ModelConfig:
    if "mm_vision_tower" in config:
        return llava_original.read_config(config)
    s = vlm.settings(config, "llava")
    vision = vlm.read_clip(s, vlm.image_token(s, 32000), read_vit(s), vlm.CLIP_LARGE)
    return vlm.read_text(s, vision, default="llama", tie=vlm.tied(s, either=True, default=False))


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(ViTConfig)
    features = v.features(v.image_size // v.patch_size)
    return {**write_llava(config, "llava", "LlavaForConditionalGeneration"), "image_seq_length": features}


FAMILY = Family(
    name="llava",
    model_types=("llava", "llava_llama", "llava_mistral", "llava_qwen"),
    rows=(*towers.clip_rows("vision_tower.vision_model"), *towers.MLP_ROWS),
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.LLAVA,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants={**towers.LLAVA_VARIANTS, "original": llava_original.RENAMES},
)
