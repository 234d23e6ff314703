"""PaliGemma: SigLIP, one matrix, Gemma 1 or 2; images and prompt see each other both ways."""

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ViTConfig

SIGLIP: Json = {
    "model_type": "siglip_vision_model", "intermediate_size": 4096, "hidden_size": 1152, "patch_size": 14,
    "image_size": 224, "num_hidden_layers": 27, "num_attention_heads": 16, "vision_use_head": False,
}  # fmt: skip


def read_config(config: Json) -> ModelConfig:
    vit = ViTConfig(final_norm="used", connector="linear", together="prefix")
    vision = towers.read_clip(config, towers.image_token(config, 256000), vit, SIGLIP)
    if vision.vit.class_token:
        raise UserError("PaliGemma around a tower of CLIP is not supported")
    tie = towers.tied(config, either=False, default=True)
    model = towers.read_text(config, vision, "paligemma", default="gemma", tie=tie, known=("gemma", "gemma2"))
    inner = (config.get("vision_config") or {}).get("projection_dim", model.width)
    if config.get("projection_dim", inner) != model.width:
        raise UserError(f"projection_dim differs from the language model's width {model.width}")
    return model


def write_config(config: ModelConfig) -> Json:
    v = config.vision
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
        "image_token_index": v.image_token, "projection_dim": config.width, "hidden_size": config.width,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": {**towers.write_text(config), "num_image_tokens": v.num_patches},
        "vision_config": {**towers.write_clip(v), "projection_dim": config.width},
    }  # fmt: skip


FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    rows=(
        *towers.clip_rows("vision_tower.vision_model"),
        *towers.linear("projector.output", "multi_modal_projector.linear", "d v -> v d"),
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants=towers.LLAVA_VARIANTS,
)
