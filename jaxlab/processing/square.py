"""LLaVA-1.5 and PaliGemma (CLIP's and SigLIP's processors): every image becomes one of a fixed size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token
from jaxlab.processing.pixels import (
    CLIP,
    PLAIN,
    Pixels,
    Scale,
    center_crop,
    pad_to_square,
    read_resample,
    resize,
    size_of,
    target_size,
)
from jaxlab.processing.settings import ProcessorSettings, Size, shown

CLIP_DEFAULTS = {
    **CLIP,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
SIGLIP_DEFAULTS = {**PLAIN, "size": {"height": 224, "width": 224}}


@dataclass(frozen=True)
class Square(ImagePart):
    """Padded to a square if asked for, resized, cropped, normalised."""

    background: tuple[int, ...] | None
    """What a square is filled up with; None: images are not padded."""
    size: Size | None
    """None: images stay as large as they are."""
    resample: int
    crop: tuple[int, int] | None
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings, *, pads: bool = False, square: bool = False) -> "Square":
        """Read a folder's settings.

        Args:
          pads: `do_pad` means a square, as for LLaVA's own processor; CLIP's and SigLIP's have no such step.
          square: a size that is one number is the side of a square, not the length of the shortest edge.
        """
        size = settings.size("size", square=square) if settings.flag("do_resize") else None
        if size is not None and "shortest_edge" not in size and not {"height", "width"} <= set(size):
            raise UserError(
                f"{settings.find('size')[1]} needs shortest_edge, or height and width, is {shown(size)}"
            )
        background = None
        if pads and settings.flag("do_pad"):
            background = tuple(int(value * 255) for value in settings.per_channel("image_mean"))
        return cls(
            background=background,
            size=size,
            resample=read_resample(settings),
            crop=settings.rectangle("crop_size") if settings.flag("do_center_crop") else None,
            scale=Scale.read(settings),
        )

    def fit(self, image: Pixels) -> np.ndarray:
        """float32 [3, height, width] by the last steps, which all tiles of an image share."""
        if self.size is not None:
            image = resize(image, *target_size(*size_of(image), self.size), self.resample)
        return self.scale(image if self.crop is None else center_crop(image, *self.crop))

    def one(self, image: Pixels, alone: bool) -> One:
        size = size_of(image)
        if self.background is not None:
            image = pad_to_square(image, self.background)
        return One(self.fit(image)[None], size)

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [images, 3, height, width]."""
        return {"images": join([one.pixels for one in ones])}


def join(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Tiles of several images in one array."""
    shapes = {p.shape[1:] for p in pixels}
    if len(shapes) > 1:
        raise UserError(
            f"images end up in different sizes, {shown(sorted(shapes))}; give one, or a crop_size"
        )
    return np.concatenate(pixels)


@dataclass(frozen=True)
class LlavaText(TextPart):
    """<image> once for each patch."""

    patch_size: int
    additional: int
    """Tokens of the tower besides the patches, like CLIP's class token."""
    drops_first: bool
    """The decoder does not see the tower's first token."""
    tokens: ClassVar = {"image": Token(("image_token_index", "image_token_id"), "<image>")}
    separator: ClassVar = "\n"

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "LlavaText":
        vision = vision_settings(model)
        additional = settings.maybe_whole("num_additional_image_tokens", least=0)
        if additional is None:
            additional = int(vision.word("model_type", "") == "clip_vision_model")
        both = ProcessorSettings((*settings.layers, *model.layers))
        return cls(
            patch_size=ProcessorSettings((*settings.layers, *vision.layers)).whole("patch_size"),
            additional=additional,
            drops_first=both.word("vision_feature_select_strategy", "default") == "default",
        )

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        height, width = one.pixels.shape[-2:]
        count = (height // self.patch_size) * (width // self.patch_size) + self.additional - self.drops_first
        return words["image"] * count


@dataclass(frozen=True)
class PaliGemmaText(TextPart):
    """Image tokens, the first token, the prompt, a new line."""

    count: int
    tokens: ClassVar = {
        "image": Token(("image_token_index", "image_token_id"), "<image>"),
        "first": Token(("bos_token_id",), "<bos>"),
    }
    special_tokens: ClassVar = False

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "PaliGemmaText":
        return cls(settings.whole("image_seq_length", most=1 << 16))

    def finish(self, text: str, words: Mapping[str, str]) -> str:
        head, mark, tail = text.rpartition(words["image"])
        return f"{head}{mark}{words['first']}{tail}\n"

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        return words["image"] * self.count


def vision_settings(model: ProcessorSettings) -> ProcessorSettings:
    """The vision_config of a model's config.json."""
    place, config = model.layers[0]
    vision = config.get("vision_config")
    return ProcessorSettings(((f"{place}: vision_config", vision if isinstance(vision, dict) else {}),))


LLAVA = ProcessorKind("LlavaProcessor", "LlavaImageProcessor", LlavaText.read)
PALIGEMMA = ProcessorKind("PaliGemmaProcessor", "SiglipImageProcessor", PaliGemmaText.read)
