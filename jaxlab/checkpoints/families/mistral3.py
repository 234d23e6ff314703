"""Mistral 3 with images: Pixtral's tower, a matrix that merges squares of patches. Its images are not run."""

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.names import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ViTConfig

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
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_channels": 3, "image_size": 1540, "patch_size": 14, "hidden_act": "gelu", "rope_theta": 10000.0,
}  # fmt: skip


def read_config(config: Json) -> ModelConfig:
    vision = {**_PIXTRAL, **(config.get("vision_config") or {})}
    if vision.get("model_type", "pixtral") != "pixtral":
        raise UserError(f"a vision tower of type {vision['model_type']!r} is not supported here; use pixtral")
    if vision.get("head_dim") not in (None, vision["hidden_size"] // vision["num_attention_heads"]):
        raise UserError("head_dim of the vision tower differs from its width / heads, which is not supported")
    vit = ViTConfig(
        patch_bias=False, position="rotary", pre_norm=True, norm="rms", norm_eps=1e-5, mlp="gated",
        activation=towers.activation(vision, "hidden_act", ""), attention_bias=False, output_bias=False,
        mlp_bias=False, final_norm="none", feature_layers=towers.feature_layers(config, -1),
        shuffle=config.get("spatial_merge_size", 2), connector="merger", connector_norm="rms",
        connector_bias=config.get("multimodal_projector_bias", False),
        connector_activation=towers.activation(config, "projector_hidden_act", "gelu"),
    )  # fmt: skip
    tower = towers.read_tower(vision, towers.image_token(config, 10), vit)
    tie = towers.tied(config, either=False, default=True)
    return towers.read_text(config, tower, "mistral3", default="mistral", tie=tie)


def write_config(config: ModelConfig) -> Json:
    v, t = config.vision, config.vision.vit
    return {
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
        "image_token_index": v.image_token, "spatial_merge_size": t.shuffle,
        "vision_feature_layer": towers.write_feature_layers(t.feature_layers),
        "multimodal_projector_bias": t.connector_bias, "tie_word_embeddings": config.tie_embeddings,
        "projector_hidden_act": towers.activation_name(t.connector_activation),
        "text_config": towers.write_text(config),
        "vision_config": {
            **towers.write_tower(v), "model_type": "pixtral", "head_dim": v.width // v.num_heads,
            "hidden_act": towers.activation_name(t.activation), "rope_theta": 10000.0,
        },
    }  # fmt: skip


FAMILY = Family(
    name="mistral3",
    model_types=("mistral3",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    text_renames=towers.WITHIN_LLAVA,
    variants={"memory": towers.LLAVA_VARIANTS["memory"]},
    forward=False,
)
