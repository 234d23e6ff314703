"""LLaVA-1.5: CLIP or SigLIP, a two-layer MLP, and any language model."""

from jaxlab.checkpoints.families import llava_original, towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ViTConfig

CLIP_LARGE: Json = {
    "model_type": "clip_vision_model", "intermediate_size": 4096, "hidden_size": 1024, "patch_size": 14,
    "image_size": 336, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip


def read_vit(config: Json, *, layer: int = -2, strategy: str = "default", **rest: object) -> ViTConfig:
    """What LLaVA and its successors say of features and projector."""
    return ViTConfig(
        final_norm="unused",
        feature_layers=towers.feature_layers(config, layer),
        drop_first=towers.drop_first(config, strategy),
        connector="mlp",
        connector_bias=config.get("multimodal_projector_bias", True),
        connector_activation=towers.activation(config, "projector_hidden_act", "gelu"),
        **rest,  # type: ignore[arg-type]
    )


def write_llava(config: ModelConfig, model_type: str, model_class: str) -> Json:
    """The keys that LLaVA shares with its successors."""
    v, t = config.vision, config.vision.vit
    return {
        "architectures": [model_class], "model_type": model_type, "image_token_index": v.image_token,
        "vision_feature_layer": towers.write_feature_layers(t.feature_layers),
        "vision_feature_select_strategy": "default" if t.drop_first else "full",
        "projector_hidden_act": towers.activation_name(t.connector_activation),
        "multimodal_projector_bias": t.connector_bias, "tie_word_embeddings": config.tie_embeddings,
        "text_config": towers.write_text(config), "vision_config": towers.write_clip(v),
    }  # fmt: skip


def read_config(config: Json) -> ModelConfig:
    if "mm_vision_tower" in config:
        return llava_original.read_config(config)
    vision = towers.read_clip(config, towers.image_token(config, 32000), read_vit(config), CLIP_LARGE)
    tie = towers.tied(config, either=True, default=False)
    return towers.read_text(config, vision, "llava", default="llama", tie=tie)


def write_config(config: ModelConfig) -> Json:
    features = config.vision.vit.features(config.vision.image_size // config.vision.patch_size)
    return {
        **write_llava(config, "llava", "LlavaForConditionalGeneration"), "image_seq_length": features
    }  # fmt: skip


FAMILY = Family(
    name="llava",
    model_types=("llava", "llava_llama", "llava_mistral", "llava_qwen"),
    rows=(*towers.clip_rows("vision_tower.vision_model"), *towers.MLP_ROWS),
    read_config=read_config,
    write_config=write_config,
    ignored=towers.CLIP_IGNORED,
    text_renames=towers.WITHIN_LLAVA,
    variants={**towers.LLAVA_VARIANTS, "original": llava_original.RENAMES},
)
