"""Mllama (Llama 3.2 Vision): an image on a canvas of a few tiles; which text sees which image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token, int32
from jaxlab.processing.pixels import PLAIN, Pixels, Scale, check_pixels, cut, read_resample, resize, size_of
from jaxlab.processing.settings import ProcessorSettings

DEFAULTS = {
    **PLAIN,
    "resample": int(Image.Resampling.BILINEAR),
    "size": {"height": 224, "width": 224},
    "do_pad": True,
    "max_image_tiles": 4,
}


@dataclass(frozen=True)
class Canvas(ImagePart):
    side: int
    """Of a tile."""
    most: int
    """Tiles of an image."""
    resample: int
    scale: Scale

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "Canvas":
        for key in ("do_resize", "do_pad"):
            if not settings.flag(key):
                raise UserError(f"{settings.find(key)[1]} must be true")
        height, width = settings.rectangle("size")
        if height != width:
            raise UserError(f"{settings.find('size')[1]} must be a square, is {height} by {width}")
        most = settings.whole("max_image_tiles", most=64)
        check_pixels(height * most, width)
        return cls(height, most, read_resample(settings), Scale.read(settings))

    def one(self, image: Pixels, alone: bool) -> One:
        size, side = size_of(image), self.side
        down, across = best_canvas(size, side, self.most)
        image = resize(image, *fitted(size, (down * side, across * side), side), self.resample)
        spare = (down * side - image.shape[0], across * side - image.shape[1])
        image = np.pad(image, [(0, spare[0]), (0, spare[1]), (0, 0)])
        return One(np.stack([self.scale(tile) for tile in cut(image, side, side)]), size, (down, across))

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [1, images, most tiles, 3, side, side], zeros after an image's own tiles;
        aspect_ratio_ids int32 [1, images], from 1; aspect_ratio_mask int32 [1, images, most tiles]."""
        ratios = canvases(self.most)
        filled = [np.pad(one.pixels, [(0, self.most - len(one.pixels)), *[(0, 0)] * 3]) for one in ones]
        mask = [np.arange(self.most) < len(one.pixels) for one in ones]
        return {
            "images": np.stack(filled)[None],
            "aspect_ratio_ids": int32([[ratios.index(one.grid) + 1 for one in ones]]),
            "aspect_ratio_mask": int32([mask]),
        }


def canvases(most: int) -> list[tuple[int, int]]:
    """All (rows, columns) of at most so many tiles."""
    sides = range(1, most + 1)
    return [(down, across) for down in sides for across in sides if down * across <= most]


def best_canvas(size: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """(rows, columns) of tiles on which an image grows least, else shrinks least; of those the fewest."""
    scales = {
        (down, across): min(across * side / size[1], down * side / size[0]) for down, across in canvases(most)
    }
    grown = [scale for scale in scales.values() if scale >= 1]
    scale = min(grown) if grown else max(scales.values())
    return min((c for c in scales if scales[c] == scale), key=lambda canvas: canvas[0] * canvas[1])


def fitted(size: tuple[int, int], canvas: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) within the canvas, its aspect kept; an image larger than a tile does not grow."""
    height, width = (min(max(s, side), c) for s, c in zip(size, canvas, strict=True))
    down, across = height / size[0], width / size[1]
    if across < down:
        return min(math.floor(size[0] * across) or 1, height), width
    return height, min(math.floor(size[1] * down) or 1, width)


@dataclass(frozen=True)
class MllamaText(TextPart):
    """One token for each image; the first token of a text after those that the prompt begins with."""

    most: int
    """Tiles of an image."""
    tokens: ClassVar = {
        "image": Token(("image_token_index", "image_token_id"), "<|image|>"),
        "first": Token(("bos_token_id",), "<|begin_of_text|>"),
    }

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "MllamaText":
        return cls(settings.whole("max_image_tiles", most=64))

    def finish(self, text: str, words: Mapping[str, str]) -> str:
        if words["first"] in text:
            return text
        prompt = text
        while prompt.startswith(words["image"]):
            prompt = prompt.removeprefix(words["image"])
        return text[: len(text) - len(prompt)] + words["first"] + prompt

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        return words["image"]

    def of_tokens(self, tokens: Sequence[int], image: int, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """cross_attention_mask int32 [1, T, images, most tiles]: 1 on the tiles that a token sees.

        From an image's token on up to the next one; of images that follow each other up to where the last
        one ends.
        """
        starts = [place for place, token in enumerate(tokens) if token == image]
        ends = [*starts[1:], len(tokens)]
        for i in reversed(range(len(starts) - 1)):
            if ends[i] == starts[i] + 1:
                ends[i] = ends[i + 1]
        mask = np.zeros((1, len(tokens), len(ones), self.most), np.int32)
        for i, (start, end, one) in enumerate(zip(starts, ends, ones, strict=True)):
            mask[0, start:end, i, : len(one.pixels)] = 1
        return {"cross_attention_mask": mask}


MLLAMA = ProcessorKind("MllamaProcessor", "MllamaImageProcessor", MllamaText.read)
