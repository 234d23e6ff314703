"""Mllama (Llama 3.2 Vision): Llama with layers in between that read the images.

The layers of Llama are `layers` of our tree, as in any Llama, so that experts of Llama 3.1 match them; those
that read the images belong to the projector. The family's name tells the latter's numbers: mllama+llama@3,8.
"""

import dataclasses
from functools import partial

from jaxlab import processing
from jaxlab.checkpoints.families import language, towers, vlm
from jaxlab.checkpoints.families.base import Family, Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers
from jaxlab.models import MllamaVisionConfig, ModelConfig

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
    "hidden_size": 1280,
    "hidden_act": "gelu",
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "num_channels": 3,
    "intermediate_size": 5120,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
}
_TEXT: Json = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}


_PAD = 128004
"""What transformers takes for pad_token_id where there is none; smaller vocabularies do not have it."""


def _numbers(s: Settings, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = s.value(key, list(default))
    if not isinstance(found, list) or any(type(number) is not int or number < 0 for number in found):
        raise s.wrong(key, "a list of layer numbers")
    return tuple(found)


def _read_extra(v: Settings, cross: tuple[int, ...]) -> Json:
    usual = MllamaVisionConfig()
    ratios = v.value("supported_aspect_ratios", [list(ratio) for ratio in usual.aspect_ratios])
    if not isinstance(ratios, list) or not all(isinstance(r, list) and len(r) == 2 for r in ratios):
        raise v.wrong("supported_aspect_ratios", "a list of tiles down and across")
    return dict(
        num_global_layers=v.whole("num_global_layers", most=1 << 12),
        max_tiles=v.whole("max_num_tiles"),
        aspect_ratios=tuple((down, across) for down, across in ratios),
        norm_eps=v.number("norm_eps"),
        activation=language.activation(v, "hidden_act", "gelu"),
        read_layers=_numbers(v, "intermediate_layers_indices", usual.read_layers),
        cross_layers=cross,
    )


def read_config(config: Json) -> ModelConfig:
    s = vlm.settings(config, "mllama")
    v, text = vlm.inner(s, "vision_config", _VISION), vlm.inner(s, "text_config", {})
    cross = _numbers(text, "cross_attention_layers", MllamaVisionConfig().cross_layers)
    layers = text.whole("num_hidden_layers", 40, most=1 << 12)
    if not cross or max(cross) >= layers or len(cross) >= layers:
        raise text.refuse("cross_attention_layers", f"there are {layers} layers")
    extra = _read_extra(v, cross)
    count = v.whole("num_hidden_layers", most=1 << 12)
    if any(layer >= count for layer in extra["read_layers"]):
        raise v.refuse("intermediate_layers_indices", f"there are {count} layers")
    width = v.whole("hidden_size") * (1 + len(extra["read_layers"]))
    if v.whole("vision_output_dim", width) != width:
        raise v.refuse("vision_output_dim", f"the layers that are read make {width}")
    v.config["num_attention_heads"] = v.whole("attention_heads", v.whole("num_attention_heads", 16))
    token = vlm.image_token(s, 128256)
    tower = vlm.build(MllamaVisionConfig, **extra, **vlm.read_sizes(v, token))
    if vlm.tied(s, either=False, default=False):
        raise s.refuse("tie_word_embeddings", "the embedding has more rows than the head")
    theta = {} if "rope_parameters" in text or "rope_theta" in text else {"rope_theta": 500000.0}
    s.config["text_config"] = {**_TEXT, **theta, **text.config}
    model = vlm.read_text(
        s,
        None,
        default="mllama_text_model",
        tie=False,
        without=("cross_attention_layers",),
        known=("mllama_text_model",),
        model_type="llama",
        num_hidden_layers=layers - len(cross),
    )
    name = f"{model.family}@{','.join(map(str, cross))}"
    return vlm.build(partial(dataclasses.replace, model), vision=tower, extra_embeddings=8, family=name)


def write_config(config: ModelConfig) -> Json:
    v = config.vision_as(MllamaVisionConfig)
    text = vlm.write_text(dataclasses.replace(config, vision=None, extra_embeddings=0))
    tower = vlm.write_tower(v)
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": v.image_token,
        "tie_word_embeddings": False,
        "text_config": {
            **text,
            "model_type": "mllama_text_model",
            "cross_attention_layers": list(v.cross_layers),
            "num_hidden_layers": config.num_layers + len(v.cross_layers),
            **({} if config.vocab_size > _PAD else {"pad_token_id": None}),
        },
        "vision_config": {
            **tower,
            "model_type": "mllama_vision_model",
            "attention_heads": tower.pop("num_attention_heads"),
            "hidden_act": language.activation_name(v.activation),
            "norm_eps": v.norm_eps,
            "num_global_layers": v.num_global_layers,
            "max_num_tiles": v.max_tiles,
            "intermediate_layers_indices": list(v.read_layers),
            "supported_aspect_ratios": [list(ratio) for ratio in v.aspect_ratios],
            "vision_output_dim": v.width * (1 + len(v.read_layers)),
        },
    }


FAMILY = Family(
    name="mllama",
    model_types=("mllama",),
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    processor=lambda: processing.MLLAMA,
    text_renames=towers.WITHIN_LLAVA,
    variants={
        "memory": (
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(vision_model|multi_modal_projector)", r"model.\1"),
        )
    },
)
