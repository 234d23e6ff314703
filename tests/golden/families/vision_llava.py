"""Cases of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transformers as hf
from case import Case, Inputs
from vision_parts import (
    CLIP,
    CLIP_PREFIX,
    IMAGE,
    IN_MEMORY,
    ORIGINAL_LLAVA,
    SIGLIP,
    TEXT,
    WITHOUT_PREFIX,
    Part,
    batch,
    image,
    pixels,
)


def llava(name: str, awkward: str, config: Callable[[], Any], placeholders: int, **more: Any) -> Case:
    """One image in each row, in the middle of the text, at other places."""
    image = [IMAGE] * placeholders

    def inputs(generator: np.random.Generator) -> Inputs:
        rows = batch(generator, [[6, image, 9], [11, image, 4]], [IMAGE])
        return rows | {"pixel_values": pixels(generator, 2, 3, 20, 20)}

    def prompt(generator: np.random.Generator, long: bool) -> Inputs:
        return batch(generator, [[3, image, 4]], [IMAGE]) | {"pixel_values": pixels(generator, 1, 3, 20, 20)}

    return Case(
        name=name,
        model="LlavaForConditionalGeneration",
        config=config,
        awkward=awkward,
        inputs=inputs,
        prompt=prompt,
        special=(IMAGE,),
        disk_names=CLIP_PREFIX,
        layouts=[WITHOUT_PREFIX, IN_MEMORY, ORIGINAL_LLAVA],
        **more,
    )


CLIP_UNUSED = r"vision_tower\.vision_model\.(post_layernorm|encoder\.layers\.2|.*k_proj\.bias)"
LLAVAS = [
    llava(
        "llava",
        "CLIP with class token, the last but one layer's output without it; Llama with odd vocabulary",
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**CLIP),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_seq_length=16,
        ),
        16,
        no_effect=CLIP_UNUSED,
    ),
    llava(
        "llava_siglip",
        "SigLIP with a pooling head that is not used; two layers' outputs side "
        "by side, in no order, all tokens; "
        "Mistral with a window shorter than an image; projector without biases, tanh; tied head",
        lambda: hf.LlavaConfig(
            vision_config=hf.SiglipVisionConfig(**SIGLIP),
            text_config=hf.MistralConfig(**TEXT | {"sliding_window": 9, "tie_word_embeddings": True}),
            image_token_index=IMAGE,
            image_seq_length=16,
            vision_feature_layer=[-1, 1],
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
            projector_hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
        ),
        16,
        no_effect=r"vision_tower\.vision_model\.(post_layernorm|head\.|.*k_proj\.bias)",
    ),
]
NEXT = CLIP | {"image_size": 16, "patch_size": 4}
PINPOINTS = [[16, 32], [32, 16], [16, 48], [48, 16], [32, 32]]


def tiled(
    kind: str,
    name: str,
    awkward: str,
    config: Callable[[], Any],
    rows: Sequence[Sequence[Part]],
    sizes: Sequence[tuple[int, int]],
    tiles: int,
    prompt: Sequence[Part],
    prompt_size: tuple[int, int],
    counts: Sequence[int] | None = None,
    **more: Any,
) -> Case:
    """Images in tiles: pixel_values [images, tiles, 3, 16, 16]; tiles that one lacks hold noise."""
    special = [IMAGE, IMAGE + 1]

    def inputs(generator: np.random.Generator) -> Inputs:
        found = batch(generator, rows, special) | {
            "pixel_values": pixels(generator, len(sizes), tiles, 3, 16, 16),
            "image_sizes": np.array(sizes),
        }
        return found if counts is None else found | {"batch_num_images": np.array(counts)}

    def one(generator: np.random.Generator, long: bool) -> Inputs:
        return batch(generator, [prompt], special) | {
            "pixel_values": pixels(generator, 1, tiles, 3, 16, 16),
            "image_sizes": np.array([prompt_size]),
        }

    return Case(
        name=name,
        model=f"{kind}ForConditionalGeneration",
        config=config,
        awkward=awkward,
        inputs=inputs,
        prompt=one,
        special=tuple(special),
        disk_names=CLIP_PREFIX,
        layouts=[WITHOUT_PREFIX, IN_MEMORY, ORIGINAL_LLAVA],
        **more,
    )


def onevision(**settings: Any) -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **SIGLIP | {"image_size": 16, "patch_size": 4}, vision_use_head=False
        ),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=IMAGE + 1,
        image_grid_pinpoints=PINPOINTS,
        **settings,
    )


SIGLIP_UNUSED = r"vision_tower\.vision_model\.(post_layernorm|.*k_proj\.bias)"
TILED = [
    tiled(
        "LlavaNext",
        "llava_next",
        "images 10 x 47 (tiles 1 x 3, one row of patches cut above and below) "
        "and 31 x 9 (tiles 2 x 1, a column cut "
        "at each side, one tile of noise); image_newline after each row of patches; Mistral",
        lambda: hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**NEXT),
            text_config=hf.MistralConfig(**TEXT),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=16,
        ),
        [[5, image(42), 7], [9, image(40), 5]],
        [(10, 47), (31, 9)],
        4,
        [3, image(40), 4],
        (31, 9),
        no_effect=CLIP_UNUSED,
    ),
    tiled(
        "LlavaOnevision",
        "llava_onevision",
        "images 32 x 24 (tiles 2 x 2; 8 x 8 patches, cut to 8 x 6, shrunk "
        "bilinearly to 6 x 4) and 10 x 47; anyres_max_2",
        lambda: onevision(vision_aspect_ratio="anyres_max_2"),
        [[5, image(46), 6], [8, image(42), 7]],
        [(32, 24), (10, 47)],
        5,
        [3, image(42), 4],
        (10, 47),
        no_effect=SIGLIP_UNUSED,
    ),
    tiled(
        "LlavaOnevision",
        "llava_onevision_multi",
        "batch_num_images: a row with two images takes only the first tile of "
        "each, with one newline; anyres_max_9",
        lambda: onevision(),
        [[5, image(42), 6], [8, image(17), 5, image(17), 6]],
        [(10, 47), (32, 31), (10, 47)],
        5,
        [3, image(42), 4],
        (10, 47),
        counts=[1, 2],
        no_effect=SIGLIP_UNUSED,
    ),
]
