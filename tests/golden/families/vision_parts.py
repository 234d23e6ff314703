"""What cases of vision-language models share: small configs, names in the wild, rows of tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from case import Inputs

TEXT: dict[str, Any] = dict(
    vocab_size=109,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=44,
    max_position_embeddings=256,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_id=2,
)
CLIP: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=34,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=20,
    patch_size=5,
    projection_dim=16,
)
SIGLIP = {key: value for key, value in CLIP.items() if key != "projection_dim"}
IMAGE = 77
"""Token id of the placeholders; not the last one of the vocabulary."""

CLIP_PREFIX = ((r"^vision_tower\.", "vision_tower.vision_model."),)
WITHOUT_PREFIX = {
    "name": "transformers 5, a model that was not loaded from a folder: no vision_model",
    "rename": [[r"^vision_tower\.vision_model\.", "vision_tower."]],
}
IN_MEMORY = {
    "name": "names as transformers has them in memory since 4.52",
    "rename": [
        [r"^language_model\.lm_head\.", "lm_head."],
        [r"^language_model\.model\.", "model.language_model."],
        [r"^(vision_tower|vision_model|multi_modal_projector)\.", r"model.\1."],
        [r"^image_newline$", "model.image_newline"],
    ],
}
ORIGINAL_LLAVA = {
    "name": "the authors' own code (liuhaotian/llava), with another config.json",
    "rename": [
        [r"^language_model\.lm_head\.", "lm_head."],
        [r"^language_model\.model\.", "model."],
        [r"^vision_tower\.", "model.vision_tower.vision_tower."],
        [r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."],
        [r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."],
        [r"^image_newline$", "model.image_newline"],
    ],
    "transformers": False,
}
Part = int | Sequence[int]
"""So many random tokens, or these ones."""


def row(
    generator: np.random.Generator, parts: Sequence[Part], vocabulary: int, special: Sequence[int]
) -> list[int]:
    """One row of token ids; the random ones are none of the special ones."""
    usual = np.setdiff1d(np.arange(3, vocabulary), special)
    ids: list[int] = []
    for part in parts:
        ids += generator.choice(usual, part).tolist() if isinstance(part, int) else list(part)
    return ids


def batch(generator: np.random.Generator, rows: Sequence[Sequence[Part]], special: Sequence[int]) -> Inputs:
    return {"input_ids": np.array([row(generator, parts, TEXT["vocab_size"], special) for parts in rows])}


def pixels(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.uniform(-2, 2, shape).astype(np.float32)


def image(tokens: int) -> list[int]:
    return [IMAGE] * tokens
