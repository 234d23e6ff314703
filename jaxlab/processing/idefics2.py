"""Idefics 2: an image keeps about its size; if asked for, its four quarters are seen besides."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token, int32
from jaxlab.processing.pixels import PLAIN, Pixels, Scale, check_pixels, read_resample, resize, size_of
from jaxlab.processing.settings import ProcessorSettings, Size, shown

DEFAULTS = {
    **PLAIN,
    "resample": int(Image.Resampling.BILINEAR),
    "size": {"shortest_edge": 378, "longest_edge": 980},
    "do_image_splitting": False,
    "do_pad": True,
}


@dataclass(frozen=True)
class Quarters(ImagePart):
    size: Size | None
    """None: images stay as large as they are."""
    splits: bool
    resample: int
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "Quarters":
        size = settings.size("size", square=False) if settings.flag("do_resize") else None
        known = ({"shortest_edge", "longest_edge"}, {"height", "width"})
        if size is not None and not any(keys <= set(size) for keys in known):
            where = settings.find("size")[1]
            raise UserError(
                f"{where} needs shortest_edge and longest_edge, or height and width, is {shown(size)}"
            )
        if not settings.flag("do_pad"):
            raise UserError(f"{settings.find('do_pad')[1]} must be true: images of a batch are of one size")
        return cls(size, settings.flag("do_image_splitting"), read_resample(settings), Scale.read(settings))

    def one(self, image: Pixels, alone: bool) -> One:
        parts = [*quarters(image), image] if self.splits else [image]
        if self.size is not None:
            parts = [resize(part, *bounded(*size_of(part), self.size), self.resample) for part in parts]
        scaled = [self.scale(part) for part in parts]
        height, width = (max(part.shape[axis] for part in scaled) for axis in (1, 2))
        check_pixels(height, width)
        filled = [np.pad(p, [(0, 0), (0, height - p.shape[1]), (0, width - p.shape[2])]) for p in scaled]
        return One(np.stack(filled), size_of(image), parts=tuple(part.shape[1:] for part in scaled))

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [1, parts, 3, most height, most width], zeros beside a part; pixel_attention_mask
        int32 [1, parts, most height, most width], 1 on its pixels."""
        sizes = [size for one in ones for size in one.parts]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        check_pixels(height, width)
        filled = [
            np.pad(
                one.pixels,
                [(0, 0), (0, 0), (0, height - one.pixels.shape[2]), (0, width - one.pixels.shape[3])],
            )
            for one in ones
        ]
        mask = [np.pad(np.ones(size), [(0, height - size[0]), (0, width - size[1])]) for size in sizes]
        return {"images": np.concatenate(filled)[None], "pixel_attention_mask": int32(mask)[None]}


def quarters(image: Pixels) -> list[Pixels]:
    """The four quarters of an image, row by row.

    Raises:
      UserError: it is a line, whose half is nothing.
    """
    down, across = image.shape[0] // 2, image.shape[1] // 2
    if not down or not across:
        raise UserError(f"{image.shape[1]} by {image.shape[0]} pixels cannot be cut into quarters")
    return [
        image[rows, columns]
        for rows in (slice(down), slice(down, None))
        for columns in (slice(across), slice(across, None))
    ]


def bounded(height: int, width: int, size: Size) -> tuple[int, int]:
    """(height, width) with the longer side shrunk to the longest edge, then neither below the shortest."""
    if "longest_edge" not in size or "shortest_edge" not in size:
        return size["height"], size["width"]
    aspect, most, least = width / height, size["longest_edge"], size["shortest_edge"]
    if width >= height and width > most:
        height, width = int(most / aspect), most
    elif height > width and height > most:
        height, width = most, int(most * aspect)
    return max(height, least), max(width, least)


@dataclass(frozen=True)
class Idefics2Text(TextPart):
    """<image> so many times for each part, separators between them and around."""

    count: int
    parts: int
    tokens: ClassVar = {
        "image": Token(("image_token_id", "image_token_index"), "<image>"),
        "separator": Token((), "<fake_token_around_image>"),
    }

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "Idefics2Text":
        count = settings.maybe_whole("image_seq_len", most=1 << 16) or 64
        return cls(count, 5 if settings.flag("do_image_splitting") else 1)

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        between = words["separator"]
        return (between + words["image"] * self.count) * self.parts + between

    def join(self, pieces: Sequence[str], words: Mapping[str, str]) -> str:
        """Images that touch share a separator; a word that touches one is kept apart from it."""
        between = words["separator"]
        text = "".join(pieces).replace(between * 2, between)
        return re.sub(rf"{re.escape(between)}(?=[^\s<])", f"{between} ", text)


IDEFICS2 = ProcessorKind("Idefics2Processor", "Idefics2ImageProcessor", Idefics2Text.read)
