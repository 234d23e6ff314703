"""Gemma 3: an image is squeezed into a square; long ones, if asked for, are seen in crops besides."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token
from jaxlab.processing.pixels import PLAIN, Pixels, size_of
from jaxlab.processing.settings import ProcessorSettings
from jaxlab.processing.square import Square, join

DEFAULTS = {**PLAIN, "size": {"height": 224, "width": 224}, "resample": int(Image.Resampling.BILINEAR)}
ALWAYS = {
    "do_convert_rgb": True,
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
"""What Gemma 3's processor asks for, whatever the folder's image processor says."""


@dataclass(frozen=True)
class PanAndScan(ImagePart):
    square: Square
    crops: tuple[int, int, float] | None
    """Least side of a crop, most crops, least aspect of an image that is cropped; None: no crops."""

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "PanAndScan":
        crops = None
        if settings.flag("do_pan_and_scan"):
            crops = (
                settings.whole("pan_and_scan_min_crop_size"),
                settings.whole("pan_and_scan_max_num_crops", most=256),
                settings.number("pan_and_scan_min_ratio_to_activate"),
            )
        return cls(Square.read(settings, square=True), crops)

    def one(self, image: Pixels, alone: bool) -> One:
        parts = [image] if self.crops is None else [image, *crops_along(image, *self.crops)]
        return One(np.stack([self.square.fit(part) for part in parts]), size_of(image))

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [images and crops, 3, height, width]: each image, then its crops."""
        return {"images": join([one.pixels for one in ones])}


def crops_along(image: Pixels, least_side: int, most: int, least_aspect: float) -> list[Pixels]:
    """An image that is long enough, cut across its longer side into about as many squares as it holds."""
    height, width = image.shape[:2]
    long, short = max(height, width), min(height, width)
    if long / short < least_aspect:
        return []
    count = min(max(2, min(math.floor(long / short + 0.5), long // least_side)), most)
    step = math.ceil(long / count)
    if min(step, short) < least_side:
        return []
    cuts = [slice(step * k, step * (k + 1)) for k in range(count)]
    return [image[:, c] if width >= height else image[c] for c in cuts]


@dataclass(frozen=True)
class Gemma3Text(TextPart):
    """<start_of_image>, an image token so many times, <end_of_image>, apart from the text."""

    count: int
    tokens: ClassVar = {
        "mark": Token(("boi_token_index", "boi_token_id"), "<start_of_image>"),
        "image": Token(("image_token_index", "image_token_id"), "<image_soft_token>"),
        "end": Token(("eoi_token_index", "eoi_token_id"), "<end_of_image>"),
    }
    mark: ClassVar = "mark"

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "Gemma3Text":
        return cls(settings.maybe_whole("image_seq_length", most=1 << 16) or 256)

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        image = f"\n\n{words['mark']}{words['image'] * self.count}{words['end']}\n\n"
        crops = len(one.pixels) - 1
        if not crops:
            return image
        crops_follow = "and here are some crops to help you see better"
        return f"Here is the original image {image} {crops_follow} {' '.join([image] * crops)}"


GEMMA3 = ProcessorKind("Gemma3Processor", "Gemma3ImageProcessor", Gemma3Text.read, ALWAYS)
