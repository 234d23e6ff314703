"""Gemma 3 with images: SigLIP, averages of patches, a norm, one matrix; an image sees itself both ways."""

import dataclasses
import math

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.names import Row
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ViTConfig

SIGLIP: Json = {"model_type": "siglip_vision_model"}


def read_config(config: Json) -> ModelConfig:
    vit = ViTConfig(
        final_norm="used",
        pooled_side=math.isqrt(config.get("mm_tokens_per_image", 256)),
        connector="linear",
        connector_bias=False,
        connector_norm="rms",
        connector_norm_offset=1.0,
        together="images",
    )
    vision = towers.read_clip(config, towers.image_token(config, 262144), vit, SIGLIP)
    if vision.vit.class_token:
        raise UserError("Gemma 3 around a tower of CLIP is not supported")
    vit = dataclasses.replace(vision.vit, connector_norm_eps=vision.vit.norm_eps)
    vision = dataclasses.replace(vision, vit=vit)
    tie = towers.tied(config, either=False, default=True)
    return towers.read_text(config, vision, "gemma3", default="gemma3_text", tie=tie, known=("gemma3_text",))


def write_config(config: ModelConfig) -> Json:
    v = config.vision
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "image_token_index": v.image_token, "mm_tokens_per_image": v.vit.pooled_side**2,
        "tie_word_embeddings": config.tie_embeddings, "text_config": towers.write_text(config),
        "vision_config": towers.write_clip(v),
    }  # fmt: skip


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
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants=towers.LLAVA_VARIANTS,
)
