"""Qwen2-VL: a tower for images of any size, Qwen2 with positions of three coordinates."""

from jaxlab import processing
from jaxlab.checkpoints.families import qwen_vl, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.language import IGNORED
from jaxlab.checkpoints.tensor_table import Rows
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, QwenVisionConfig

MERGER = ("ln_q", "mlp.0", "mlp.2")
SECTIONS = (16, 24, 24)
TEXT: Json = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
}
_VISION: Json = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

_LAYER: Rows = (
    *towers.norm("attention_norm", "norm1"),
    *towers.norm("mlp_norm", "norm2"),
    *towers.plain_mlp("mlp", "mlp"),
)


def read_config(config: Json) -> ModelConfig:
    s = qwen_vl.settings(config, "qwen2_vl")
    v = qwen_vl.tower_settings(s, _VISION)
    mlp_width = int(v.whole("embed_dim") * v.number("mlp_ratio"))
    vision = qwen_vl.read_tower(s, v, width="embed_dim", out="hidden_size", mlp_width=mlp_width, qwen={})
    return qwen_vl.read_text(
        s,
        vision,
        like="qwen2",
        defaults=TEXT,
        theta=1e6,
        sections=SECTIONS,
        interleaved=False,
        tie=vlm.tied(s, either=True, default=False),
    )


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(QwenVisionConfig)
    if v.mlp_width % v.width:
        raise UserError(f"qwen2_vl: vision.mlp_width {v.mlp_width} must be a multiple of width {v.width}")
    vision = {
        **qwen_vl.write_tower(config),
        "model_type": "qwen2_vl",
        "embed_dim": v.width,
        "hidden_size": config.width,
        "mlp_ratio": v.mlp_width // v.width,
    }
    top = qwen_vl.write_config(config, "qwen2_vl", "Qwen2VLForConditionalGeneration", flat=True)
    return {**top, "vision_config": vision}


FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    rows=qwen_vl.rows("visual", _LAYER, MERGER),
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.QWEN2_VL,
    ignored=IGNORED,
    variants={"memory": qwen_vl.MEMORY, "base": qwen_vl.BASE},
)
