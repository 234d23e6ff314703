"""Idefics3, SmolVLM: SigLIP with patches placed by fractions of the image, pixel shuffle, a matrix, Llama."""

from collections.abc import Callable
from functools import partial
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


def _read(config: Json, family: str) -> ModelConfig:
    s = vlm.settings(config, family)
    v = vlm.inner(s, "vision_config", VISION)
    vit = read_idefics_vit(v, shuffle=s.whole("scale_factor", 2), connector="linear")
    tower = vlm.read_tower(v, vlm.image_token(s, 128257), vit)
    return vlm.read_text(s, tower, default="llama", tie=vlm.tied(s, either=False, default=False))


def _write(config: ModelConfig, family: str, architecture: str) -> Json:
    return {
        "architectures": [architecture],
        "model_type": family,
        "image_token_id": config.image_token,
        "scale_factor": config.vision_as(ViTConfig).shuffle,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": vlm.write_text(config),
        "vision_config": write_idefics_vision(config, f"{family}_vision"),
    }


def _family(name: str, architecture: str, processor: Callable[[], "processing.ProcessorKind"]) -> Family:
    return Family(
        name=name,
        model_types=(name,),
        rows=(
            *towers.clip_rows("model.vision_model"),
            Row("projector.output", "model.connector.modality_projection.proj.weight", "d v -> v d"),
        ),
        read_config=partial(_read, family=name),
        write_config=partial(_write, family=name, architecture=architecture),
        processor=processor,
        ignored=towers.CLIP_IGNORED,
        text_renames=WITHIN_IDEFICS,
    )


FAMILIES = (
    _family("idefics3", "Idefics3ForConditionalGeneration", lambda: processing.IDEFICS3),
    _family("smolvlm", "SmolVLMForConditionalGeneration", lambda: processing.SMOLVLM),
)
