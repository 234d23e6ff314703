"""Cases of vision-language models."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transformers as hf
from case import Case, Inputs

TEXT: dict[str, Any] = dict(
    vocab_size=109, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=44, max_position_embeddings=256, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLIP: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=34, num_hidden_layers=3, num_attention_heads=2, image_size=20,
    patch_size=5, projection_dim=16,
)  # fmt: skip
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
        [r"^(vision_tower|multi_modal_projector)\.", r"model.\1."],
        [r"^image_newline$", "model.image_newline"],
    ],
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


def llava(name: str, awkward: str, config: Callable[[], Any], placeholders: int, **more: Any) -> Case:
    """One image in each row, in the middle of the text, at other places."""
    image = [IMAGE] * placeholders

    def inputs(generator: np.random.Generator) -> Inputs:
        rows = batch(generator, [[6, image, 9], [11, image, 4]], [IMAGE])
        return rows | {"pixel_values": pixels(generator, 2, 3, 20, 20)}

    def prompt(generator: np.random.Generator, long: bool) -> Inputs:
        return batch(generator, [[3, image, 4]], [IMAGE]) | {"pixel_values": pixels(generator, 1, 3, 20, 20)}

    return Case(
        name=name, model="LlavaForConditionalGeneration", config=config, awkward=awkward, inputs=inputs,
        prompt=prompt, special=(IMAGE,), disk_names=CLIP_PREFIX, layouts=[WITHOUT_PREFIX, IN_MEMORY], **more,
    )  # fmt: skip


CLIP_UNUSED = r"vision_tower\.vision_model\.(post_layernorm|encoder\.layers\.2|.*k_proj\.bias)"
LLAVAS = [
    llava(
        "llava",
        "CLIP with class token, the last but one layer's output without it; Llama with odd vocabulary",
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**TEXT),
            image_token_index=IMAGE, image_seq_length=16,
        ),
        16, no_effect=CLIP_UNUSED,
    ),
    llava(
        "llava_siglip",
        "SigLIP with a pooling head that is not used; two layers' outputs side by side, in no order, all tokens; "
        "Mistral with a window shorter than an image; projector without biases, tanh; tied head",
        lambda: hf.LlavaConfig(
            vision_config=hf.SiglipVisionConfig(**SIGLIP),
            text_config=hf.MistralConfig(**TEXT | {"sliding_window": 9, "tie_word_embeddings": True}),
            image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=[-1, 1],
            vision_feature_select_strategy="full", multimodal_projector_bias=False,
            projector_hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
        ),
        16, no_effect=r"vision_tower\.vision_model\.(post_layernorm|head\.|.*k_proj\.bias)",
    ),
]  # fmt: skip
NEXT = CLIP | {"image_size": 16, "patch_size": 4}
PINPOINTS = [[16, 32], [32, 16], [16, 48], [48, 16], [32, 32]]


def tiled(kind: str, name: str, awkward: str, config: Callable[[], Any], rows: Sequence[Sequence[Part]],
          sizes: Sequence[tuple[int, int]], tiles: int, prompt: Sequence[Part], prompt_size: tuple[int, int],
          counts: Sequence[int] | None = None, **more: Any) -> Case:  # fmt: skip
    """Images cut into tiles; pixel_values [images, tiles, 3, 16, 16], tiles that an image lacks hold noise."""
    special = [IMAGE, IMAGE + 1]

    def inputs(generator: np.random.Generator) -> Inputs:
        found = batch(generator, rows, special) | {
            "pixel_values": pixels(generator, len(sizes), tiles, 3, 16, 16), "image_sizes": np.array(sizes)
        }  # fmt: skip
        return found if counts is None else found | {"batch_num_images": np.array(counts)}

    def one(generator: np.random.Generator, long: bool) -> Inputs:
        return batch(generator, [prompt], special) | {
            "pixel_values": pixels(generator, 1, tiles, 3, 16, 16), "image_sizes": np.array([prompt_size])
        }  # fmt: skip

    return Case(
        name=name, model=f"{kind}ForConditionalGeneration", config=config, awkward=awkward, inputs=inputs,
        prompt=one, special=tuple(special), disk_names=CLIP_PREFIX, layouts=[WITHOUT_PREFIX, IN_MEMORY], **more,
    )  # fmt: skip


def image(tokens: int) -> list[int]:
    return [IMAGE] * tokens


def onevision(**settings: Any) -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP | {"image_size": 16, "patch_size": 4}, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT), image_token_index=IMAGE, video_token_index=IMAGE + 1,
        image_grid_pinpoints=PINPOINTS, **settings,
    )  # fmt: skip


SIGLIP_UNUSED = r"vision_tower\.vision_model\.(post_layernorm|.*k_proj\.bias)"
TILED = [
    tiled(
        "LlavaNext", "llava_next",
        "images 10 x 47 (tiles 1 x 3, one row of patches cut above and below) and 31 x 9 (tiles 2 x 1, a column cut "
        "at each side, one tile of noise); image_newline after each row of patches; Mistral",
        lambda: hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**NEXT), text_config=hf.MistralConfig(**TEXT),
            image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, image_seq_length=16,
        ),
        [[5, image(42), 7], [9, image(40), 5]], [(10, 47), (31, 9)], 4, [3, image(40), 4], (31, 9),
        no_effect=CLIP_UNUSED,
    ),
    tiled(
        "LlavaOnevision", "llava_onevision",
        "images 32 x 24 (tiles 2 x 2; 8 x 8 patches, cut to 8 x 6, shrunk bilinearly to 6 x 4) and 10 x 47; anyres_max_2",
        lambda: onevision(vision_aspect_ratio="anyres_max_2"),
        [[5, image(46), 6], [8, image(42), 7]], [(32, 24), (10, 47)], 5, [3, image(42), 4], (10, 47),
        no_effect=SIGLIP_UNUSED,
    ),
    tiled(
        "LlavaOnevision", "llava_onevision_multi",
        "batch_num_images: a row with two images takes only the first tile of each, with one newline; anyres_max_9",
        lambda: onevision(),
        [[5, image(42), 6], [8, image(17), 5, image(17), 6]], [(10, 47), (32, 31), (10, 47)], 5,
        [3, image(42), 4], (10, 47), counts=[1, 2], no_effect=SIGLIP_UNUSED,
    ),
]  # fmt: skip
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


def qwen(kind: str, name: str, awkward: str, config: Callable[[], Any], grids: Sequence[tuple[int, int]],
         **more: Any) -> Case:  # fmt: skip
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
        name=name, model=f"{kind}ForConditionalGeneration", config=config, awkward=awkward, inputs=inputs,
        prompt=prompt, special=tuple(QWEN_SPECIAL), **more,
    )  # fmt: skip


QWENS = [
    qwen(
        "Qwen2VL", "qwen2_vl",
        "images of three sizes, two in a row; M-RoPE sections 1, 3, 2; tied; LayerNorms and quick_gelu in the tower",
        lambda: hf.Qwen2VLConfig(
            text_config=QWEN_TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 3, 2]},
                                     "rope_theta": 5000.0},
            vision_config=dict(depth=2, embed_dim=24, hidden_size=48, num_heads=2, mlp_ratio=2, patch_size=4),
            tie_word_embeddings=True, **QWEN,
        ),
        [(4, 6), (8, 2), (2, 4)], layouts=[QWEN_IN_MEMORY],
    ),
    qwen(
        "Qwen2_5_VL", "qwen2_5_vl",
        "windows of 2 x 2 merged patches that do not divide the images, full attention in blocks 1 and 3; RMSNorms "
        "and gated MLP with biases in the tower; untied; text layer 1 in a window of 9",
        lambda: hf.Qwen2_5_VLConfig(
            text_config=QWEN_TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
                                     "rope_theta": 5000.0, "use_sliding_window": True, "sliding_window": 9,
                                     "max_window_layers": 1},
            vision_config=dict(depth=4, hidden_size=24, out_hidden_size=48, num_heads=2, intermediate_size=30,
                               patch_size=4, window_size=16, fullatt_block_indexes=[1, 3]),
            **QWEN,
        ),
        [(6, 10), (8, 4), (2, 6)], layouts=[QWEN_IN_MEMORY],
    ),
    qwen(
        "Qwen3VL", "qwen3_vl",
        "DeepStack from blocks 1 and 0 (in that order) to text layers 0 and 1; positions interpolated from 5 x 5; "
        "interleaved M-RoPE with sections 2, 2, 1; norms on queries and keys, head_dim 10; tied",
        lambda: hf.Qwen3VLConfig(
            text_config=QWEN_TEXT | {"head_dim": 10, "num_hidden_layers": 3, "rope_theta": 5000.0,
                                     "rope_scaling": {"mrope_section": [2, 2, 1], "mrope_interleaved": True,
                                                      "rope_type": "default"}},
            vision_config=dict(depth=3, hidden_size=24, out_hidden_size=48, num_heads=2, intermediate_size=30,
                               patch_size=4, num_position_embeddings=25, deepstack_visual_indexes=[1, 0]),
            tie_word_embeddings=True, **QWEN,
        ),
        [(4, 6), (8, 2), (2, 4)],
    ),
]  # fmt: skip


def internvl(name: str, awkward: str, config: Callable[[], Any], **more: Any) -> Case:
    """Images of 24 x 24 pixels, 6 x 6 patches, 3 x 3 tokens; the second row has two."""

    def inputs(generator: np.random.Generator) -> Inputs:
        rows = batch(generator, [[6, image(9), 16], [5, image(9), 3, image(9), 5]], [IMAGE])
        return rows | {"pixel_values": pixels(generator, 3, 3, 24, 24)}

    def prompt(generator: np.random.Generator, long: bool) -> Inputs:
        return batch(generator, [[3, image(9), 4]], [IMAGE]) | {
            "pixel_values": pixels(generator, 1, 3, 24, 24)
        }

    return Case(
        name=name, model="InternVLForConditionalGeneration", config=config, awkward=awkward, inputs=inputs,
        prompt=prompt, special=(IMAGE,), layouts=[IN_MEMORY], **more,
    )  # fmt: skip


INTERNVL: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=34, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4,
)  # fmt: skip
INTERNVLS = [
    internvl(
        "internvl", "LayerNorms, biases in attention, layer scales, no norm at the end; untied Qwen2",
        lambda: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**INTERNVL, attention_bias=True),
            text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=9,
            tie_word_embeddings=False,
        ),
        no_effect=r"k_proj\.bias",
    ),
    internvl(
        "internvl_qk_norm",
        "RMSNorms, norms on queries and keys over the whole width, a LayerNorm at the end (use_mean_pooling off); tied "
        "Llama",
        lambda: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(
                **INTERNVL, use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False
            ),
            text_config=hf.LlamaConfig(**TEXT | {"tie_word_embeddings": True}), image_token_id=IMAGE,
            image_seq_length=9, tie_word_embeddings=True,
        ),
    ),
]  # fmt: skip

GEMMA: dict[str, Any] = dict(
    vocab_size=109, hidden_size=32, intermediate_size=44, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    max_position_embeddings=256, num_hidden_layers=2,
)  # fmt: skip
GEMMA_NORMS = r"language_model\..*norm|mm_soft_emb_norm"


def without_token_types(inputs: Inputs) -> Inputs:
    return {key: value for key, value in inputs.items() if key != "token_type_ids"}


def paligemma(name: str, awkward: str, text: Callable[[], Any]) -> Case:
    """token_type_ids: 0 in the prefix (image and prompt), 1 in the suffix."""
    suffixes = (6, 3)

    def inputs(generator: np.random.Generator) -> Inputs:
        rows = batch(generator, [[image(16), 5, suffixes[0]], [2, image(16), 6, suffixes[1]]], [IMAGE])
        kinds = np.zeros_like(rows["input_ids"])
        for row_, suffix in zip(kinds, suffixes, strict=True):
            row_[-suffix:] = 1
        return rows | {"pixel_values": pixels(generator, 2, 3, 20, 20), "token_type_ids": kinds}

    def prompt(generator: np.random.Generator, long: bool) -> Inputs:
        rows = batch(generator, [[image(16), 7]], [IMAGE])
        kinds = np.zeros_like(rows["input_ids"])
        return rows | {"pixel_values": pixels(generator, 1, 3, 20, 20), "token_type_ids": kinds}

    return Case(
        name=name, model="PaliGemmaForConditionalGeneration", awkward=awkward, inputs=inputs, prompt=prompt,
        config=lambda: hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**SIGLIP, vision_use_head=False), text_config=text(),
            image_token_index=IMAGE, projection_dim=32, hidden_size=32, vocab_size=109,
        ),
        special=(IMAGE,), disk_names=CLIP_PREFIX, layouts=[WITHOUT_PREFIX, IN_MEMORY], embedding=0.12,
        centered_norms=GEMMA_NORMS, others={"no_token_type_ids": without_token_types}, no_effect=r"k_proj\.bias",
    )  # fmt: skip


BEGIN_IMAGE, END_IMAGE = 79, 80


def gemma3_inputs(generator: np.random.Generator, rows: Sequence[Sequence[Part]], images: int) -> Inputs:
    found = batch(generator, rows, [IMAGE, BEGIN_IMAGE, END_IMAGE])
    return found | {
        "pixel_values": pixels(generator, images, 3, 24, 24),
        "token_type_ids": (found["input_ids"] == IMAGE).astype(np.int64),
    }


SEEN = [BEGIN_IMAGE, *image(9), END_IMAGE]
GEMMAS = [
    paligemma(
        "paligemma", "prefix seen both ways, suffix causal; Gemma 1 with one key/value head; SigLIP's last norm is used",
        lambda: hf.GemmaConfig(**GEMMA | {"num_key_value_heads": 1}),
    ),
    paligemma(
        "paligemma2", "Gemma 2 inside, windows of 8 shorter than the prefix, which is seen whole all the same; softcaps",
        lambda: hf.Gemma2Config(**GEMMA, sliding_window=8, query_pre_attn_scalar=20, attn_logit_softcapping=4.0,
                                final_logit_softcapping=2.0),
    ),
    Case(
        name="gemma3", model="Gemma3ForConditionalGeneration",
        awkward="6 x 6 patches pooled to 3 x 3; tokens of one image see each other both ways, in windows of 5 only those "
        "less than 5 back; two images in a row of the batch; sliding, full, sliding; tied",
        config=lambda: hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(
                **SIGLIP | {"image_size": 24, "patch_size": 4, "num_hidden_layers": 2}, vision_use_head=False
            ),
            text_config=hf.Gemma3TextConfig(
                **GEMMA | {"num_hidden_layers": 3}, sliding_window=5, query_pre_attn_scalar=20,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
                },
            ),
            mm_tokens_per_image=9, image_token_index=IMAGE, boi_token_index=BEGIN_IMAGE, eoi_token_index=END_IMAGE,
        ),
        inputs=lambda generator: gemma3_inputs(generator, [[6, SEEN, 15], [4, SEEN, 2, SEEN, 4]], 3),
        prompt=lambda generator, long: gemma3_inputs(generator, [[3, SEEN, 4]], 1),
        special=(IMAGE, BEGIN_IMAGE, END_IMAGE), disk_names=CLIP_PREFIX, layouts=[WITHOUT_PREFIX, IN_MEMORY],
        embedding=0.12, centered_norms=GEMMA_NORMS, others={"no_token_type_ids": without_token_types},
        no_effect=r"k_proj\.bias",
    ),
]  # fmt: skip


def idefics3_inputs(
    generator: np.random.Generator, rows: Sequence[Sequence[Part]], counts: Sequence[int]
) -> Inputs:
    """The first image of the first row shows 16 x 20 of its 24 x 24 pixels; rows with fewer images hold zeros."""
    values = pixels(generator, len(counts), max(counts), 3, 24, 24)
    mask = np.ones((len(counts), max(counts), 24, 24), np.int64)
    mask[0, 0, 16:] = 0
    mask[0, 0, :, 20:] = 0
    for row_, (count, _) in enumerate(zip(counts, rows, strict=True)):
        values[row_, count:] = 0
        mask[row_, count:] = 0
    values[0, 0] *= mask[0, 0]
    return batch(generator, rows, [IMAGE]) | {"pixel_values": values, "pixel_attention_mask": mask}


IDEFICS3 = [
    Case(
        name="idefics3", model="Idefics3ForConditionalGeneration",
        awkward="an image that fills its tile in part: fractional positions and a mask on patches; 3 x 3 pixel shuffle; "
        "two images in one row, one and padding in the other; untied Llama",
        config=lambda: hf.Idefics3Config(
            vision_config=dict(hidden_size=24, intermediate_size=34, num_hidden_layers=2, num_attention_heads=2,
                               image_size=24, patch_size=4),
            text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=3,
        ),
        inputs=lambda generator: idefics3_inputs(generator, [[5, image(4), 3, image(4), 6], [9, image(4), 9]], [2, 1]),
        prompt=lambda generator, long: idefics3_inputs(generator, [[3, image(4), 4]], [1]),
        special=(IMAGE,), no_effect=r"k_proj\.bias",
    ),
]  # fmt: skip
VISION = {c.name: c for c in [*LLAVAS, *TILED, *QWENS, *INTERNVLS, *GEMMAS, *IDEFICS3]}
