"""Cases of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL with experts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transformers as hf
from case import Case, Inputs
from vision_parts import (
    IMAGE,
    TEXT,
    Part,
    batch,
    image,
    pixels,
)

START, END = 79, 80
"""Tokens before and after an image."""
QWEN_SPECIAL = [IMAGE, IMAGE + 1, START, END]
QWEN: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=START, vision_end_token_id=END
)
QWEN_TEXT = {k: v for k, v in TEXT.items() if k != "rope_theta"} | dict(hidden_size=48, num_attention_heads=4)
"""Heads of 12 dimensions: 6 pairs for three coordinates."""
QWEN_IN_MEMORY = {
    "name": "names as transformers has them in memory since 4.52",
    "rename": [[r"^model\.", "model.language_model."], [r"^visual\.", "model.visual."]],
}


def qwen(
    kind: str,
    name: str,
    awkward: str,
    config: Callable[[], Any],
    grids: Sequence[tuple[int, int]],
    **more: Any,
) -> Case:
    """Patches of images of several sizes in one list; grids are (height, width) in patches of 4 x 4 pixels.

    The first row has the first image, the second one all others.
    """
    seen = [[START, *image(height * width // 4), END] for height, width in grids]

    def numbers(generator: np.random.Generator, rows: Inputs, grids: Sequence[tuple[int, int]]) -> Inputs:
        patches = sum(height * width for height, width in grids)
        return rows | {
            "pixel_values": pixels(generator, patches, 3 * 2 * 4 * 4),
            "image_grid_thw": np.array([(1, *grid) for grid in grids]),
            "mm_token_type_ids": (rows["input_ids"] == IMAGE).astype(np.int32),
        }

    def inputs(generator: np.random.Generator) -> Inputs:
        second: list[Part] = [3, *(part for one in seen[1:] for part in (one, 2)), 3]
        length = sum(part if isinstance(part, int) else len(part) for part in second)
        first: list[Part] = [4, seen[0], length - 4 - len(seen[0])]
        return numbers(generator, batch(generator, [first, second], QWEN_SPECIAL), grids)

    def prompt(generator: np.random.Generator, long: bool) -> Inputs:
        return numbers(generator, batch(generator, [[3, seen[0], 4]], QWEN_SPECIAL), grids[:1])

    return Case(
        name=name,
        model=f"{kind}ForConditionalGeneration",
        config=config,
        awkward=awkward,
        inputs=inputs,
        prompt=prompt,
        special=tuple(QWEN_SPECIAL),
        **more,
    )


QWENS = [
    qwen(
        "Qwen2VL",
        "qwen2_vl",
        "images of three sizes, two in a row; M-RoPE sections 1, 3, 2; tied; "
        "LayerNorms and quick_gelu in the tower",
        lambda: hf.Qwen2VLConfig(
            text_config=QWEN_TEXT
            | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 3, 2]}, "rope_theta": 5000.0},
            vision_config=dict(depth=2, embed_dim=24, hidden_size=48, num_heads=2, mlp_ratio=2, patch_size=4),
            tie_word_embeddings=True,
            **QWEN,
        ),
        [(4, 6), (8, 2), (2, 4)],
        layouts=[QWEN_IN_MEMORY],
    ),
    qwen(
        "Qwen2_5_VL",
        "qwen2_5_vl",
        "windows of 2 x 2 merged patches that do not divide the images, full "
        "attention in blocks 1 and 3; RMSNorms "
        "and gated MLP with biases in the tower; untied; text layer 1 in a window of 9",
        lambda: hf.Qwen2_5_VLConfig(
            text_config=QWEN_TEXT
            | {
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
                "rope_theta": 5000.0,
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 1,
            },
            vision_config=dict(
                depth=4,
                hidden_size=24,
                out_hidden_size=48,
                num_heads=2,
                intermediate_size=30,
                patch_size=4,
                window_size=16,
                fullatt_block_indexes=[1, 3],
            ),
            **QWEN,
        ),
        [(6, 10), (8, 4), (2, 6)],
        layouts=[QWEN_IN_MEMORY],
    ),
    qwen(
        "Qwen3VL",
        "qwen3_vl",
        "DeepStack from blocks 1 and 0 (in that order) to text layers 0 and 1; "
        "positions interpolated from 5 x 5; "
        "interleaved M-RoPE with sections 2, 2, 1; norms on queries and keys, head_dim 10; tied",
        lambda: hf.Qwen3VLConfig(
            text_config=QWEN_TEXT
            | {
                "head_dim": 10,
                "num_hidden_layers": 3,
                "rope_theta": 5000.0,
                "rope_scaling": {
                    "mrope_section": [2, 2, 1],
                    "mrope_interleaved": True,
                    "rope_type": "default",
                },
            },
            vision_config=dict(
                depth=3,
                hidden_size=24,
                out_hidden_size=48,
                num_heads=2,
                intermediate_size=30,
                patch_size=4,
                num_position_embeddings=25,
                deepstack_visual_indexes=[1, 0],
            ),
            tie_word_embeddings=True,
            **QWEN,
        ),
        [(4, 6), (8, 2), (2, 4)],
    ),
    qwen(
        "Qwen3VLMoe",
        "qwen3_vl_moe",
        "text layer 0 is dense, and DeepStack goes to it and to layer 1, which has experts; experts in one "
        "tensor a layer, [expert, in, out]; untied; no head_dim",
        lambda: hf.Qwen3VLMoeConfig(
            text_config=QWEN_TEXT
            | {
                "num_hidden_layers": 3,
                "num_experts": 5,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 20,
                "mlp_only_layers": [0],
                "rope_theta": 5000.0,
                "rope_scaling": {
                    "mrope_section": [2, 2, 2],
                    "mrope_interleaved": True,
                    "rope_type": "default",
                },
            },
            vision_config=dict(
                depth=2,
                hidden_size=24,
                out_hidden_size=48,
                num_heads=2,
                intermediate_size=30,
                patch_size=4,
                num_position_embeddings=16,
                deepstack_visual_indexes=[0, 1],
            ),
            **QWEN,
        ),
        [(4, 6), (8, 2), (2, 4)],
        transposed=r"mlp\.experts\.",
    ),
]
