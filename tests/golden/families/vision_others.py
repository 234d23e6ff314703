"""Cases of InternVL, PaliGemma, Gemma 3, Idefics2 and 3, Mistral3 and Mllama."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transformers as hf
from case import Case, Inputs
from vision_parts import (
    CLIP_PREFIX,
    IMAGE,
    IN_MEMORY,
    SIGLIP,
    TEXT,
    WITHOUT_PREFIX,
    Part,
    batch,
    image,
    pixels,
)


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
        name=name,
        model="InternVLForConditionalGeneration",
        config=config,
        awkward=awkward,
        inputs=inputs,
        prompt=prompt,
        special=(IMAGE,),
        layouts=[IN_MEMORY],
        **more,
    )


INTERNVL: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=34,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=24,
    patch_size=4,
)
INTERNVLS = [
    internvl(
        "internvl",
        "LayerNorms, biases in attention, layer scales, no norm at the end; untied Qwen2",
        lambda: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**INTERNVL, attention_bias=True),
            text_config=hf.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=9,
            tie_word_embeddings=False,
        ),
        no_effect=r"k_proj\.bias",
    ),
    internvl(
        "internvl_qk_norm",
        "RMSNorms, norms on queries and keys over the whole width, a LayerNorm "
        "at the end (use_mean_pooling off); tied "
        "Llama",
        lambda: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(
                **INTERNVL, use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False
            ),
            text_config=hf.LlamaConfig(**TEXT | {"tie_word_embeddings": True}),
            image_token_id=IMAGE,
            image_seq_length=9,
            tie_word_embeddings=True,
        ),
    ),
]

GEMMA: dict[str, Any] = dict(
    vocab_size=109,
    hidden_size=32,
    intermediate_size=44,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=256,
    num_hidden_layers=2,
)
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
        name=name,
        model="PaliGemmaForConditionalGeneration",
        awkward=awkward,
        inputs=inputs,
        prompt=prompt,
        config=lambda: hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
            text_config=text(),
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
            vocab_size=109,
        ),
        special=(IMAGE,),
        disk_names=CLIP_PREFIX,
        layouts=[WITHOUT_PREFIX, IN_MEMORY],
        embedding=0.12,
        centered_norms=GEMMA_NORMS,
        others={"no_token_type_ids": without_token_types},
        no_effect=r"k_proj\.bias",
    )


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
        "paligemma",
        "prefix seen both ways, suffix causal; Gemma 1 with one key/value head; SigLIP's last norm is used",
        lambda: hf.GemmaConfig(**GEMMA | {"num_key_value_heads": 1}),
    ),
    paligemma(
        "paligemma2",
        "Gemma 2 inside, windows of 8 shorter than the prefix, which is seen whole all the same; softcaps",
        lambda: hf.Gemma2Config(
            **GEMMA,
            sliding_window=8,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=2.0,
        ),
    ),
    Case(
        name="gemma3",
        model="Gemma3ForConditionalGeneration",
        awkward="6 x 6 patches pooled to 3 x 3; tokens of one image see each other "
        "both ways, in windows of 5 only those "
        "less than 5 back; two images in a row of the batch; sliding, full, sliding; tied",
        config=lambda: hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(
                **SIGLIP | {"image_size": 24, "patch_size": 4, "num_hidden_layers": 2}, vision_use_head=False
            ),
            text_config=hf.Gemma3TextConfig(
                **GEMMA | {"num_hidden_layers": 3},
                sliding_window=5,
                query_pre_attn_scalar=20,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
                },
            ),
            mm_tokens_per_image=9,
            image_token_index=IMAGE,
            boi_token_index=BEGIN_IMAGE,
            eoi_token_index=END_IMAGE,
        ),
        inputs=lambda generator: gemma3_inputs(generator, [[6, SEEN, 15], [4, SEEN, 2, SEEN, 4]], 3),
        prompt=lambda generator, long: gemma3_inputs(generator, [[3, SEEN, 4]], 1),
        special=(IMAGE, BEGIN_IMAGE, END_IMAGE),
        disk_names=CLIP_PREFIX,
        layouts=[WITHOUT_PREFIX, IN_MEMORY],
        embedding=0.12,
        centered_norms=GEMMA_NORMS,
        others={"no_token_type_ids": without_token_types},
        no_effect=r"k_proj\.bias",
    ),
]


def idefics3_inputs(
    generator: np.random.Generator, rows: Sequence[Sequence[Part]], counts: Sequence[int], height: int = 16
) -> Inputs:
    """The first row's first image fills `height` x 20 of its 24 x 24 pixels; rows with fewer hold zeros."""
    values = pixels(generator, len(counts), max(counts), 3, 24, 24)
    mask = np.ones((len(counts), max(counts), 24, 24), np.int64)
    mask[0, 0, height:] = 0
    mask[0, 0, :, 20:] = 0
    for row_, (count, _) in enumerate(zip(counts, rows, strict=True)):
        values[row_, count:] = 0
        mask[row_, count:] = 0
    values[0, 0] *= mask[0, 0]
    return batch(generator, rows, [IMAGE]) | {"pixel_values": values, "pixel_attention_mask": mask}


def idefics3(name: str, awkward: str, model: str, tokens: int, config: Callable[[], Any]) -> Case:
    seen = image(tokens)
    return Case(
        name=name,
        model=model,
        awkward=awkward,
        config=config,
        inputs=lambda generator: idefics3_inputs(
            generator, [[5, seen, 3, seen, 6], [9, seen, 5 + tokens]], [2, 1]
        ),
        prompt=lambda generator, long: idefics3_inputs(generator, [[3, seen, 4]], [1]),
        special=(IMAGE,),
        no_effect=r"k_proj\.bias",
    )


