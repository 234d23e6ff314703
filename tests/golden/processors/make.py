"""Golden batches of transformers' processors (their Pillow backend) for tests/processing/test_golden.py.

    python3.11 -m venv env && env/bin/pip install transformers==5.24.0 pillow==13.0.0
    env/bin/python tests/golden/processors/make.py

Writes beside this file: a few awkward images, a tokenizer of single bytes that all cases share, cases.json
(the files of each case's folder, its prompt and images) and batches.npz (what the processor makes of them).
transformers is run, not copied.
"""

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, processing_utils

HERE = Path(__file__).parent
WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "<|image|>",
]
IDS = {word: 257 + k for k, word in enumerate(WORDS)}
TOKEN_NAMES = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "image_token": "<image_soft_token>",
        "eoi_token": "<end_of_image>",
    },
    "paligemma": {"image_token": "<image>"},
}
WITHOUT_FIRST = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
RENAMED = {"input_ids": "tokens", "pixel_values": "images"}
MODULES = {"mistral3": "pixtral"}
"""Where transformers has a family's processor, if not under the name of the family."""
UNUSED = ("attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "num_crops")


def make_tokenizer(first: bool) -> Tokenizer:
    """Bytes, two new lines as one token, the words above; `first`: <bos> before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: k for k, letter in enumerate(letters)} | {"ĊĊ": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in WORDS])
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", IDS["<bos>"])]
        )
    return tokenizer


def make_images() -> None:
    rng = np.random.default_rng(0)

    def smooth(width: int, height: int, channels: int) -> Image.Image:
        coarse = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, channels), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    turned = Image.Exif()
    turned[0x0112] = 6
    smooth(61, 23, 3).save(HERE / "turned.png", exif=turned)
    smooth(67, 24, 3).save(HERE / "wide.png")
    smooth(19, 52, 4).save(HERE / "transparent.png")
    smooth(40, 40, 3).convert("L").save(HERE / "gray.png")
    smooth(33, 47, 3).quantize(16).save(HERE / "palette.png", transparency=3)


def case(family: str, text: str, images: list[str], around: dict, pixels: dict, model: dict, **more) -> dict:
    """`around`: processor_config.json; `pixels`: the image processor's settings; `model`: config.json."""
    return {
        "family": family,
        "text": text,
        "images": images,
        "processor": around,
        "preprocessor": pixels,
        "config": {"model_type": family, **model},
        "overrides": {},
        "opened": False,
        "nested": False,
        **more,
    }


LLAVA = {"image_token_index": IDS["<image>"]}
QWEN = {
    "image_token_id": IDS["<|image_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
GEMMA = {
    "image_token_index": IDS["<image_soft_token>"],
    "boi_token_index": IDS["<start_of_image>"],
    "eoi_token_index": IDS["<end_of_image>"],
}
PINS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
ALL = ["turned.png", "wide.png", "transparent.png", "gray.png", "palette.png"]

CASES = {
    "llava": case(
        "llava",
        "<image>\nOne <image> two",
        ["wide.png", "transparent.png"],
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 18},
            "crop_size": {"height": 18, "width": 18},
        },
        LLAVA,
    ),
    "llava_padded": case(
        "llava",
        "<image>" * 5,
        ALL,
        {"patch_size": 5, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
        {
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
            "size": {"height": 17, "width": 15},
            "crop_size": {"height": 16, "width": 20},
            "resample": 2,
        },
        LLAVA,
        opened=True,
        nested=True,
    ),
    "llava_next": case(
        "llava_next",
        "a<image>b<image>c<image>",
        ["turned.png", "wide.png", "gray.png"],
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 12},
            "crop_size": {"height": 12, "width": 12},
            "image_grid_pinpoints": PINS,
        },
        LLAVA,
    ),
    "llava_onevision": case(
        "llava_onevision",
        "<image>\nWhat?",
        ["turned.png"],
        {
            "num_image_tokens": 9,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        },
        {
            "image_processor_type": "LlavaOnevisionImageProcessorFast",
            "size": {"height": 12, "width": 12},
            "image_grid_pinpoints": [*PINS, [36, 36], [48, 24]],
        },
        LLAVA,
    ),
    "llava_onevision_several": case(
        "llava_onevision",
        "<image>\n<image>\nWhat?",
        ["wide.png", "palette.png"],
        {
            "num_image_tokens": 9,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 12, "width": 12},
            "image_grid_pinpoints": PINS,
        },
        LLAVA,
        nested=True,
    ),
    "qwen2_vl": case(
        "qwen2_vl",
        f"{VISION}Is it {VISION}?",
        ["turned.png", "transparent.png"],
        {},
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 256,
            "max_pixels": 900,
            "patch_size": 4,
            "merge_size": 2,
        },
        QWEN,
    ),
    "qwen2_5_vl": case(
        "qwen2_5_vl",
        f"{VISION}{VISION}{VISION}",
        ["gray.png", "palette.png", "wide.png"],
        {},
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "min_pixels": 900,
            "max_pixels": 2500,
            "patch_size": 3,
            "merge_size": 3,
            "temporal_patch_size": 2,
        },
        QWEN,
    ),
    "qwen3_vl": case(
        "qwen3_vl",
        f"One{VISION}",
        ["transparent.png"],
        {},
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 300, "longest_edge": 1500},
            "patch_size": 4,
            "merge_size": 2,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.5, 0.2, 0.3],
        },
        QWEN,
        opened=True,
        nested=True,
    ),
    "internvl": case(
        "internvl",
        "<IMG_CONTEXT>\nLong? <IMG_CONTEXT>",
        ["wide.png", "gray.png"],
        {"image_seq_length": 3},
        {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 14, "width": 14},
            "crop_to_patches": False,
            "max_patches": 6,
        },
        {"image_token_id": IDS["<IMG_CONTEXT>"]},
    ),
    "paligemma": case(
        "paligemma",
        "caption en",
        ["palette.png"],
        {},
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 20, "width": 20},
            "image_seq_length": 4,
        },
        {**LLAVA, "text_config": {"bos_token_id": IDS["<bos>"]}},
    ),
    "paligemma_marked": case(
        "paligemma",
        "<image>answer en",
        ["turned.png"],
        {},
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 20, "width": 18},
            "image_seq_length": 4,
        },
        {**LLAVA, "bos_token_id": IDS["<bos>"]},
        nested=True,
    ),
    "gemma3": case(
        "gemma3",
        "<start_of_image>Compare.<start_of_image>",
        ["wide.png", "transparent.png"],
        {"image_seq_length": 4},
        {
            "image_processor_type": "Gemma3ImageProcessorFast",
            "size": {"height": 15, "width": 15},
            "do_convert_rgb": None,
            "do_pan_and_scan": True,
        },
        GEMMA,
    ),
    "gemma3_crops": case(
        "gemma3",
        "<start_of_image>Compare.<start_of_image>",
        ["wide.png", "gray.png"],
        {"image_seq_length": 4},
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 15, "width": 15}},
        GEMMA,
        overrides={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 10},
    ),
    "idefics3": case(
        "idefics3",
        "User:<image>and<image>Why?",
        ["transparent.png", "wide.png"],
        {"image_seq_len": 2},
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 31},
            "max_image_size": {"longest_edge": 12},
        },
        {"image_token_id": IDS["<image>"]},
    ),
    "idefics3_whole": case(
        "idefics3",
        "<image>Why?",
        ["turned.png"],
        {"image_seq_len": 3},
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 40},
            "do_image_splitting": False,
            "max_image_size": {"longest_edge": 14},
        },
        {"image_token_id": IDS["<image>"]},
        nested=True,
    ),
    "internvl_imagenet": case(
        "internvl",
        "<IMG_CONTEXT>\nWhat? <IMG_CONTEXT>\n",
        ["turned.png", "palette.png"],
        {"image_seq_length": 4},
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 16, "width": 16},
            "max_patches": 12,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        {"image_token_id": IDS["<IMG_CONTEXT>"]},
    ),
    "smolvlm": case(
        "smolvlm",
        "User:<image>and<image>Why?",
        ["gray.png", "wide.png"],
        {"image_seq_len": 2},
        {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 33},
            "max_image_size": {"longest_edge": 12},
        },
        {"image_token_id": IDS["<image>"]},
    ),
    "idefics2": case(
        "idefics2",
        "User:<image><image>Why? <image>",
        ["turned.png", "wide.png", "transparent.png"],
        {"image_seq_len": 3},
        {"image_processor_type": "Idefics2ImageProcessor", "size": {"shortest_edge": 14, "longest_edge": 45}},
        {"image_token_id": IDS["<image>"]},
    ),
    "idefics2_split": case(
        "idefics2",
        "<image>Why?",
        ["turned.png"],
        {"image_seq_len": 2},
        {
            "image_processor_type": "Idefics2ImageProcessorFast",
            "size": {"shortest_edge": 9, "longest_edge": 30},
            "do_image_splitting": True,
        },
        {"image_token_id": IDS["<image>"]},
        nested=True,
    ),
    "mistral3": case(
        "mistral3",
        "[INST]One [IMG] two [IMG][IMG]",
        ["turned.png", "wide.png", "gray.png"],
        {"patch_size": 4, "spatial_merge_size": 2},
        {"image_processor_type": "PixtralImageProcessorFast", "size": {"longest_edge": 50}, "patch_size": 4},
        {"image_token_index": IDS["[IMG]"]},
    ),
    "mllama": case(
        "mllama",
        "<|image|>What?<|image|><|image|>And",
        ["wide.png", "transparent.png", "gray.png"],
        {},
        {
            "image_processor_type": "MllamaImageProcessor",
            "size": {"height": 15, "width": 15},
            "max_image_tiles": 4,
        },
        {"image_token_index": IDS["<|image|>"], "text_config": {"bos_token_id": IDS["<bos>"]}},
    ),
    "mllama_small": case(
        "mllama",
        "Is <|image|> it?",
        ["palette.png"],
        {},
        {
            "image_processor_type": "MllamaImageProcessorFast",
            "size": {"height": 60, "width": 60},
            "max_image_tiles": 3,
        },
        {"image_token_index": IDS["<|image|>"], "bos_token_id": IDS["<bos>"]},
        nested=True,
    ),
}


