"""Image processors by the name that a folder gives: several families share one.

A further one is an ImagePart in a file of this package, a line here, and a case in
tests/golden/processors/make.py.
"""

from collections.abc import Mapping
from functools import partial

from jaxlab.errors import UserError
from jaxlab.processing import anyres, gemma3, idefics2, idefics3, mllama, pixtral, qwen, square, tiles
from jaxlab.processing.base import ImageKind, ProcessorKind
from jaxlab.processing.settings import ProcessorSettings, shown

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
    "Idefics2ImageProcessor": ImageKind(idefics2.Quarters.read, idefics2.DEFAULTS),
    "PixtralImageProcessor": ImageKind(pixtral.WholeTokens.read, pixtral.DEFAULTS),
    "MllamaImageProcessor": ImageKind(mllama.Canvas.read, mllama.DEFAULTS),
    "SmolVLMImageProcessor": ImageKind(idefics3.NamedTiles.read, idefics3.DEFAULTS),
}
"""By image_processor_type, without the ending that tells a backend."""


def find_image_kind(settings: ProcessorSettings, kind: ProcessorKind) -> ImageKind:
    """By the image processor's type of a folder, else by the family.

    Raises:
      UserError: it is not known; the line lists what is supported.
    """
    if isinstance(kind.images, ImageKind):
        return kind.images
    name = settings.word("image_processor_type", kind.images)
    found = IMAGE_KINDS.get(name.removesuffix("Fast").removesuffix("Pil"))
    if found is None:
        where = settings.find("image_processor_type")[1]
        raise UserError(f"{where}: {shown(name)} is not supported; supported are {', '.join(IMAGE_KINDS)}")
    return found
