"""InternVL in Hugging Face's layout: InternViT, pixel shuffle, an MLP after a norm, any language model."""

from jaxlab import processing
from jaxlab.checkpoints.families import language, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import ModelConfig, ViTConfig

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
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_bias": False,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
NORMS = {"layer_norm": "layer", "rms_norm": "rms"}


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "internvl")
    v = vlm.inner(s, "vision_config", _DEFAULTS)
    v.ignore("layer_scale_init_value", "hidden_dropout_prob", "projection_dropout", "attention_dropout")
    layers = vlm.feature_layers(s, -1)
    if len(layers) > 1:
        raise s.refuse("vision_feature_layer", "InternVL reads one layer")
    norm = v.word("norm_type", "layer_norm")
    if norm not in NORMS:
        raise v.refuse("norm_type", f"supported: {', '.join(NORMS)}")
    if v.flag("use_qk_norm") and v.number("layer_norm_eps") != 1e-6:
        raise v.refuse("layer_norm_eps", "with use_qk_norm it must be 1e-6")
    ratio = s.number("downsample_ratio", 0.5)
    if int(1 / ratio) != 1 / ratio:
        raise s.wrong("downsample_ratio", "one over a whole number")
    final_norm = "none" if v.flag("use_mean_pooling") else "used" if layers == (-1,) else "unused"
    vit = dict(
        class_token=True,
        mask_token=v.flag("use_mask_token"),
        position="learned" if v.flag("use_absolute_position_embeddings") else "none",
        norm=NORMS[norm],
        norm_eps=v.number("layer_norm_eps"),
        activation=language.activation(v, "hidden_act", "gelu"),
        attention_bias=v.flag("attention_bias"),
        qk_norm=v.flag("use_qk_norm"),
        layer_scale=True,
        final_norm=final_norm,
        feature_layers=layers,
        drop_first=vlm.drop_first(s, "default"),
        shuffle=int(1 / ratio),
        connector_norm="layer",
        connector_activation=language.activation(s, "projector_hidden_act", "gelu"),
    )
    tower = vlm.read_tower(v, vlm.image_token(s, 151667), vit)
    return vlm.read_text(s, tower, default="qwen2", tie=vlm.tied(s, either=False, default=True))


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(ViTConfig)
    vision = {
        **vlm.write_tower(v),
        "model_type": "internvl_vision",
        "image_size": [v.image_size] * 2,
        "patch_size": [v.patch_size] * 2,
        "hidden_act": language.activation_name(v.activation),
        "layer_norm_eps": v.norm_eps,
        "attention_bias": v.attention_bias,
        "use_qk_norm": v.qk_norm,
        "norm_type": next(theirs for theirs, ours in NORMS.items() if ours == v.norm),
        "use_mask_token": v.mask_token,
        "use_absolute_position_embeddings": v.position == "learned",
        "use_mean_pooling": v.final_norm == "none",
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": v.image_token,
        "downsample_ratio": 1 / v.shuffle,
        "image_seq_length": v.features(v.image_size // v.patch_size) // v.shuffle**2,
        "projector_hidden_act": language.activation_name(v.connector_activation),
        "vision_feature_layer": v.feature_layers[0],
        "vision_feature_select_strategy": "default" if v.drop_first else "full",
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": vlm.write_text(config),
        "vision_config": vision,
    }


FAMILY = Family(
    name="internvl",
    model_types=("internvl",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.INTERNVL,
    text_renames=towers.WITHIN_LLAVA,
    variants={"memory": towers.LLAVA_VARIANTS["memory"]},
)
