"""Qwen2.5-VL: as Qwen2-VL, with windows, RMSNorm and a gated MLP in the tower."""

from jaxlab import processing
from jaxlab.checkpoints.families import qwen_vl, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.language import IGNORED
from jaxlab.checkpoints.families.qwen2_vl import MERGER, SECTIONS, TEXT
from jaxlab.checkpoints.families.towers import linear
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import ModelConfig, QwenVisionConfig

_VISION: Json = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}

_LAYER: Rows = (
    Row("attention_norm.scale", "norm1.weight", "d -> d"),
    Row("mlp_norm.scale", "norm2.weight", "d -> d"),
    *linear("mlp.gate", "mlp.gate_proj", "f d -> d f"),
    *linear("mlp.up", "mlp.up_proj", "f d -> d f"),
    *linear("mlp.down", "mlp.down_proj", "d f -> f d"),
)


def read_config(config: Json) -> ModelConfig:
    s = qwen_vl.settings(config, "qwen2_5_vl")
    v = qwen_vl.tower_settings(s, _VISION)
    qwen = dict(
        norm="rms",
        mlp="gated",
        window=v.whole("window_size"),
        full_layers=qwen_vl.numbers(v, "fullatt_block_indexes"),
    )
    vision = qwen_vl.read_tower(
        s, v, width="hidden_size", out="out_hidden_size", mlp_width=v.whole("intermediate_size"), qwen=qwen
    )
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
    vision = {
        **qwen_vl.write_tower(config),
        "model_type": "qwen2_5_vl",
        "hidden_size": v.width,
        "out_hidden_size": config.width,
        "intermediate_size": v.mlp_width,
        "window_size": v.window,
        "fullatt_block_indexes": list(v.full_layers),
    }
    top = qwen_vl.write_config(config, "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", flat=True)
    return {**top, "vision_config": vision}


FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    rows=qwen_vl.rows("visual", _LAYER, MERGER),
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.QWEN2_5_VL,
    ignored=IGNORED,
    variants={"memory": qwen_vl.MEMORY, "base": qwen_vl.BASE},
)
