"""Idefics3: SigLIP that places patches by fractions of the image, pixel shuffle, one matrix, Llama 3."""

from typing import Any

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Family, Json, Renames
from jaxlab.checkpoints.names import Row
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ViTConfig

WITHIN_IDEFICS: Renames = ((r"^model\.", "model.text_model."),)
VISION: Json = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}  # fmt: skip


def read_idefics_vit(vision: Json, **rest: Any) -> ViTConfig:
    """The tower of Idefics 2 and 3."""
    return ViTConfig(
        position="fractional",
        norm_eps=vision["layer_norm_eps"],
        activation=towers.activation(vision, "hidden_act", ""),
        final_norm="used",
        connector_bias=False,
        **rest,
    )


def write_idefics_vision(config: ModelConfig, model_type: str) -> Json:
    v = config.vision
    return {
        **towers.write_tower(v), "model_type": model_type, "layer_norm_eps": v.vit.norm_eps,
        "hidden_act": towers.activation_name(v.vit.activation),
    }  # fmt: skip


def read_config(config: Json) -> ModelConfig:
    vision = {**VISION, **(config.get("vision_config") or {})}
    vit = read_idefics_vit(vision, shuffle=config.get("scale_factor", 2), connector="linear")
    tower = towers.read_tower(vision, towers.image_token(config, 128257), vit)
    tie = towers.tied(config, either=False, default=False)
    return towers.read_text(config, tower, "idefics3", default="llama", tie=tie)


def write_config(config: ModelConfig) -> Json:
    return {
        "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3",
        "image_token_id": config.vision.image_token, "scale_factor": config.vision.vit.shuffle,
        "tie_word_embeddings": config.tie_embeddings, "text_config": towers.write_text(config),
        "vision_config": write_idefics_vision(config, "idefics3_vision"),
    }  # fmt: skip


FAMILY = Family(
    name="idefics3",
    model_types=("idefics3",),
    rows=(
        *towers.clip_rows("model.vision_model"),
        Row("projector.output", "model.connector.modality_projection.proj.weight", "d v -> v d"),
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=towers.CLIP_IGNORED,
    text_renames=WITHIN_IDEFICS,
)
