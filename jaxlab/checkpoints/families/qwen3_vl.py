"""Qwen3-VL: learned positions stretched to each image, DeepStack, Qwen3 with alternating coordinates."""

from jaxlab import processing
from jaxlab.checkpoints.families import qwen_vl, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json, Renames
from jaxlab.checkpoints.families.language import IGNORED
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import ModelConfig, QwenVisionConfig

_MERGER = ("norm", "linear_fc1", "linear_fc2")
_TEXT: Json = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
}
_VISION: Json = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}

_LAYER: Rows = (
    *towers.norm("attention_norm", "norm1"),
    *towers.norm("mlp_norm", "norm2"),
    *towers.linear("mlp.up", "mlp.linear_fc1", "f d -> d f"),
    *towers.linear("mlp.down", "mlp.linear_fc2", "d f -> f d"),
)


ROWS: Rows = (
    *qwen_vl.rows("model.visual", _LAYER, _MERGER),
    Row("vision.position.table", "model.visual.pos_embed.weight", "p d -> p d"),
    *qwen_vl.merger_rows("projector.deep", "model.visual.deepstack_merger_list.{i}", _MERGER),
)
WITHIN: Renames = ((r"^model\.", "model.language_model."),)
"""From a language model's names to those inside this family."""
BASE: Renames = ((r"^model\.", ""),)
"""To those of a model saved without its head."""


def read(config: Json, family: str, like: str, defaults: Json) -> ModelConfig:
    """The model; its text model is of the family `like`, with these defaults."""
    s = qwen_vl.settings(config, family)
    v = qwen_vl.tower_settings(s, _VISION)
    qwen = dict(
        patch_bias=True,
        position_side=qwen_vl.side_of(v, "num_position_embeddings"),
        deep_layers=qwen_vl.numbers(v, "deepstack_visual_indexes"),
    )
    vision = qwen_vl.read_tower(
        s, v, width="hidden_size", out="out_hidden_size", mlp_width=v.whole("intermediate_size"), qwen=qwen
    )
    text = Settings(s.value("text_config", {}), s.family, within="text_config.")
    if text.flag("use_sliding_window"):
        raise text.refuse("use_sliding_window", "layers of this family do not slide")
    return qwen_vl.read_text(
        s,
        vision,
        like=like,
        defaults=defaults,
        theta=5e5,
        sections=(24, 20, 20),
        interleaved=True,
        tie=vlm.tied(s, either=False, default=False),
    )


def write(config: ModelConfig, family: str, architecture: str) -> Json:
    v = config.vision_as(QwenVisionConfig)
    vision = {
        **qwen_vl.write_tower(config),
        "model_type": family,
        "hidden_size": v.width,
        "out_hidden_size": config.width,
        "intermediate_size": v.mlp_width,
        "num_position_embeddings": v.position_side**2,
        "deepstack_visual_indexes": list(v.deep_layers),
    }
    return {**qwen_vl.write_config(config, family, architecture, flat=False), "vision_config": vision}


def read_config(config: Json) -> ModelConfig:
    return read(config, "qwen3_vl", "qwen3", _TEXT)


def write_config(config: ModelConfig) -> Json:
    return write(config, "qwen3_vl", "Qwen3VLForConditionalGeneration")


FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.QWEN3_VL,
    ignored=IGNORED,
    text_renames=WITHIN,
    variants={"base": BASE},
)
