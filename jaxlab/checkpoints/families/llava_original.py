"""LLaVA as its authors wrote it: the language model's config with a few keys more, and other names.

Its config.json names the vision tower instead of describing it, so the towers are known here by name. The
text has no placeholder of its own: token 0 stands in.
"""

import dataclasses
import re

from jaxlab.checkpoints.families import vlm
from jaxlab.checkpoints.families.base import Json, Renames
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.models import ModelConfig

RENAMES: Renames = (
    (r"^language_model\.", ""),
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^vision_tower\.", "model.vision_tower.vision_tower."),
    (r"^image_newline", "model.image_newline"),
)

TOWERS: dict[str, Json] = {
    "openai/clip-vit-large-patch14": {**vlm.CLIP_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": vlm.CLIP_LARGE,
    "google/siglip-so400m-patch14-384": vlm.SIGLIP_LARGE,
}
"""The towers that LLaVA was trained with. Of SigLIP's 27 layers LLaVA keeps those before the last."""


_TEXT_OF = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_OURS = (
    "mm_vision_tower",
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "model_type",
    "tie_word_embeddings",
    "vision_config",
    "freeze_mm_mlp_adapter",
    "image_crop_resolution",
    "image_split_resolution",
    "mm_hidden_size",
    "mm_patch_merge_type",
    "mm_projector_lr",
    "mm_resampler_type",
    "mm_spatial_pool_mode",
    "mm_tunable_parts",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "mm_vision_tower_lr",
    "pos_skipping_range",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "unfreeze_mm_vision_tower",
    "use_mm_proj",
    "use_pos_skipping",
    "vision_tower_pretrained",
    "add_faster_video",
    "faster_token_stride",
    "force_sample",
    "mm_newline_position",
    "mm_spatial_pool_stride",
)


def read_config(config: Json) -> ModelConfig:
    """LLaVA-1.5, NeXT or OneVision, by how images are cut.

    Raises:
      UserError: something in it is not known.
    """
    s = Settings(config, "llava")
    name = s.word("mm_vision_tower", "")
    if name not in TOWERS:
        raise s.refuse("mm_vision_tower", f"known: {', '.join(TOWERS)}")
    if s.word("mm_projector_type", "linear") != "mlp2x_gelu":
        raise s.refuse("mm_projector_type", "supported: mlp2x_gelu")
    siglip, cut = "siglip" in name, s.word("image_aspect_ratio", "pad")
    most = re.fullmatch(r"anyres(?:_max_([1-9]\d{0,4}))?", cut)
    layer = s.value("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise s.wrong("mm_vision_select_layer", "a whole number")
    vit = dict(
        final_norm="unused",
        feature_layers=(-1,) if siglip else (layer,),
        drop_first=not siglip and s.word("mm_vision_select_feature", "patch") == "patch",
        grid=() if most is None else _grid(s, TOWERS[name]["image_size"]),
        max_tiles=int(most[1]) if most is not None and most[1] else 0,
    )
    family = "llava" if most is None else "llava_onevision" if vit["max_tiles"] else "llava_next"
    tower = {**TOWERS[name], **s.value("vision_config", {})}
    kind = s.word("model_type", "llava")
    if kind not in _TEXT_OF:
        raise s.refuse("model_type", f"supported: {', '.join(_TEXT_OF)}")
    text = {key: value for key, value in config.items() if key not in _OURS}
    whole = Settings({"vision_config": tower, "text_config": text}, family)
    vision = vlm.read_clip(whole, 0, vit, tower)
    tie = s.flag("tie_word_embeddings")
    model = vlm.read_text(whole, vision, default=_TEXT_OF[kind], tie=tie)
    return dataclasses.replace(model, family=f"{model.family}/original")


def _grid(s: Settings, side: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths; told as widths and heights, or as "(1x1),...,(6x6)" tiles."""
    pinpoints = s.value("image_grid_pinpoints")
    if isinstance(pinpoints, str):
        counts = [(int(a), int(b)) for a, b in re.findall(r"(\d{1,3})x(\d{1,3})", pinpoints)]
        if len(counts) == 2 and "..." in pinpoints:
            (low, left), (high, right) = counts
            counts = [(a, b) for a in range(low, high + 1) for b in range(left, right + 1)]
        return tuple((b * side, a * side) for a, b in counts)
    if not isinstance(pinpoints, list):
        raise s.wrong("image_grid_pinpoints", "a list of sizes, since images are cut to tiles")
    return tuple((height, width) for width, height in vlm.grid(s, []))
