"""Idefics2: the tower of Idefics3, a gated MLP and a resampler, Mistral."""

import dataclasses
from functools import partial

from jaxlab import processing
from jaxlab.checkpoints.families import towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.idefics3 import (
    VISION,
    WITHIN_IDEFICS,
    read_idefics_vit,
    write_idefics_vision,
)
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, ResamplerConfig, ViTConfig

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


_PERCEIVER: Json = {
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "num_key_value_heads": 4,
}


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "idefics2")
    v = vlm.inner(s, "vision_config", {**VISION, "hidden_size": 768, "num_attention_heads": 12})
    p = vlm.inner(s, "perceiver_config", _PERCEIVER)
    p.ignore("qk_layer_norms_perceiver")
    width_of_norms, norm_eps = p.whole("hidden_size", 4096), p.number("rms_norm_eps", 1e-6)
    if p.word("hidden_act", "silu") != "silu":
        raise p.refuse("hidden_act", "supported: silu")
    resampler = vlm.build(
        ResamplerConfig,
        num_queries=p.whole("resampler_n_latents"),
        num_layers=p.whole("resampler_depth", most=1 << 12),
        num_heads=p.whole("resampler_n_heads"),
        num_kv_heads=p.whole("num_key_value_heads"),
        head_dim=p.whole("resampler_head_dim"),
    )
    p.done()
    width = vlm.inner(s, "text_config", {}).whole("intermediate_size", 14336)
    vit = read_idefics_vit(v, connector="resampler", connector_width=width, resampler=resampler)
    tower = vlm.read_tower(v, vlm.image_token(s, 32001), vit)
    model = vlm.read_text(s, tower, default="mistral", tie=vlm.tied(s, either=False, default=False))
    # A perceiver_config of another width was not written for this model, and its epsilon does not count.
    eps = norm_eps if width_of_norms == model.width else model.norm_eps
    tower = dataclasses.replace(tower, resampler=dataclasses.replace(resampler, norm_eps=eps))
    return vlm.build(partial(dataclasses.replace, model), vision=tower)


def write_config(config: ModelConfig) -> Json:
    r = config.vision_as(ViTConfig).resampler
    if r is None:
        raise UserError("idefics2: its connector is a resampler; set vision.connector")
    return {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "model_type": "idefics2",
        "image_token_id": config.image_token,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": vlm.write_text(config),
        "vision_config": write_idefics_vision(config, "idefics2_vision"),
        "perceiver_config": {
            "model_type": "idefics2_perceiver",
            "resampler_n_latents": r.num_queries,
            "resampler_depth": r.num_layers,
            "resampler_n_heads": r.num_heads,
            "num_key_value_heads": r.num_kv_heads,
            "resampler_head_dim": r.head_dim,
            "hidden_size": config.width,
            "rms_norm_eps": r.norm_eps,
        },
    }


FAMILY = Family(
    name="idefics2",
    model_types=("idefics2",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.IDEFICS2,
    ignored=towers.CLIP_IGNORED,
    text_renames=WITHIN_IDEFICS,
)
