"""InternVL as its authors wrote it (internvl_chat): the model of `internvl` under other names, read without
their code."""

from jaxlab import processing
from jaxlab.checkpoints.families import language, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.internvl import NORMS
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import ModelConfig, ViTConfig

_PARTS = ("attention.query", "attention.key", "attention.value")
_LAYER: Rows = (
    *towers.norm("attention_norm", "norm1"),
    *towers.norm("mlp_norm", "norm2"),
    Row(_PARTS, "attn.qkv.weight", "(h k) d -> d h k"),
    Row(tuple(f"{part}_bias" for part in _PARTS), "attn.qkv.bias", "(h k) -> h k"),
    Row("attention.output", "attn.proj.weight", "d (h k) -> h k d"),
    Row("attention.output_bias", "attn.proj.bias", "d -> d"),
    Row("attention.query_norm.scale", "attn.q_norm.weight", "k -> k"),
    Row("attention.key_norm.scale", "attn.k_norm.weight", "k -> k"),
    Row("attention_gain", "ls1", "d -> d"),
    Row("mlp_gain", "ls2", "d -> d"),
    *towers.plain_mlp("mlp", "mlp"),
)
_EMBEDDINGS = "vision_model.embeddings"
ROWS: Rows = (
    Row("vision.class_token", f"{_EMBEDDINGS}.class_embedding", "() () d -> d"),
    Row("vision.patch.table", f"{_EMBEDDINGS}.patch_embedding.weight", "d c y x -> c y x d"),
    Row("vision.patch.bias", f"{_EMBEDDINGS}.patch_embedding.bias", "d -> d"),
    Row("vision.position.table", f"{_EMBEDDINGS}.position_embedding", "() p d -> p d"),
    *in_layers("vision.layers", "vision_model.encoder.layers", _LAYER),
    *towers.norm("projector.norm", "mlp1.0"),
    *towers.linear("projector.hidden", "mlp1.1", "d v -> v d"),
    *towers.linear("projector.output", "mlp1.3", "d v -> v d"),
)

_VISION: Json = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
}
"""Of the authors' config class."""


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "internvl_chat")
    # How images are cut is the processor's matter; prompts and training are the authors' programs'.
    s.ignore("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "pad2square")
    s.ignore("template", "system_message", "image_fold", "use_backbone_lora", "use_llm_lora")
    v = vlm.inner(s, "vision_config", _VISION)
    vit = _read_vit(s, v)
    side = vlm.square(v, "image_size")
    if s.whole("force_image_size", side) != side:
        raise s.refuse("force_image_size", f"positions are those of image_size {side}")
    tower = vlm.read_tower(v, vlm.image_token(s, 0), vit)
    llm = Settings(s.value("llm_config", {}), s.family, within="llm_config.")
    tie = llm.flag("tie_word_embeddings")
    s.ignore("tie_word_embeddings")
    return vlm.read_text(s, tower, default="internlm2", tie=tie, key="llm_config")


def _read_vit(s: Settings, v: Settings) -> Json:
    """What the two levels say of the tower, its features and the projector."""
    layer = s.value("select_layer", -1)
    if type(layer) is not int:
        raise s.wrong("select_layer", "a whole number")
    norm = v.word("norm_type", "rms_norm")
    if norm not in NORMS:
        raise v.refuse("norm_type", f"supported: {', '.join(NORMS)}")
    if s.word("ps_version", "v1") != "v2":
        raise s.refuse("ps_version", "it transposes images; supported: v2")
    if v.flag("use_moe"):
        raise v.refuse("use_moe", "experts in the tower are not known")
    v.ignore(*(key for key in v.given if key in _OF_EXPERTS), "drop_path_rate")
    qk_norm = v.flag("qk_normalization")
    if qk_norm and v.number("layer_norm_eps") != 1e-6:
        raise v.refuse("layer_norm_eps", "with qk_normalization it must be 1e-6")
    ratio = s.number("downsample_ratio", 0.5)
    if int(1 / ratio) != 1 / ratio:
        raise s.wrong("downsample_ratio", "one over a whole number")
    return dict(
        class_token=True,
        norm=NORMS[norm],
        norm_eps=v.number("layer_norm_eps"),
        activation=language.activation(v, "hidden_act", "gelu"),
        attention_bias=v.flag("qkv_bias"),
        qk_norm=qk_norm,
        layer_scale=True,
        final_norm="none",
        feature_layers=(layer,),
        drop_first=True,
        shuffle=int(1 / ratio),
        connector_norm="layer",
    )


_OF_EXPERTS = frozenset(
    (
        *("capacity_factor", "eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio", "num_experts"),
        *("moe_intermediate_size", "moe_output_scale", "noisy_gate_policy", "num_routed_experts"),
        *("num_shared_experts", "shared_expert_intermediate_size", "use_residual", "use_rts"),
        "use_weighted_residual",
    )
)
"""Keys that count only where the tower has experts."""


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(ViTConfig)
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "image_token_id": v.image_token,  # ours: their code asks the tokenizer
        "force_image_size": v.image_size,
        "downsample_ratio": 1 / v.shuffle,
        "ps_version": "v2",
        "select_layer": v.feature_layers[0],
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "llm_config": vlm.write_text(config, architectures=True),
        "vision_config": {
            **vlm.write_tower(v),
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_act": language.activation_name(v.activation),
            "layer_norm_eps": v.norm_eps,
            "qkv_bias": v.attention_bias,
            "qk_normalization": v.qk_norm,
            "norm_type": next(theirs for theirs, ours in NORMS.items() if ours == v.norm),
        },
    }


FAMILY = Family(
    name="internvl_chat",
    model_types=("internvl_chat",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.INTERNVL_CHAT,
    text_renames=towers.WITHIN_LLAVA,
    image_word="<IMG_CONTEXT>",
)
