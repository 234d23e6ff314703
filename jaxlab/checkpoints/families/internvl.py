"""InternVL in Hugging Face's layout: InternViT, pixel shuffle, an MLP after a norm, any language model."""

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.names import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ViTConfig

_LAYER: Rows = (
    *towers.norm("attention_norm", "layernorm_before"),
    *towers.norm("mlp_norm", "layernorm_after"),
    *towers.attention("attention", "attention", "projection_layer"),
    Row("attention.query_norm.scale", "attention.q_norm.weight", "k -> k"),
    Row("attention.key_norm.scale", "attention.k_norm.weight", "k -> k"),
    Row("attention_gain", "lambda_1", "d -> d"),
    Row("mlp_gain", "lambda_2", "d -> d"),
    *towers.plain_mlp("mlp", "mlp"),
)
_EMBEDDINGS = "vision_tower.embeddings"
ROWS: Rows = (
    Row("vision.class_token", f"{_EMBEDDINGS}.cls_token", "() () d -> d"),
    Row("vision.mask_token", f"{_EMBEDDINGS}.mask_token", "() () d -> d"),
    Row("vision.patch.table", f"{_EMBEDDINGS}.patch_embeddings.projection.weight", "d c y x -> c y x d"),
    Row("vision.patch.bias", f"{_EMBEDDINGS}.patch_embeddings.projection.bias", "d -> d"),
    Row("vision.position.table", f"{_EMBEDDINGS}.position_embeddings", "() p d -> p d"),
    *in_layers("vision.layers", "vision_tower.encoder.layer", _LAYER),
    *towers.norm("vision.final_norm", "vision_tower.layernorm"),
    *towers.norm("projector.norm", "multi_modal_projector.layer_norm"),
    *towers.MLP_ROWS,
)

_DEFAULTS: Json = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "num_channels": 3, "image_size": 448, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "attention_bias": False, "use_qk_norm": False, "norm_type": "layer_norm", "use_mask_token": False,
    "use_absolute_position_embeddings": True, "use_mean_pooling": True,
}  # fmt: skip
_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}


def read_config(config: Json) -> ModelConfig:
    vision = {**_DEFAULTS, **(config.get("vision_config") or {})}
    layer = config.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer {layer} is not supported; InternVL reads one layer")
    if vision["norm_type"] not in _NORMS:
        raise UserError(f"norm_type {vision['norm_type']!r} is not supported; use {' or '.join(_NORMS)}")
    if vision["use_qk_norm"] and vision["layer_norm_eps"] != 1e-6:
        raise UserError("use_qk_norm with a layer_norm_eps other than 1e-6 is not supported")
    ratio = config.get("downsample_ratio", 0.5)
    final_norm = "none" if vision["use_mean_pooling"] else "used" if layer == -1 else "unused"
    vit = ViTConfig(
        class_token=True,
        mask_token=vision["use_mask_token"],
        position="learned" if vision["use_absolute_position_embeddings"] else "none",
        norm="layer" if vision["norm_type"] == "layer_norm" else "rms",
        norm_eps=vision["layer_norm_eps"],
        activation=towers.activation(vision, "hidden_act", "gelu"),
        attention_bias=vision["attention_bias"],
        qk_norm=vision["use_qk_norm"],
        layer_scale=True,
        final_norm=final_norm,  # type: ignore[arg-type]
        feature_layers=(layer,),
        drop_first=towers.drop_first(config, "default"),
        shuffle=int(1 / ratio),
        connector_norm="layer",
        connector_activation=towers.activation(config, "projector_hidden_act", "gelu"),
    )
    tower = towers.read_tower(vision, towers.image_token(config, 151667), vit)
    tie = towers.tied(config, either=False, default=True)
    return towers.read_text(config, tower, "internvl", default="qwen2", tie=tie)


def write_config(config: ModelConfig) -> Json:
    v, t = config.vision, config.vision.vit
    vision = {
        **towers.write_tower(v), "model_type": "internvl_vision", "image_size": [v.image_size] * 2,
        "patch_size": [v.patch_size] * 2, "hidden_act": towers.activation_name(t.activation),
        "layer_norm_eps": t.norm_eps, "attention_bias": t.attention_bias, "use_qk_norm": t.qk_norm,
        "norm_type": next(theirs for theirs, ours in _NORMS.items() if ours == t.norm),
        "use_mask_token": t.mask_token, "use_absolute_position_embeddings": t.position == "learned",
        "use_mean_pooling": t.final_norm == "none",
    }  # fmt: skip
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl",
        "image_token_id": v.image_token, "downsample_ratio": 1 / t.shuffle,
        "image_seq_length": t.features(v.image_size // v.patch_size) // t.shuffle**2,
        "projector_hidden_act": towers.activation_name(t.connector_activation),
        "vision_feature_layer": t.feature_layers[0],
        "vision_feature_select_strategy": "default" if t.drop_first else "full",
        "tie_word_embeddings": config.tie_embeddings, "text_config": towers.write_text(config),
        "vision_config": vision,
    }  # fmt: skip


FAMILY = Family(
    name="internvl",
    model_types=("internvl",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    text_renames=towers.WITHIN_LLAVA,
    variants={"memory": towers.LLAVA_VARIANTS["memory"]},
)
