"""GPT-J: attention and MLP side by side, some dimensions of a head turn in neighbouring pairs."""

from jaxlab.checkpoints.families import gpt2, language
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import ModelConfig, RopeConfig

_DEFAULTS: Json = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
_LAYER: Rows = (
    Row("attention_norm.scale", "ln_1.weight", "d -> d"),
    Row("attention_norm.bias", "ln_1.bias", "d -> d"),
    Row("attention.query", "attn.q_proj.weight", "(h k) d -> d h k"),
    Row("attention.key", "attn.k_proj.weight", "(h k) d -> d h k"),
    Row("attention.value", "attn.v_proj.weight", "(h k) d -> d h k"),
    Row("attention.output", "attn.out_proj.weight", "d (h k) -> h k d"),
    Row("mlp.up", "mlp.fc_in.weight", "f d -> d f"),
    Row("mlp.up_bias", "mlp.fc_in.bias", "f -> f"),
    Row("mlp.down", "mlp.fc_out.weight", "d f -> f d"),
    Row("mlp.down_bias", "mlp.fc_out.bias", "d -> d"),
)
ROWS: Rows = (
    Row("embedding.table", "transformer.wte.weight", "v d -> v d"),
    *in_layers("layers", "transformer.h", _LAYER),
    Row("final_norm.scale", "transformer.ln_f.weight", "d -> d"),
    Row("final_norm.bias", "transformer.ln_f.bias", "d -> d"),
    Row("head.table", "lm_head.weight", "v d -> d v"),
    Row("head.bias", "lm_head.bias", "v -> v"),
)


def read_config(config: Json) -> ModelConfig:
    s = Settings(config, "gptj", _DEFAULTS)
    if config.get("rotary_dim", 0) is None:
        raise s.refuse("rotary_dim", "give a number of dimensions")
    for key in ("rotary", "scale_attn_weights"):  # written, and never read by transformers
        if not s.flag(key, True):
            raise s.refuse(key, "it is always true")
    if s.flag("tie_word_embeddings"):
        raise s.refuse("tie_word_embeddings", "the head has a bias of its own")
    rope = RopeConfig(dim=s.whole("rotary_dim"), interleaved=True)
    return language.finish(s, {**gpt2.read_common(s), "position": rope, "parallel": True, "head_bias": True})


def write_config(config: ModelConfig) -> Json:
    return {**gpt2.write_common(config, "gptj", "GPTJForCausalLM"), "rotary_dim": config.rotary_dim}


FAMILY = Family(
    name="gptj",
    model_types=("gptj",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),  # masks
    variants={"base": ((r"^transformer\.", ""),)},
)
