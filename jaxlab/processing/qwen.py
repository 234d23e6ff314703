"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: an image keeps about its size, in whole patches, as a list of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token, int32
from jaxlab.processing.pixels import CLIP, Pixels, Scale, read_resample, resize, size_of
from jaxlab.processing.settings import ProcessorSettings, shown

DEFAULTS = {
    **CLIP,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}

MOST_ASPECT = 200


@dataclass(frozen=True)
class Patches(ImagePart):
    """Patches in the order in which the tower merges them: those of one merged token follow each other."""

    resizes: bool
    pixels: tuple[int, int]
    """The least and most pixels of an image."""
    patch: int
    frames: int
    """Of a patch: an image stands still for that long."""
    merge: int
    resample: int
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "Patches":
        size = settings.size("size", square=False)
        least = settings.maybe_whole("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        most = settings.maybe_whole("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        if least is None or most is None or least > most:
            raise UserError(
                f"{settings.find('size')[1]} needs shortest_edge and longest_edge, least and most pixels, "
                f"is {shown(size)}"
            )
        return cls(
            resizes=settings.flag("do_resize"),
            pixels=(least, most),
            patch=settings.whole("patch_size", most=1024),
            frames=settings.whole("temporal_patch_size", most=64),
            merge=settings.whole("merge_size", most=64),
            resample=read_resample(settings),
            scale=Scale.read(settings),
        )

    def one(self, image: Pixels, alone: bool) -> One:
        size, unit = size_of(image), self.patch * self.merge
        if self.resizes:
            image = resize(image, *whole_patches(*size, unit, *self.pixels), self.resample)
        elif size[0] % unit or size[1] % unit:
            raise UserError(f"{size[1]} by {size[0]} pixels are not made of tokens of {unit} by {unit}")
        p, m = self.patch, self.merge
        rows, columns = image.shape[0] // p, image.shape[1] // p
        patches = (
            self.scale(image).reshape(3, rows // m, m, p, columns // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
        )
        patches = np.repeat(patches[:, :, :, :, :, None], self.frames, axis=5)
        return One(patches.reshape(rows * columns, -1), size, (rows, columns))

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [patches, 3 * frames * patch * patch], image_grid_thw int32 [images, 3]."""
        return {
            "images": np.concatenate([one.pixels for one in ones]),
            "image_grid_thw": int32([(1, *one.grid) for one in ones]),
        }


def whole_patches(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """The nearest multiples of `unit`, shrunk or grown together where the pixels are too many or too few."""
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise UserError(
            f"{width} by {height} pixels are longer than {MOST_ASPECT} times their other side; crop them"
        )
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit * unit > most:
        shrink = math.sqrt(height * width / most)
        rows = max(1, math.floor(height / shrink / unit))
        columns = max(1, math.floor(width / shrink / unit))
    elif rows * columns * unit * unit < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = math.ceil(height * grow / unit), math.ceil(width * grow / unit)
    return rows * unit, columns * unit


@dataclass(frozen=True)
class QwenText(TextPart):
    """<|image_pad|> once for each merged token; the prompt has vision's start and end around it."""

    merge: int
    tokens: ClassVar = {
        "image": Token(("image_token_id",), "<|image_pad|>"),
        "start": Token(("vision_start_token_id",), "<|vision_start|>"),
        "end": Token(("vision_end_token_id",), "<|vision_end|>"),
    }
    video: ClassVar = Token(("video_token_id",), "<|video_pad|>")

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "QwenText":
        return cls(settings.whole("merge_size", most=64))

    def lead(self, count: int, words: Mapping[str, str]) -> str:
        return (words["start"] + words["image"] + words["end"]) * count

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        return words["image"] * (one.grid[0] * one.grid[1] // self.merge**2)


QWEN2_VL = ProcessorKind("Qwen2VLProcessor", "Qwen2VLImageProcessor", QwenText.read)
QWEN2_5_VL = ProcessorKind("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", QwenText.read)
QWEN3_VL = ProcessorKind("Qwen3VLProcessor", "Qwen2VLImageProcessor", QwenText.read)
