"""Rows that vision-language families share: those of CLIP and SigLIP, of projectors; other names of them."""

from collections.abc import Mapping

from jaxlab.checkpoints.families.base import Renames
from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers

WITHIN_LLAVA: Renames = ((r"^", "language_model."),)
"""From a language model's names to those inside LLaVA and the families that follow it."""

_MEMORY: Renames = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
)
_FLAT: Renames = ((r"vision_tower\.vision_model\.", "vision_tower."),)
LLAVA_VARIANTS: Mapping[str, Renames] = {
    "flat": _FLAT,
    "memory": _MEMORY,
    "memory_flat": (*_MEMORY, *_FLAT),
}
"""flat: as transformers 5.24 writes models that it made. memory: as transformers names parameters in memory
since 4.52 (flat since 5.24), and as some folders have them."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def linear(path: str, name: str, layout: str) -> Rows:
    """A matrix and its bias."""
    out = layout.partition("->")[0].split()[0]
    return (
        Row(path, f"{name}.weight", layout),
        Row(f"{path}_bias", f"{name}.bias", f"{out} -> {out}"),
    )


def norm(path: str, name: str) -> Rows:
    return (
        Row(f"{path}.scale", f"{name}.weight", "d -> d"),
        Row(f"{path}.bias", f"{name}.bias", "d -> d"),
    )


def attention(path: str, name: str, output: str) -> Rows:
    """Projections of attention; their output projection is named differently from family to family."""
    rows: Rows = ()
    for ours in ("query", "key", "value"):
        theirs = f"{name}.{ours[0]}_proj"
        rows += (
            Row(f"{path}.{ours}", f"{theirs}.weight", "(h k) d -> d h k"),
            Row(f"{path}.{ours}_bias", f"{theirs}.bias", "(h k) -> h k"),
        )
    return (
        *rows,
        Row(f"{path}.output", f"{name}.{output}.weight", "d (h k) -> h k d"),
        Row(f"{path}.output_bias", f"{name}.{output}.bias", "d -> d"),
    )


def plain_mlp(path: str, name: str) -> Rows:
    return (
        *linear(f"{path}.up", f"{name}.fc1", "f d -> d f"),
        *linear(f"{path}.down", f"{name}.fc2", "d f -> f d"),
    )


def gated_mlp(path: str, name: str) -> Rows:
    return (
        Row(f"{path}.gate", f"{name}.gate_proj.weight", "f d -> d f"),
        Row(f"{path}.up", f"{name}.up_proj.weight", "f d -> d f"),
        Row(f"{path}.down", f"{name}.down_proj.weight", "d f -> f d"),
    )


def clip_rows(name: str) -> Rows:
    """A tower of CLIP, SigLIP or Idefics at `name`."""
    head = tuple(f"vision.head.attention.{part}" for part in ("query", "key", "value"))
    layer = (
        *norm("attention_norm", "layer_norm1"),
        *norm("mlp_norm", "layer_norm2"),
        *attention("attention", "self_attn", "out_proj"),
        *plain_mlp("mlp", "mlp"),
    )
    return (
        Row("vision.class_token", f"{name}.embeddings.class_embedding", "d -> d"),
        Row("vision.patch.table", f"{name}.embeddings.patch_embedding.weight", "d c y x -> c y x d"),
        Row("vision.patch.bias", f"{name}.embeddings.patch_embedding.bias", "d -> d"),
        Row("vision.position.table", f"{name}.embeddings.position_embedding.weight", "p d -> p d"),
        *norm("vision.pre_norm", f"{name}.pre_layrnorm"),
        *in_layers("vision.layers", f"{name}.encoder.layers", layer),
        *norm("vision.final_norm", f"{name}.post_layernorm"),
        Row("vision.head.probe", f"{name}.head.probe", "() () d -> d"),
        Row(head, f"{name}.head.attention.in_proj_weight", "(h k) d -> d h k"),
        Row(tuple(f"{path}_bias" for path in head), f"{name}.head.attention.in_proj_bias", "(h k) -> h k"),
        Row("vision.head.attention.output", f"{name}.head.attention.out_proj.weight", "d (h k) -> h k d"),
        Row("vision.head.attention.output_bias", f"{name}.head.attention.out_proj.bias", "d -> d"),
        *norm("vision.head.norm", f"{name}.head.layernorm"),
        *plain_mlp("vision.head.mlp", f"{name}.head.mlp"),
    )


CLIP_IGNORED = (r".*\.embeddings\.position_ids",)
"""Buffers that older versions wrote: 0, 1, 2, ..."""

MLP_ROWS: Rows = (
    *linear("projector.hidden", "multi_modal_projector.linear_1", "d v -> v d"),
    *linear("projector.output", "multi_modal_projector.linear_2", "d v -> v d"),
)
