"""Mistral 3 with images: Pixtral's tower, a matrix that merges squares of patches."""

import dataclasses
from functools import partial

from jaxlab import processing
from jaxlab.checkpoints.families import language, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import ModelConfig, ViTConfig

_LAYER: Rows = (
    Row("attention_norm.scale", "attention_norm.weight", "d -> d"),
    Row("mlp_norm.scale", "ffn_norm.weight", "d -> d"),
    *towers.attention("attention", "attention", "o_proj"),
    *towers.gated_mlp("mlp", "feed_forward"),
)
_PROJECTOR = "multi_modal_projector"
ROWS: Rows = (
    Row("vision.patch.table", "vision_tower.patch_conv.weight", "d c y x -> c y x d"),
    Row("vision.pre_norm.scale", "vision_tower.ln_pre.weight", "d -> d"),
    *in_layers("vision.layers", "vision_tower.transformer.layers", _LAYER),
    Row("projector.norm.scale", f"{_PROJECTOR}.norm.weight", "d -> d"),
    Row("projector.merger", f"{_PROJECTOR}.patch_merger.merging_layer.weight", "v (c y x) -> c y x v"),
    *towers.MLP_ROWS,
)
_PIXTRAL: Json = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1540,
    "patch_size": 14,
    "hidden_act": "gelu",
    "rope_theta": 10000.0,
}


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "mistral3")
    v = vlm.inner(s, "vision_config", _PIXTRAL)
    if v.word("model_type", "pixtral") != "pixtral":
        raise v.refuse("model_type", "supported: pixtral")
    v.ignore("attention_dropout")
    rope = v.value("rope_parameters", {})
    known = [{"rope_type": kind, "rope_theta": 10000}.items() for kind in ("axial", "default")]
    if not isinstance(rope, dict) or not any(rope.items() <= items for items in known):
        raise v.refuse("rope_parameters", "rotary positions of images are axial, with a base of 10000")
    if v.value("rope_theta", 10000) != 10000:
        raise v.refuse("rope_theta", "rotary positions of images have a base of 10000")
    if "head_dim" in v and v.whole("head_dim") * v.whole("num_attention_heads") != v.whole("hidden_size"):
        raise v.refuse("head_dim", "it must be hidden_size / num_attention_heads")
    vit = dict(
        patch_bias=False,
        position="rotary",
        pre_norm=True,
        norm="rms",
        norm_eps=1e-5,
        mlp="gated",
        activation=language.activation(v, "hidden_act", "gelu"),
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        final_norm="none",
        feature_layers=vlm.feature_layers(s, -1),
        shuffle=s.whole("spatial_merge_size", 2),
        connector="merger",
        connector_norm="rms",
        connector_bias=s.flag("multimodal_projector_bias"),
        connector_activation=language.activation(s, "projector_hidden_act", "gelu"),
    )
    tower = vlm.read_tower(v, vlm.image_token(s, 10), vit)
    model = vlm.read_text(s, tower, default="mistral", tie=vlm.tied(s, either=False, default=True))
    return vlm.build(
        partial(dataclasses.replace, model),
        vision=dataclasses.replace(tower, connector_norm_eps=model.norm_eps),
    )


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(ViTConfig)
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": v.image_token,
        "spatial_merge_size": v.shuffle,
        "vision_feature_layer": vlm.write_feature_layers(v.feature_layers),
        "multimodal_projector_bias": v.connector_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "projector_hidden_act": language.activation_name(v.connector_activation),
        "text_config": vlm.write_text(config),
        "vision_config": {
            **vlm.write_tower(v),
            "model_type": "pixtral",
            "head_dim": v.width // v.num_heads,
            "hidden_act": language.activation_name(v.activation),
            "rope_theta": 10000.0,
        },
    }


FAMILY = Family(
    name="mistral3",
    model_types=("mistral3",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.PIXTRAL,
    text_renames=towers.WITHIN_LLAVA,
    variants={"memory": towers.LLAVA_VARIANTS["memory"]},
)
