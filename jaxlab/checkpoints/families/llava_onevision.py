"""LLaVA-OneVision: SigLIP and Qwen2; as LLaVA-NeXT, with features of many tiles scaled down."""

import re

from jaxlab import processing
from jaxlab.checkpoints.families import llava, llava_next, llava_original, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.models import ModelConfig, ViTConfig


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "llava_onevision")
    most = re.fullmatch(r"anyres_max_([1-9]\d{0,4})", s.word("vision_aspect_ratio", "anyres_max_9"))
    if most is None:
        raise s.wrong("vision_aspect_ratio", "anyres_max_ and a number of tiles")
    grid = vlm.grid(s, [[384 * down, 384 * across] for down in range(1, 7) for across in range(1, 7)])
    vit = llava.read_vit(s, layer=-1, strategy="full", grid=grid, max_tiles=int(most[1]))
    vision = vlm.read_clip(s, vlm.image_token(s, 151646), vit, vlm.SIGLIP_LARGE)
    return vlm.read_text(s, vision, default="qwen2", tie=vlm.tied(s, either=True, default=False))


def write_config(config: ModelConfig) -> Json:
    return {
        **llava.write_llava(config, "llava_onevision", "LlavaOnevisionForConditionalGeneration"),
        "image_grid_pinpoints": [list(size) for size in config.vision_as(ViTConfig).grid],
        "vision_aspect_ratio": f"anyres_max_{config.vision_as(ViTConfig).max_tiles}",
    }


FAMILY = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    rows=llava_next.ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.LLAVA_ONEVISION,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants={**towers.LLAVA_VARIANTS, "original": llava_original.RENAMES},
)
