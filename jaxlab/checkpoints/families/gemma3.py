"""Gemma 3 with images: SigLIP, averages of patches, a norm, one matrix; an image sees itself both ways."""

import dataclasses
import math

from jaxlab import processing
from jaxlab.checkpoints.families import towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.tensor_table import Row
from jaxlab.models import ModelConfig, ViTConfig

SIGLIP: Json = {"model_type": "siglip_vision_model"}


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "gemma3")
    vit = dict(
        final_norm="used",
        pooled_side=math.isqrt(s.whole("mm_tokens_per_image", 256)),
        connector="linear",
        connector_bias=False,
        connector_norm="rms",
        connector_norm_offset=1.0,
        together="images",
    )
    vision = vlm.read_clip(s, vlm.image_token(s, 262144), vit, SIGLIP, ("siglip_vision_model",))
    vision = dataclasses.replace(vision, connector_norm_eps=vision.norm_eps)
    tie = vlm.tied(s, either=False, default=True)
    return vlm.read_text(s, vision, default="gemma3_text", tie=tie, known=("gemma3_text",))


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(ViTConfig)
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "image_token_index": v.image_token,
        "mm_tokens_per_image": v.pooled_side**2,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": vlm.write_text(config),
        "vision_config": vlm.write_clip(v),
    }


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3",),
    rows=(
        *towers.clip_rows("vision_tower.vision_model"),
        Row("projector.norm.scale", "multi_modal_projector.mm_soft_emb_norm.weight", "v -> v"),
        Row("projector.output", "multi_modal_projector.mm_input_projection_weight", "v d -> v d"),
    ),
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.GEMMA3,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants=towers.LLAVA_VARIANTS,
)
