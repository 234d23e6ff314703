"""InternVL (the processor of GOT-OCR 2): an image is stretched to a grid of tiles, and seen whole besides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import UserError
from jaxlab.processing.base import ImageKind, ImagePart, One, ProcessorKind, TextPart, Token
from jaxlab.processing.pixels import CLIP, RESCALE, Pixels, Scale, cut, read_resample, resize, size_of
from jaxlab.processing.settings import ProcessorSettings
from jaxlab.processing.square import join, vision_settings

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
    thumbnail: bool
    """An image that is cut up is seen whole besides."""
    grids: tuple[tuple[int, int], ...]
    """(rows, columns), in the order in which they are tried."""
    resample: int
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "Tiles":
        most = settings.whole("max_patches", most=256) if settings.flag("crop_to_patches") else 1
        least = settings.whole("min_patches", most=256)
        return cls(
            resizes=settings.flag("do_resize"),
            tile=settings.rectangle("size"),
            counts=(least, most),
            thumbnail=settings.flag("use_thumbnail", True),
            grids=(original_grids if settings.flag("original_order") else grids)(least, most),
            resample=read_resample(settings),
            scale=Scale.read(settings),
        )

    def one(self, image: Pixels, alone: bool) -> One:
        size, (height, width) = size_of(image), self.tile
        if self.counts[1] == 1:
            tiles = [resize(image, height, width, self.resample) if self.resizes else image]
        else:
            rows, columns = best_grid(size, self.tile, self.grids)
            tiles = cut(resize(image, rows * height, columns * width, self.resample), height, width)
            if len(tiles) > 1 and self.thumbnail:
                tiles.append(resize(image, height, width, self.resample))
        return One(np.stack([self.scale(tile) for tile in tiles]), size)

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [tiles, 3, height, width], the tiles of all images in a row."""
        return {"images": join([one.pixels for one in ones])}


def grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """All grids of so many tiles, the smaller ones first."""
    found = [(r, c) for c in range(1, most + 1) for r in range(1, most + 1) if least <= r * c <= most]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def original_grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """The same in the order of InternVL's authors, which decides between grids that are equally near.

    They sort the (columns, rows) of a set: grids of equally many tiles stay in the set's order, which follows
    from the order in which they went in.
    """
    found = {
        (c, r)
        for n in range(least, most + 1)
        for c in range(1, n + 1)
        for r in range(1, n + 1)
        if least <= c * r <= most
    }
    return tuple((r, c) for c, r in sorted(found, key=lambda grid: grid[0] * grid[1]))


def best_grid(
    size: tuple[int, int], tile: tuple[int, int], grids: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The (rows, columns) nearest to the image's aspect.

    Of equal ones the later grid, if the image has pixels for more than half of it.
    """
    height, width = size
    best, best_distance = (1, 1), float("inf")
    for rows, columns in grids:
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


@dataclass(frozen=True)
class InternVLChatText(InternVLText):
    """The same in the authors' own layout, where a prompt holds <image> for each image."""

    plain_mark: ClassVar = "<image>"

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "InternVLChatText":
        side = chat_settings(settings, model)["size"] // vision_settings(model).whole("patch_size")
        ratio = model.number("downsample_ratio") if model.find("downsample_ratio")[0] is not None else 0.5
        return cls(int(side**2 * ratio**2))


def chat_settings(settings: ProcessorSettings, model: ProcessorSettings) -> dict[str, Any]:
    """How images are cut, which the authors' config.json tells and their code does.

    Raises:
      UserError: images that are filled up to squares: no code of theirs does it.
    """
    if model.flag("pad2square"):
        raise UserError(f"{model.find('pad2square')[1]} true is not supported")
    side = model.maybe_whole("force_image_size", most=1 << 14)
    return {
        "size": side or vision_settings(model).maybe_whole("image_size", most=1 << 14) or 448,
        "crop_to_patches": model.flag("dynamic_image_size"),
        "min_patches": model.maybe_whole("min_dynamic_patch", most=256) or 1,
        "max_patches": model.maybe_whole("max_dynamic_patch", most=256) or 6,
        "use_thumbnail": model.flag("use_thumbnail"),
    }


CHAT_DEFAULTS = {
    **RESCALE,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
    "original_order": True,
}
"""ImageNet's mean and deviation."""
INTERNVL_CHAT = ProcessorKind(
    "InternVLChatProcessor",
    ImageKind(Tiles.read, CHAT_DEFAULTS),
    InternVLChatText.read,
    always=CHAT_DEFAULTS,
    told=chat_settings,
)
