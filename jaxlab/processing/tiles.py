"""InternVL (the processor of GOT-OCR 2): an image is stretched to a grid of tiles, and seen whole besides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token
from jaxlab.processing.pixels import CLIP, Pixels, Scale, cut, read_resample, resize, size_of
from jaxlab.processing.settings import ProcessorSettings
from jaxlab.processing.square import join

DEFAULTS = {
    **CLIP,
    "size": {"height": 384, "width": 384},
    "crop_to_patches": False,
    "min_patches": 1,
    "max_patches": 12,
}
ALWAYS = {"crop_to_patches": True}
"""What InternVL's processor asks for, whatever the folder's image processor says."""


@dataclass(frozen=True)
class Tiles(ImagePart):
    resizes: bool
    """Of an image that is not cut up; a grid of tiles is always made to fit."""
    tile: tuple[int, int]
    counts: tuple[int, int]
    """Least and most tiles; most 1: images are not cut up."""
    resample: int
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "Tiles":
        most = settings.whole("max_patches", most=256) if settings.flag("crop_to_patches") else 1
        return cls(
            resizes=settings.flag("do_resize"),
            tile=settings.rectangle("size"),
            counts=(settings.whole("min_patches", most=256), most),
            resample=read_resample(settings),
            scale=Scale.read(settings),
        )

    def one(self, image: Pixels, alone: bool) -> One:
        size, (height, width) = size_of(image), self.tile
        if self.counts[1] == 1:
            tiles = [resize(image, height, width, self.resample) if self.resizes else image]
        else:
            rows, columns = best_grid(size, self.tile, *self.counts)
            tiles = cut(resize(image, rows * height, columns * width, self.resample), height, width)
            if len(tiles) > 1:
                tiles.append(resize(image, height, width, self.resample))
        return One(np.stack([self.scale(tile) for tile in tiles]), size)

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [tiles, 3, height, width], the tiles of all images in a row."""
        return {"images": join([one.pixels for one in ones])}


def best_grid(size: tuple[int, int], tile: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """The (rows, columns) nearest to the image's aspect.

    Of equal ones a larger grid, if the image has pixels for more than half of it.
    """
    height, width = size
    grids = [(r, c) for c in range(1, most + 1) for r in range(1, most + 1) if least <= r * c <= most]
    best, best_distance = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        fills = height * width > 0.5 * tile[0] * tile[1] * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (rows, columns), distance
    return best


@dataclass(frozen=True)
class InternVLText(TextPart):
    """<img>, <IMG_CONTEXT> so many times for each tile, </img>."""

    count: int
    tokens: ClassVar = {
        "image": Token(("image_token_id", "image_token_index"), "<IMG_CONTEXT>"),
        "start": Token((), "<img>"),
        "end": Token((), "</img>"),
    }
    separator: ClassVar = "\n"
    video: ClassVar = Token((), "<video>")

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "InternVLText":
        return cls(settings.maybe_whole("image_seq_length", most=1 << 16) or 256)

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        return words["start"] + words["image"] * (self.count * len(one.pixels)) + words["end"]


INTERNVL = ProcessorKind("InternVLProcessor", "GotOcr2ImageProcessor", InternVLText.read, ALWAYS)
