"""LLaVA as its authors wrote it: the language model's config with a few keys more, and other names.

Its config.json names the vision tower instead of describing it, so the towers are known here by name. The
text has no placeholder of its own: token 0 stands in.
"""

import dataclasses
import re

from jaxlab.checkpoints.families import towers
from jaxlab.checkpoints.families.base import Json, Renames
from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig
from jaxlab.models.vit_config import ViTConfig

RENAMES: Renames = (
    (r"^language_model\.", ""),
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^vision_tower\.", "model.vision_tower.vision_tower."),
    (r"^image_newline", "model.image_newline"),
)

_CLIP = {
    "model_type": "clip_vision_model", "intermediate_size": 4096, "hidden_size": 1024, "patch_size": 14,
    "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
TOWERS: dict[str, Json] = {
    "openai/clip-vit-large-patch14": {**_CLIP, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP, "image_size": 336},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "intermediate_size": 4304, "hidden_size": 1152, "patch_size": 14,
        "image_size": 384, "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False,
    },
}  # fmt: skip
"""The towers that LLaVA was trained with. Of SigLIP's 27 layers LLaVA keeps those before the last."""


def read_config(config: Json) -> ModelConfig:
    """LLaVA-1.5 or LLaVA-NeXT, by how images are cut. Raises UserError for what is not known."""
    name = config["mm_vision_tower"]
    if name not in TOWERS:
        raise UserError(f"mm_vision_tower {name!r} is not known; known: {', '.join(TOWERS)}")
    tower = {**TOWERS[name], **(config.get("vision_config") or {})}
    if config.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise UserError(
            f"mm_projector_type {config.get('mm_projector_type')!r} is not supported; use mlp2x_gelu"
        )
    siglip, side = tower["model_type"] == "siglip_vision_model", tower["image_size"]
    cut = "anyres" in str(config.get("image_aspect_ratio"))
    vit = ViTConfig(
        final_norm="unused",
        feature_layers=(-1,) if siglip else (int(config.get("mm_vision_select_layer", -2)),),
        drop_first=not siglip and config.get("mm_vision_select_feature", "patch") == "patch",
        grid=_grid(config.get("image_grid_pinpoints"), side) if cut else (),
        max_tiles=int(most[1])
        if (most := re.search(r"max_(\d+)", str(config.get("image_aspect_ratio"))))
        else 0,
    )
    vision = towers.read_clip({"vision_config": tower}, 0, vit, tower)
    kind = str(config["model_type"]).removeprefix("llava_")
    text = {**config, "model_type": {"llava": "llama", "qwen": "qwen2"}.get(kind, kind)}
    tie = bool(config.get("tie_word_embeddings", False))
    family = ("llava_onevision" if vit.max_tiles else "llava_next") if cut else "llava"
    model = towers.read_text({"text_config": text}, vision, family, default="llama", tie=tie)
    return dataclasses.replace(model, family=f"{model.family}/original")


def _grid(pinpoints: object, side: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths; told as such, or as "(1x1),...,(6x6)" tiles. Theirs are widths and heights."""
    if isinstance(pinpoints, str):
        counts = [(int(a), int(b)) for a, b in re.findall(r"(\d+)x(\d+)", pinpoints)]
        if len(counts) == 2 and "..." in pinpoints:
            (low, left), (high, right) = counts
            counts = [(a, b) for a in range(low, high + 1) for b in range(left, right + 1)]
        return tuple((b * side, a * side) for a, b in counts)
    if not isinstance(pinpoints, list) or not pinpoints:
        raise UserError("image_aspect_ratio is anyres, image_grid_pinpoints tells no sizes")
    return tuple((int(height), int(width)) for width, height in pinpoints)
