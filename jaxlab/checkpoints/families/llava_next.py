"""LLaVA-NeXT (1.6): images cut to tiles, with a learned newline after each row of patches."""

from jaxlab import processing
from jaxlab.checkpoints.families import llava, llava_original, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.tensor_table import Row
from jaxlab.models import ModelConfig, ViTConfig

GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""Where config.json tells none."""

ROWS = (
    *towers.clip_rows("vision_tower.vision_model"),
    *towers.MLP_ROWS,
    Row("projector.newline", "image_newline", "d -> d"),
)


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "llava_next")
    vit = llava.read_vit(s, grid=vlm.grid(s, GRID))
    vision = vlm.read_clip(s, vlm.image_token(s, 32000), vit, vlm.CLIP_LARGE)
    return vlm.read_text(s, vision, default="llama", tie=vlm.tied(s, either=False, default=False))


def write_config(config: ModelConfig) -> Json:
    return {
        **llava.write_llava(config, "llava_next", "LlavaNextForConditionalGeneration"),
        "image_grid_pinpoints": [list(size) for size in config.vision_as(ViTConfig).grid],
        "use_image_newline_parameter": True,
    }


FAMILY = Family(
    name="llava_next",
    model_types=("llava_next",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.LLAVA_NEXT,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants={**towers.LLAVA_VARIANTS, "original": llava_original.RENAMES},
)
