"""Which processor a folder asks for.

A further family is an ImagePart and a TextPart in a file of this package, a line in each table here, and a
case in tests/golden/processors/make.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from jaxlab.errors import UserError
from jaxlab.processing import anyres, gemma3, idefics3, qwen, square, tiles
from jaxlab.processing.base import ImagePart, TextPart
from jaxlab.processing.settings import ProcessorSettings, shown


class ImageKind(NamedTuple):
    read: Callable[[ProcessorSettings], ImagePart]
    defaults: Mapping[str, Any]


class ProcessorFamily(NamedTuple):
    processor_class: str
    image_kind: str
    """The image processor of a folder that names none."""
    read: Callable[[ProcessorSettings, ProcessorSettings], TextPart]
    """From what the folder says of its processor and of its model."""
    always: Mapping[str, Any] = {}
    """Settings of the image processor that the family's processor overrules."""


IMAGE_KINDS: Mapping[str, ImageKind] = {
    "CLIPImageProcessor": ImageKind(square.Square.read, square.CLIP_DEFAULTS),
    "LlavaImageProcessor": ImageKind(partial(square.Square.read, pads=True), square.CLIP_DEFAULTS),
    "SiglipImageProcessor": ImageKind(square.Square.read, square.SIGLIP_DEFAULTS),
    "LlavaNextImageProcessor": ImageKind(anyres.AnyRes.read, anyres.NEXT_DEFAULTS),
    "LlavaOnevisionImageProcessor": ImageKind(
        partial(anyres.AnyRes.read, several_whole=True), anyres.ONEVISION_DEFAULTS
    ),
    "Qwen2VLImageProcessor": ImageKind(qwen.Patches.read, qwen.DEFAULTS),
    "Qwen2_5_VLImageProcessor": ImageKind(qwen.Patches.read, qwen.DEFAULTS),
    "GotOcr2ImageProcessor": ImageKind(tiles.Tiles.read, tiles.DEFAULTS),
    "Gemma3ImageProcessor": ImageKind(gemma3.PanAndScan.read, gemma3.DEFAULTS),
    "Idefics3ImageProcessor": ImageKind(idefics3.NamedTiles.read, idefics3.DEFAULTS),
}
"""By image_processor_type, without the ending that tells a backend."""

FAMILIES: Mapping[str, ProcessorFamily] = {
    "llava": ProcessorFamily("LlavaProcessor", "LlavaImageProcessor", square.LlavaText.read),
    "llava_next": ProcessorFamily("LlavaNextProcessor", "LlavaNextImageProcessor", anyres.NextText.read),
    "llava_onevision": ProcessorFamily(
        "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", anyres.OneVisionText.read
    ),
    "qwen2_vl": ProcessorFamily("Qwen2VLProcessor", "Qwen2VLImageProcessor", qwen.QwenText.read),
    "qwen2_5_vl": ProcessorFamily("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", qwen.QwenText.read),
    "qwen3_vl": ProcessorFamily("Qwen3VLProcessor", "Qwen2VLImageProcessor", qwen.QwenText.read),
    "qwen3_vl_moe": ProcessorFamily("Qwen3VLProcessor", "Qwen2VLImageProcessor", qwen.QwenText.read),
    "internvl": ProcessorFamily(
        "InternVLProcessor", "GotOcr2ImageProcessor", tiles.InternVLText.read, tiles.ALWAYS
    ),
    "paligemma": ProcessorFamily("PaliGemmaProcessor", "SiglipImageProcessor", square.PaliGemmaText.read),
    "gemma3": ProcessorFamily(
        "Gemma3Processor", "Gemma3ImageProcessor", gemma3.Gemma3Text.read, gemma3.ALWAYS
    ),
    "idefics3": ProcessorFamily("Idefics3Processor", "Idefics3ImageProcessor", idefics3.Idefics3Text.read),
}
"""By model_type."""


def find_family(settings: ProcessorSettings, model: ProcessorSettings) -> ProcessorFamily:
    """By the processor class of a folder, else by the type of its model.

    Raises:
      UserError: neither is known; the line lists what is supported.
    """
    name, _ = settings.find("processor_class")
    model_type, _ = model.find("model_type")
    for known, family in FAMILIES.items():
        if family.processor_class == name or (name is None and known == model_type):
            return family
    asked, place = (name or model_type), settings.layers[0][0]
    raise UserError(
        f"{place}: images for {shown(asked)} are not supported; supported are {', '.join(FAMILIES)}"
    )


def find_image_kind(settings: ProcessorSettings, family: ProcessorFamily) -> ImageKind:
    """By the image processor's type of a folder, else by the family.

    Raises:
      UserError: it is not known; the line lists what is supported.
    """
    name = settings.word("image_processor_type", family.image_kind)
    kind = IMAGE_KINDS.get(name.removesuffix("Fast").removesuffix("Pil"))
    if kind is None:
        where = settings.find("image_processor_type")[1]
        raise UserError(f"{where}: {shown(name)} is not supported; supported are {', '.join(IMAGE_KINDS)}")
    return kind
