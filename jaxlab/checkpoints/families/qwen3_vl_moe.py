"""Qwen3-VL with experts: a layer's experts are one tensor, where those of Qwen3-MoE are one each."""

from jaxlab import processing
from jaxlab.checkpoints.families import qwen3_vl
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.language import IGNORED
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import ModelConfig

_TEXT: Json = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}


def _experts(gate_up: str, down: str, join: int) -> Rows:
    rows = (
        Row(("moe.gate", "moe.up"), "mlp.experts.gate_up_proj", gate_up, join=join),
        Row("moe.down", "mlp.experts.down_proj", down),
    )
    return in_layers("layers", "model.language_model.layers", rows)


def read_config(config: Json) -> ModelConfig:
    text = Settings(config.get("text_config") or {}, "qwen3_vl_moe", within="text_config.")
    if not text.flag("norm_topk_prob", True):
        raise text.refuse("norm_topk_prob", "weights of the chosen experts sum to one in this family")
    count = text.whole("num_experts", text.whole("num_local_experts", 60))
    return qwen3_vl.read(config, "qwen3_vl_moe", "qwen3_moe", {**_TEXT, "num_experts": count})


def write_config(config: ModelConfig) -> Json:
    return qwen3_vl.write(config, "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration")


FAMILY = Family(
    name="qwen3_vl_moe",
    model_types=("qwen3_vl_moe",),
    rows=(*qwen3_vl.ROWS, *_experts("e d f -> e d f", "e f d -> e f d", 2)),
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.QWEN3_VL,
    ignored=IGNORED,
    text_renames=qwen3_vl.WITHIN,
    variants={"base": qwen3_vl.BASE},
    # As transformers 5 has experts in memory and writes them, under the same names: [expert, out, in].
    layouts={"memory": (*qwen3_vl.ROWS, *_experts("e f d -> e d f", "e d f -> e f d", 1))},
)
