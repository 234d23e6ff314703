"""Idefics 3: an image is stretched to whole tiles, and seen whole besides; each tile is named in the text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token, int32
from jaxlab.processing.pixels import PLAIN, Pixels, Scale, cut, read_resample, resize, size_of
from jaxlab.processing.settings import ProcessorSettings, Size, shown
from jaxlab.processing.square import join

DEFAULTS = {
    **PLAIN,
    "resample": int(Image.Resampling.LANCZOS),
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "do_pad": True,
}

LONGEST = 4096
"""No image is made longer, whatever the folder says."""


@dataclass(frozen=True)
class NamedTiles(ImagePart):
    size: Size | None
    """What an image is resized to first; None: it stays."""
    side: int
    """Of a tile."""
    splits: bool
    masks: bool
    resample: int
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "NamedTiles":
        size = settings.size("size", square=True) if settings.flag("do_resize") else None
        if size is not None and "longest_edge" not in size and not {"height", "width"} <= set(size):
            raise UserError(
                f"{settings.find('size')[1]} needs longest_edge, or height and width, is {shown(size)}"
            )
        tile = settings.size("max_image_size", square=True)
        if "longest_edge" not in tile:
            raise UserError(f"{settings.find('max_image_size')[1]} needs longest_edge, is {shown(tile)}")
        return cls(
            size=size,
            side=tile["longest_edge"],
            splits=settings.flag("do_image_splitting"),
            masks=settings.flag("do_pad"),
            resample=read_resample(settings),
            scale=Scale.read(settings),
        )

    def one(self, image: Pixels, alone: bool) -> One:
        size, side, rows, columns = size_of(image), self.side, 0, 0
        if self.size is not None:
            image = resize(image, *first_size(*size, self.size), self.resample)
        if not self.splits:
            tiles = [resize(image, side, side, self.resample)]
        else:
            image = resize(image, *whole_tiles(*size_of(image), side), self.resample)
            tiles = cut(image, side, side)
            if len(tiles) > 1:
                rows, columns = image.shape[0] // side, image.shape[1] // side
                tiles.append(resize(image, side, side, self.resample))
        return One(np.stack([self.scale(tile) for tile in tiles]), size, (rows, columns))

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [1, tiles, 3, side, side]; pixel_attention_mask int32, 1: all tiles are full."""
        images = join([one.pixels for one in ones])[None]
        mask = (
            {"pixel_attention_mask": int32(np.ones(images.shape[:2] + images.shape[3:]))}
            if self.masks
            else {}
        )
        return {"images": images, **mask}


def first_size(height: int, width: int, size: Size) -> tuple[int, int]:
    """(height, width) with the longer side as asked, the other even; neither beyond LONGEST."""
    if "longest_edge" not in size:
        return size["height"], size["width"]
    aspect = width / height
    if width >= height:
        width = size["longest_edge"]
        height = even(int(width / aspect))
    else:
        height = size["longest_edge"]
        width = even(int(height * aspect))
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > LONGEST:
        width, height = LONGEST, int(LONGEST / aspect)
    elif height > width and height > LONGEST:
        height, width = LONGEST, int(LONGEST * aspect)
    return max(height, 1), max(width, 1)


def even(length: int) -> int:
    return length + length % 2


def whole_tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) rounded up to whole tiles, the shorter side by what the aspect makes of the longer."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / aspect) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * aspect) / side) * side
    return height, width


@dataclass(frozen=True)
class Idefics3Text(TextPart):
    """Every tile after a separator and its name, row by row, then the whole image as <global-img>."""

    count: int
    tokens: ClassVar = {
        "image": Token(("image_token_id", "image_token_index"), "<image>"),
        "separator": Token((), "<fake_token_around_image>"),
    }

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "Idefics3Text":
        return cls(settings.maybe_whole("image_seq_len", most=1 << 16) or 169)

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        between, images = words["separator"], words["image"] * self.count
        rows = [
            "".join(f"{between}<row_{r + 1}_col_{c + 1}>{images}" for c in range(one.grid[1])) + "\n"
            for r in range(one.grid[0])
        ]
        return f"{''.join(rows)}{chr(10) if rows else ''}{between}<global-img>{images}{between}"


@dataclass(frozen=True)
class SmolVLMText(Idefics3Text):
    """As Idefics 3's; what stands for a video is known."""

    video: ClassVar = Token((), "<video>")


IDEFICS3 = ProcessorKind("Idefics3Processor", "Idefics3ImageProcessor", Idefics3Text.read)
SMOLVLM = ProcessorKind("SmolVLMProcessor", "SmolVLMImageProcessor", SmolVLMText.read)
