"""StableLM: LayerNorm, a part of each head turns; in the 12B queries and keys have a norm for each head."""

from jaxlab.checkpoints.families import language, rope
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import ModelConfig

_DEFAULTS: Json = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
}
_NORMS: Rows = (
    *language.NORMS,
    Row("attention_norm.bias", "input_layernorm.bias", "d -> d"),
    Row("mlp_norm.bias", "post_attention_layernorm.bias", "d -> d"),
)
_QK_NORMS: Rows = (
    Row("attention.query_norm.scale", "self_attn.q_layernorm.norms.{h}.weight", "k -> k"),
    Row("attention.key_norm.scale", "self_attn.k_layernorm.norms.{h}.weight", "k -> k"),
)


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "stablelm", _DEFAULTS)
    s.ignore("num_heads")  # once more num_attention_heads
    if s.value("norm_eps", s.value("layer_norm_eps")) != s.value("layer_norm_eps"):
        raise s.refuse("norm_eps", "layer_norm_eps is another")
    if s.value("rotary_scaling_factor", 1.0) != 1.0:
        raise s.refuse(
            "rotary_scaling_factor", "transformers does not read it, and positions stay as they are"
        )
    return language.read_decoder(
        s,
        partial=0.25,
        norm="layer",
        attention_bias=s.flag("use_qkv_bias"),
        output_bias=False,
        parallel=s.flag("use_parallel_residual"),
        qk_norm="each_head" if s.flag("qk_layernorm") else "none",
    )


def write_config(config: ModelConfig) -> Json:
    return {
        **language.write_decoder(config, "stablelm", "StableLmForCausalLM"),
        "partial_rotary_factor": rope.partial_factor(config),
        "use_qkv_bias": config.attention_bias,
        "use_parallel_residual": config.parallel,
        "qk_layernorm": config.qk_norm == "each_head",
    }


FAMILY = Family(
    name="stablelm",
    model_types=("stablelm",),
    rows=(
        *language.decoder_rows(
            _NORMS, language.ATTENTION, language.ATTENTION_BIASES, _QK_NORMS, language.MLP
        ),
        Row("final_norm.bias", "model.norm.bias", "d -> d"),
    ),
    read_config=read_config,
    write_config=write_config,
    ignored=language.IGNORED,
    variants=language.VARIANTS,
)