def build(case: dict) -> processing_utils.ProcessorMixin:
    """transformers' processor of a case, with Pillow underneath."""
    name = {
        "Qwen2VL": "qwen2_vl",
        "GotOcr2": "got_ocr2",
        "CLIP": "clip",
        "LlavaNext": "llava_next",
        "LlavaOnevision": "llava_onevision",
        "SmolVLM": "smolvlm",
    }
    kind = case["preprocessor"]["image_processor_type"].removesuffix("Fast").removesuffix("ImageProcessor")
    module = name.get(kind, kind.lower())
    pixels = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    settings = {k: v for k, v in case["preprocessor"].items() if k != "image_processor_type"}
    family = case["family"]
    name = MODULES.get(family, family)
    if name == "pixtral":  # it takes a function from the module that needs torchvision; Pillow's has it too
        sys.modules["transformers.models.pixtral.image_processing_pixtral"] = pixels
    processor = import_module(f"transformers.models.{name}.processing_{name}")
    vars(processor)["num2words"] = str  # SmolVLM's wants it for videos
    (class_name,) = (n for n in processor.__all__ if n.endswith("Processor"))
    case["processor"]["processor_class"] = class_name
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(family not in WITHOUT_FIRST),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=TOKEN_NAMES.get(family, {}),
    )
    around = {k: v for k, v in case["processor"].items() if k != "processor_class"}
    image_processor = getattr(pixels, f"{kind}ImageProcessorPil")(**settings)
    if family == "smolvlm":
        around["video_processor"] = None
    return getattr(processor, class_name)(image_processor=image_processor, tokenizer=tokenizer, **around)


