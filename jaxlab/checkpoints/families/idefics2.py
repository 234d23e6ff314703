"""Idefics2: the tower of Idefics3, a gated MLP and a resampler, Mistral. Its images are not run."""

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.idefics3 import (
    VISION,
    WITHIN_IDEFICS,
    read_idefics_vit,
    write_idefics_vision,
)
from jaxlab.checkpoints.names import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ResamplerConfig

_CONNECTOR = "model.connector"
_LAYER: Rows = (
    Row("attention_norm.scale", "input_latents_norm.weight", "d -> d"),
    Row("context_norm.scale", "input_context_norm.weight", "d -> d"),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", "d -> d"),
    *towers.attention("attention", "self_attn", "o_proj"),
    *towers.gated_mlp("mlp", "mlp"),
)
ROWS: Rows = (
    *towers.clip_rows("model.vision_model"),
    *towers.gated_mlp("projector", f"{_CONNECTOR}.modality_projection"),
    Row("projector.resampler.latents", f"{_CONNECTOR}.perceiver_resampler.latents", "n d -> n d"),
    *in_layers("projector.resampler.layers", f"{_CONNECTOR}.perceiver_resampler.layers", _LAYER),
    Row("projector.resampler.norm.scale", f"{_CONNECTOR}.perceiver_resampler.norm.weight", "d -> d"),
)


def read_config(config: Json) -> ModelConfig:
    vision = {**VISION, "hidden_size": 768, "num_attention_heads": 12, **(config.get("vision_config") or {})}
    perceiver = config.get("perceiver_config") or {}
    text = {"intermediate_size": 14336, "hidden_size": 4096, **(config.get("text_config") or {})}
    if perceiver.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {perceiver['hidden_act']!r} of the perceiver is not supported; use silu")
    resampler = ResamplerConfig(
        num_queries=perceiver.get("resampler_n_latents", 64),
        num_layers=perceiver.get("resampler_depth", 3),
        num_heads=perceiver.get("resampler_n_heads", 16),
        num_kv_heads=perceiver.get("num_key_value_heads", 4),
        head_dim=perceiver.get("resampler_head_dim", 96),
    )
    vit = read_idefics_vit(
        vision, connector="resampler", connector_width=text["intermediate_size"], resampler=resampler
    )
    tower = towers.read_tower(vision, towers.image_token(config, 32001), vit)
    tie = towers.tied(config, either=False, default=False)
    return towers.read_text(config, tower, "idefics2", default="mistral", tie=tie)


def write_config(config: ModelConfig) -> Json:
    r = config.vision.vit.resampler
    return {
        "architectures": ["Idefics2ForConditionalGeneration"], "model_type": "idefics2",
        "image_token_id": config.vision.image_token, "tie_word_embeddings": config.tie_embeddings,
        "text_config": towers.write_text(config),
        "vision_config": write_idefics_vision(config, "idefics2_vision"),
        "perceiver_config": {
            "model_type": "idefics2_perceiver", "resampler_n_latents": r.num_queries,
            "resampler_depth": r.num_layers, "resampler_n_heads": r.num_heads,
            "num_key_value_heads": r.num_kv_heads, "resampler_head_dim": r.head_dim,
            "hidden_size": config.width, "rms_norm_eps": config.norm_eps,
        },
    }  # fmt: skip


FAMILY = Family(
    name="idefics2",
    model_types=("idefics2",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=towers.CLIP_IGNORED,
    text_renames=WITHIN_IDEFICS,
    forward=False,
)
