"""PaliGemma: SigLIP, one matrix, Gemma 1 or 2; images and prompt see each other both ways."""

from jaxlab import processing
from jaxlab.checkpoints.families import towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.models import ModelConfig, ViTConfig

SIGLIP: Json = {
    "model_type": "siglip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1152,
    "patch_size": 14,
    "image_size": 224,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "vision_use_head": False,
}


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "paligemma")
    vit = dict(final_norm="used", connector="linear", together="prefix")
    known = ("siglip_vision_model",)
    vision = vlm.read_clip(s, vlm.image_token(s, 256000), vit, SIGLIP, known)
    projected = s.whole("projection_dim", vlm.inner(s, "vision_config", {}).whole("projection_dim", 2048))
    text = vlm.inner(s, "text_config", {})
    if text.flag("use_bidirectional_attention", True) is not True:
        raise text.refuse("use_bidirectional_attention", "PaliGemma's prompts see themselves whole")
    model = vlm.read_text(
        s,
        vision,
        default="gemma",
        tie=vlm.tied(s, either=False, default=True),
        known=("gemma", "gemma2"),
        without=("use_bidirectional_attention", "num_image_tokens"),
    )
    if projected != model.width:
        raise s.refuse("projection_dim", f"the language model's width is {model.width}")
    return model


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(ViTConfig)
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": v.image_token,
        "projection_dim": config.width,
        "hidden_size": config.width,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": {**vlm.write_text(config), "num_image_tokens": v.num_patches},
        "vision_config": {**vlm.write_clip(v), "projection_dim": config.width},
    }


FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    rows=(
        *towers.clip_rows("vision_tower.vision_model"),
        *towers.linear("projector.output", "multi_modal_projector.linear", "d v -> v d"),
    ),
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.PALIGEMMA,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants=towers.LLAVA_VARIANTS,
)
