"""LLaVA-OneVision: SigLIP and Qwen2; as LLaVA-NeXT, with features of many tiles scaled down."""

import re

from jaxlab.checkpoints.families import llava, llava_next, llava_original, towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig

SIGLIP: Json = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14,
    "image_size": 384, "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False,
}  # fmt: skip


def read_config(config: Json) -> ModelConfig:
    default = [[384 * down, 384 * across] for down in range(1, 7) for across in range(1, 7)]
    grid = tuple((int(h), int(w)) for h, w in config.get("image_grid_pinpoints") or default)
    ratio = config.get("vision_aspect_ratio", "anyres_max_9")
    most = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if most is None:
        raise UserError(f"vision_aspect_ratio {ratio!r} is not supported; use anyres_max_ and a number")
    vit = llava.read_vit(config, layer=-1, strategy="full", grid=grid, max_tiles=int(most[1]))
    vision = towers.read_clip(config, towers.image_token(config, 151646), vit, SIGLIP)
    tie = towers.tied(config, either=True, default=False)
    return towers.read_text(config, vision, "llava_onevision", default="qwen2", tie=tie)


def write_config(config: ModelConfig) -> Json:
    return {
        **llava.write_llava(config, "llava_onevision", "LlavaOnevisionForConditionalGeneration"),
        "image_grid_pinpoints": [list(size) for size in config.vision.vit.grid],
        "vision_aspect_ratio": f"anyres_max_{config.vision.vit.max_tiles}",
    }


FAMILY = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    rows=llava_next.ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants={**towers.LLAVA_VARIANTS, "original": llava_original.RENAMES},
)
