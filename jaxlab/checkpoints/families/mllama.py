"""Mllama (Llama 3.2 Vision): Llama with layers in between that read the images. Its images are not run.

The layers of Llama are `layers` of our tree, as in any Llama, so that experts of Llama 3.1 match them; those
that read the images belong to the projector. The family's name tells the latter's numbers: mllama+llama@3,8.
"""

import dataclasses

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.names import Row, Rows, in_layers
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig, VisionConfig
from jaxlab.models.vit_config import MllamaConfig, ViTConfig

_VISION_LAYER: Rows = (
    *towers.norm("attention_norm", "input_layernorm"),
    *towers.norm("mlp_norm", "post_attention_layernorm"),
    *towers.attention("attention", "self_attn", "o_proj"),
    *towers.plain_mlp("mlp", "mlp"),
)
_GLOBAL_LAYER: Rows = (
    *_VISION_LAYER,
    Row("attention_gate", "gate_attn", "one -> one"),
    Row("mlp_gate", "gate_ffn", "one -> one"),
)
_CROSS_LAYER: Rows = (
    Row("attention_norm.scale", "input_layernorm.weight", "d -> d"),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", "d -> d"),
    *towers.attention("attention", "cross_attn", "o_proj"),
    Row("attention.query_norm.scale", "cross_attn.q_norm.weight", "k -> k"),
    Row("attention.key_norm.scale", "cross_attn.k_norm.weight", "k -> k"),
    Row("attention_gate", "cross_attn_attn_gate", "one -> one"),
    *towers.gated_mlp("mlp", "mlp"),
    Row("mlp_gate", "cross_attn_mlp_gate", "one -> one"),
)
_POSITION = "vision_model.gated_positional_embedding"


def _tiles(path: str, name: str) -> Rows:
    return (
        Row(f"{path}.table", f"{name}.embedding.weight", "a (t d) -> a t d"),
        Row(f"{path}.gate", f"{name}.gate", "one -> one"),
    )


ROWS: Rows = (
    Row("vision.class_token", "vision_model.class_embedding", "d -> d"),
    Row("vision.patch.table", "vision_model.patch_embedding.weight", "d c y x -> c y x d"),
    Row("vision.position.gate", f"{_POSITION}.gate", "one -> one"),
    Row("vision.position.table", f"{_POSITION}.embedding", "p d -> p d"),
    Row("vision.position.tiles", f"{_POSITION}.tile_embedding.weight", "a (t p d) -> a t p d"),
    *_tiles("vision.tiles_before", "vision_model.pre_tile_positional_embedding"),
    *_tiles("vision.tiles_after", "vision_model.post_tile_positional_embedding"),
    *towers.norm("vision.pre_norm", "vision_model.layernorm_pre"),
    *towers.norm("vision.post_norm", "vision_model.layernorm_post"),
    *in_layers("vision.layers", "vision_model.transformer.layers", _VISION_LAYER),
    *in_layers("vision.global_layers", "vision_model.global_transformer.layers", _GLOBAL_LAYER),
    *towers.linear("projector.output", "multi_modal_projector", "d v -> v d"),
    *in_layers("projector.cross_layers", "language_model.model.layers", _CROSS_LAYER),
)
_VISION: Json = {
    "hidden_size": 1280, "hidden_act": "gelu", "num_hidden_layers": 32, "num_global_layers": 8,
    "num_channels": 3, "intermediate_size": 5120, "image_size": 448, "patch_size": 14, "norm_eps": 1e-5,
    "max_num_tiles": 4, "intermediate_layers_indices": [3, 7, 15, 23, 30],
}  # fmt: skip
_TEXT: Json = {
    "vocab_size": 128256, "hidden_size": 4096, "hidden_act": "silu", "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}  # fmt: skip


def read_config(config: Json) -> ModelConfig:
    vision = {**_VISION, **(config.get("vision_config") or {})}
    text = {**_TEXT, **(config.get("text_config") or {})}
    heads = vision.get("attention_heads", vision.get("num_attention_heads", 16))
    cross = tuple(text.pop("cross_attention_layers"))
    if not cross or cross[-1] >= text["num_hidden_layers"]:
        raise UserError(f"cross_attention_layers {list(cross)} do not fit {text['num_hidden_layers']} layers")
    width = vision["hidden_size"] * (1 + len(vision["intermediate_layers_indices"]))
    if vision.get("vision_output_dim", width) != width:
        raise UserError(f"vision_output_dim is {vision['vision_output_dim']}, its layers make {width}")
    vit = ViTConfig(
        class_token=True, patch_bias=False, pre_norm=True, norm_eps=vision["norm_eps"],
        activation=towers.activation(vision, "hidden_act", ""), attention_bias=False, output_bias=False,
    )  # fmt: skip
    ratios = vision.get("supported_aspect_ratios") or MllamaConfig().aspect_ratios
    mllama = MllamaConfig(
        num_global_layers=vision["num_global_layers"],
        max_tiles=vision["max_num_tiles"],
        aspect_ratios=tuple((int(down), int(across)) for down, across in ratios),
        read_layers=tuple(vision["intermediate_layers_indices"]),
        cross_layers=cross,
    )
    tower: VisionConfig = dataclasses.replace(
        towers.read_tower({**vision, "num_attention_heads": heads}, 0, vit), kind="mllama", mllama=mllama
    )
    text |= {"model_type": "llama", "num_hidden_layers": text["num_hidden_layers"] - len(cross)}
    tie = towers.tied(config, either=False, default=False)
    if tie:
        raise UserError("a tied head is not supported: Mllama's embedding has more rows than its head")
    model = towers.read_text({"text_config": text}, VisionConfig(), "mllama", default="llama", tie=tie)
    tower = dataclasses.replace(tower, image_token=towers.image_token(config, 128256))
    numbers = ",".join(map(str, cross))
    return dataclasses.replace(model, vision=tower, extra_embeddings=8, family=f"{model.family}@{numbers}")


def write_config(config: ModelConfig) -> Json:
    v, m = config.vision, config.vision.mllama
    text = towers.write_text(dataclasses.replace(config, extra_embeddings=0))
    tower = towers.write_tower(v)
    return {
        "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama",
        "image_token_index": v.image_token, "tie_word_embeddings": False,
        "text_config": {
            **text, "model_type": "mllama_text_model", "cross_attention_layers": list(m.cross_layers),
            "num_hidden_layers": config.num_layers + len(m.cross_layers),
        },
        "vision_config": {
            **tower, "model_type": "mllama_vision_model", "attention_heads": tower.pop("num_attention_heads"),
            "hidden_act": towers.activation_name(v.vit.activation), "norm_eps": v.vit.norm_eps,
            "num_global_layers": m.num_global_layers, "max_num_tiles": m.max_tiles,
            "intermediate_layers_indices": list(m.read_layers),
            "supported_aspect_ratios": [list(ratio) for ratio in m.aspect_ratios],
            "vision_output_dim": v.width * (1 + len(m.read_layers)),
        },
    }  # fmt: skip


FAMILY = Family(
    name="mllama",
    model_types=("mllama",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    text_renames=towers.WITHIN_LLAVA,
    variants={
        "memory": (
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(vision_model|multi_modal_projector)", r"model.\1"),
        )
    },
    forward=False,
)
