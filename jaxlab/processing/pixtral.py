"""Mistral 3 (Pixtral's processor): an image keeps its aspect, in whole tokens, whose rows have ends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token, int32
from jaxlab.processing.pixels import CLIP, Pixels, Scale, check_pixels, read_resample, resize, size_of
from jaxlab.processing.settings import ProcessorSettings, shown

DEFAULTS = {**CLIP, "size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}}


@dataclass(frozen=True)
class WholeTokens(ImagePart):
    most: tuple[int, int] | None
    """(height, width) into which images are shrunk; None: images are not resized."""
    unit: int
    """Pixels a side of a token."""
    resample: int
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "WholeTokens":
        most = None
        if settings.flag("do_resize"):
            size = settings.size("size", square=True)
            longest = size.get("longest_edge", 0)
            most = (longest, longest) if longest else (size.get("height", 0), size.get("width", 0))
            if 0 in most:
                where = settings.find("size")[1]
                raise UserError(f"{where} needs longest_edge, or height and width, is {shown(size)}")
        if settings.flag("do_center_crop"):
            raise UserError(f"{settings.find('do_center_crop')[1]} is not supported by this processor")
        height, width = settings.rectangle("patch_size")
        if height != width:
            raise UserError(f"{settings.find('patch_size')[1]} must be a square, is {height} by {width}")
        return cls(most, height, read_resample(settings), Scale.read(settings))

    def one(self, image: Pixels, alone: bool) -> One:
        size = size_of(image)
        if self.most is not None:
            image = resize(image, *whole_tokens(*size, self.most, self.unit), self.resample)
        elif size[0] % self.unit or size[1] % self.unit:
            raise UserError(f"{size[1]} by {size[0]} pixels are not made of tokens of {self.unit} pixels")
        grid = image.shape[0] // self.unit, image.shape[1] // self.unit
        return One(self.scale(image)[None], size, grid)

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [images, 3, most height, most width], zeros beside an image; image_sizes int32
        [images, 2], of the images as they are in it."""
        sizes = [one.pixels.shape[-2:] for one in ones]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        check_pixels(height, width)
        filled = [
            np.pad(one.pixels, [(0, 0), (0, 0), (0, height - h), (0, width - w)])
            for one, (h, w) in zip(ones, sizes, strict=True)
        ]
        return {"images": np.concatenate(filled), "image_sizes": int32(sizes)}


def whole_tokens(height: int, width: int, most: tuple[int, int], unit: int) -> tuple[int, int]:
    """(height, width) shrunk into `most`, then rounded up to whole tokens."""
    ratio = max(height / most[0], width / most[1])
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    return max(-(-height // unit), 1) * unit, max(-(-width // unit), 1) * unit


@dataclass(frozen=True)
class PixtralText(TextPart):
    """[IMG] for each token; [IMG_BREAK] ends a row of them, [IMG_END] the last one."""

    tokens: ClassVar = {
        "image": Token(("image_token_index", "image_token_id"), "[IMG]"),
        "break": Token((), "[IMG_BREAK]"),
        "end": Token((), "[IMG_END]"),
    }

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "PixtralText":
        for key, usual in (("image_break_token", "[IMG_BREAK]"), ("image_end_token", "[IMG_END]")):
            if settings.word(key, usual) != usual:
                raise UserError(f"{settings.find(key)[1]} must be {usual}")
        return cls()

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        row = words["image"] * one.grid[1] + words["break"]
        return (row * one.grid[0]).removesuffix(words["break"]) + words["end"]


def token_size(settings: ProcessorSettings, model: ProcessorSettings) -> Mapping[str, int]:
    """What the processor asks of its image processor: that tokens, not patches, are whole."""
    patch = settings.maybe_whole("patch_size", most=1024) or 16
    return {"patch_size": patch * (settings.maybe_whole("spatial_merge_size", most=64) or 1)}


PIXTRAL = ProcessorKind("PixtralProcessor", "PixtralImageProcessor", PixtralText.read, told=token_size)
