"""InternLM2: Llama under other names; one tensor has the queries, key and value of group after group."""

from jaxlab.checkpoints.families import language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bias": True,
}
"""Of its authors' config class: transformers has none."""
_PARTS = ("attention.query", "attention.key", "attention.value")
_LAYER: Rows = (
    Row("attention_norm.scale", "attention_norm.weight", "d -> d"),
    Row("mlp_norm.scale", "ffn_norm.weight", "d -> d"),
    Row(_PARTS, "attention.wqkv.weight", "(h k) d -> d h k", runs="h"),
    Row(tuple(f"{part}_bias" for part in _PARTS), "attention.wqkv.bias", "(h k) -> h k", runs="h"),
    Row("attention.output", "attention.wo.weight", "d (h k) -> h k d"),
    Row("attention.output_bias", "attention.wo.bias", "d -> d"),
    Row("mlp.gate", "feed_forward.w1.weight", "f d -> d f"),
    Row("mlp.up", "feed_forward.w3.weight", "f d -> d f"),
    Row("mlp.down", "feed_forward.w2.weight", "d f -> f d"),
)
ROWS: Rows = (
    Row("embedding.table", "model.tok_embeddings.weight", "v d -> v d"),
    *in_layers("layers", "model.layers", _LAYER),
    Row("final_norm.scale", "model.norm.weight", "d -> d"),
    Row("head.table", "output.weight", "v d -> d v"),
)


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "internlm2", _DEFAULTS)
    if s.word("rope_pos_id_version", "default") != "default":
        raise s.refuse("rope_pos_id_version", "supported: default")
    s.ignore("rope_pos_id_stride")
    bias = s.flag("bias")
    if s.whole("head_dim", s.whole("hidden_size") // s.whole("num_attention_heads")) * s.whole(
        "num_attention_heads"
    ) != s.whole("hidden_size"):
        raise s.refuse("head_dim", "it must be hidden_size / num_attention_heads")
    return language.read_decoder(s, attention_bias=bias, output_bias=bias)


def write_config(config: ModelConfig) -> Json:
    """The keys of the authors' config class.

    Raises:
      UserError: heads or rotary positions that it does not know.
    """
    if config.key_dim * config.num_heads != config.width:
        raise UserError("internlm2: its heads make up the width; set head_dim to width / num_heads")
    written = language.write_decoder(config, "internlm2", "InternLM2ForCausalLM")
    scaling = written["rope_scaling"]
    if scaling is not None and scaling["rope_type"] not in ("linear", "dynamic"):
        raise UserError(f"internlm2: rotary positions are not stretched by {scaling['rope_type']}")
    if scaling is not None:  # the class takes these two keys and no others
        written["rope_scaling"] = {"type": scaling["rope_type"], "factor": scaling["factor"]}
    return {**written, "bias": config.attention_bias}


FAMILY = Family(
    name="internlm2",
    model_types=("internlm2",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