SIGLIP_24: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=34,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=24,
    patch_size=4,
)
IDEFICS3 = [
    idefics3(
        "idefics3",
        "an image that fills its tile in part: fractional positions and a mask "
        "on patches; 3 x 3 pixel shuffle; "
        "two images in one row, one and padding in the other; untied Llama",
        "Idefics3ForConditionalGeneration",
        4,
        lambda: hf.Idefics3Config(
            vision_config=dict(SIGLIP_24),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=3,
        ),
    ),
    idefics3(
        "smolvlm",
        "as idefics3, under another type; 2 x 2 pixel shuffle",
        "SmolVLMForConditionalGeneration",
        9,
        lambda: hf.SmolVLMConfig(
            vision_config=dict(SIGLIP_24),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
        ),
    ),
]


def mistral3_inputs(generator: np.random.Generator, rows: Sequence[Sequence[Part]], sizes: Any) -> Inputs:
    return batch(generator, rows, [IMAGE, IMAGE + 1, IMAGE + 2]) | {
        "pixel_values": pixels(generator, len(sizes), 3, 16, 24),
        "image_sizes": np.array(sizes),
    }


def idefics2() -> Any:
    return hf.Idefics2Config(
        vision_config=dict(
            hidden_size=24,
            intermediate_size=34,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=4,
        ),
        perceiver_config=dict(
            hidden_size=32,
            resampler_n_latents=5,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=6,
            num_key_value_heads=2,
        ),
        text_config=hf.MistralConfig(**TEXT, sliding_window=9),
        image_token_id=IMAGE,
    )


def mllama_inputs(generator: np.random.Generator) -> Inputs:
    """One image in each row, of 1 x 2 and of 1 x 1 tiles; its token stands in the text once."""
    length, tiles = 19, 2
    rows = batch(generator, [[4, image(1), 14], [9, image(1), 9]], [IMAGE])
    seen = np.zeros((2, length, 1, tiles), np.int64)
    seen[0, 4:], seen[1, 9:, :, 0] = 1, 1
    values = pixels(generator, 2, 1, tiles, 3, 16, 16)
    values[1, 0, 1] = 0
    return rows | {
        "pixel_values": values,
        "aspect_ratio_ids": np.array([[2], [1]]),
        "aspect_ratio_mask": np.array([[[1, 1]], [[1, 0]]]),
        "cross_attention_mask": seen,
    }


def mllama_prompt(generator: np.random.Generator, long: bool) -> Inputs:
    """An image of 2 x 1 tiles after a few tokens, which do not see it."""
    rows = batch(generator, [[3, image(1), 4]], [IMAGE])
    seen = np.zeros((1, 8, 1, 2), np.int64)
    seen[:, 3:] = 1
    return rows | {
        "pixel_values": pixels(generator, 1, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": np.array([[3]]),
        "aspect_ratio_mask": np.array([[[1, 1]]]),
        "cross_attention_mask": seen,
    }


KEYS = [
    Case(
        name="mistral3",
        model="Mistral3ForConditionalGeneration",
        awkward="Pixtral tower on images of two sizes with 2-D rotary positions, no "
        "biases; patches merged 2 x 2",
        config=lambda: hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(
                hidden_size=24,
                intermediate_size=34,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=24,
                patch_size=4,
            ),
            text_config=hf.MistralConfig(**TEXT, sliding_window=None),
            image_token_index=IMAGE,
            tie_word_embeddings=False,
        ),
        inputs=lambda generator: mistral3_inputs(
            generator,
            [[5, image(3), [IMAGE + 1], image(3), [IMAGE + 2], 8], [6, image(2), [IMAGE + 2], 12]],
            [(16, 24), (16, 8)],
        ),
        prompt=lambda generator, long: mistral3_inputs(generator, [[3, image(2), [IMAGE + 2], 4]], [(16, 8)]),
        special=(IMAGE, IMAGE + 1, IMAGE + 2),
        layouts=[IN_MEMORY],
    ),
    Case(
        name="idefics2",
        model="Idefics2ForConditionalGeneration",
        awkward="a perceiver with latents and grouped key/value heads between tower "
        "and Mistral; fractional positions; an image that ends within a patch, which is left out",
        config=idefics2,
        inputs=lambda generator: idefics3_inputs(
            generator, [[5, image(5), 3, image(5), 6], [9, image(5), 10]], [2, 1], 18
        ),
        prompt=lambda generator, long: idefics3_inputs(generator, [[3, image(5), 4]], [1], 18),
        special=(IMAGE,),
        no_effect=r"vision_model.*k_proj\.bias",
    ),
    Case(
        name="mllama",
        model="MllamaForConditionalGeneration",
        awkward="cross-attention layers 1 and 3 between self-attention layers, gated; "
        "8 more rows in the embedding than "
        "in the head; tiles with position embeddings, local and global layers",
        config=lambda: hf.MllamaConfig(
            vision_config=dict(
                hidden_size=24,
                intermediate_size=34,
                num_hidden_layers=3,
                num_global_layers=1,
                attention_heads=2,
                vision_output_dim=72,
                image_size=16,
                patch_size=4,
                max_num_tiles=2,
                intermediate_layers_indices=[0, 2],
                supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            ),
            text_config={k: v for k, v in TEXT.items() if k != "rope_theta"}
            | dict(
                num_hidden_layers=4,
                cross_attention_layers=[1, 3],
                pad_token_id=0,
                rope_theta=5000.0,
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            ),
            image_token_index=IMAGE,
        ),
        inputs=mllama_inputs,
        prompt=mllama_prompt,
        special=(IMAGE,),
        layouts=[IN_MEMORY],
    ),
]