def main() -> None:
    # No video processor is needed, and without torchvision there is none.
    processing_utils.ProcessorMixin.check_argument_for_proper_class = lambda self, name, value: None
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    make_images()
    for name, first in (("tokenizer.json", True), ("tokenizer_plain.json", False)):
        make_tokenizer(first).save(str(HERE / name), pretty=False)
    arrays = {}
    for name, case in CASES.items():
        images = [str(HERE / image) for image in case["images"]]
        if case["opened"]:
            images = [Image.open(image) for image in images]
        nested = case["family"] in ("llava_onevision", "gemma3", "idefics3", "smolvlm", "idefics2", "mllama")
        batch = build(case)(
            text=case["text"], images=[images] if nested else images, return_tensors="np", **case["overrides"]
        )
        for key, value in batch.items():
            if key not in UNUSED:
                arrays[f"{name}.{RENAMED.get(key, key)}"] = np.asarray(value)
        case["tokenizer"] = "tokenizer_plain.json" if case["family"] in WITHOUT_FIRST else "tokenizer.json"
        print(name, {k: np.shape(v) for k, v in batch.items() if k not in UNUSED})
    made = {"transformers": transformers.__version__, "cases": CASES}
    (HERE / "cases.json").write_text(json.dumps(made, indent=1) + "\n")
    np.savez_compressed(HERE / "batches.npz", **arrays)


if __name__ == "__main__":
    main()
