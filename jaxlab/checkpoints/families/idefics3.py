"""Idefics3: SigLIP that places patches by fractions of the image, pixel shuffle, one matrix, Llama 3."""

from typing import Any

from jaxlab import processing
from jaxlab.checkpoints.families import language, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json, Renames
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row
from jaxlab.models import ModelConfig, ViTConfig

WITHIN_IDEFICS: Renames = ((r"^model\.", "model.text_model."),)
VISION: Json = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def read_idefics_vit(v: Settings, **more: Any) -> Json:
    """The tower of Idefics 2 and 3."""
    v.ignore("max_image_size", "size", "use_base_siglip")
    return dict(
        position="fractional",
        norm_eps=v.number("layer_norm_eps"),
        activation=language.activation(v, "hidden_act", "gelu"),
        final_norm="used",
        connector_bias=False,
        **more,
    )


def write_idefics_vision(config: ModelConfig, model_type: str) -> Json:
    v = config.vision_as(ViTConfig)
    return {
        **vlm.write_tower(v),
        "model_type": model_type,
        "layer_norm_eps": v.norm_eps,
        "hidden_act": language.activation_name(v.activation),
    }


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "idefics3")
    v = vlm.inner(s, "vision_config", VISION)
    vit = read_idefics_vit(v, shuffle=s.whole("scale_factor", 2), connector="linear")
    tower = vlm.read_tower(v, vlm.image_token(s, 128257), vit)
    return vlm.read_text(s, tower, default="llama", tie=vlm.tied(s, either=False, default=False))


def write_config(config: ModelConfig) -> Json:
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": config.image_token,
        "scale_factor": config.vision_as(ViTConfig).shuffle,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": vlm.write_text(config),
        "vision_config": write_idefics_vision(config, "idefics3_vision"),
    }


FAMILY = Family(
    name="idefics3",
    model_types=("idefics3",),
    rows=(
        *towers.clip_rows("model.vision_model"),
        Row("projector.output", "model.connector.modality_projection.proj.weight", "d v -> v d"),
    ),
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.IDEFICS3,
    ignored=towers.CLIP_IGNORED,
    text_renames=WITHIN_IDEFICS,
)
