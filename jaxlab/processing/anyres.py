"""LLaVA-NeXT and LLaVA-OneVision: an image whole, and in tiles of the resolution that suits it best."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, One, ProcessorKind, TextPart, Token, int32
from jaxlab.processing.pixels import CLIP, Pixels, cut, pad_to_square, resize, size_of
from jaxlab.processing.settings import ProcessorSettings
from jaxlab.processing.square import CLIP_DEFAULTS, LlavaText, Square, join, vision_settings

Pairs = tuple[tuple[int, int], ...]

NEXT_DEFAULTS = {
    **CLIP_DEFAULTS,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
SIDES = range(384, 2305, 384)
ONEVISION_DEFAULTS = {
    **CLIP,
    "size": {"height": 384, "width": 384},
    "image_grid_pinpoints": [[h, w] for h in SIDES for w in SIDES],
}


@dataclass(frozen=True)
class AnyRes(ImagePart):
    """Tiles: first the whole image squeezed into one, then those of the image fitted into a resolution."""

    fit: Square
    """What happens to each tile."""
    whole: tuple[int, int]
    """(height, width) of the squeezed image."""
    side: int
    """Of a tile."""
    resolutions: Pairs
    background: tuple[int, ...] | None
    """Of several images, each becomes one tile, a square filled up with this color; None: each is cut up."""

    @classmethod
    def read(cls, settings: ProcessorSettings, *, several_whole: bool = False) -> "AnyRes":
        size = settings.size("size", square=False)
        short = size.get("shortest_edge", 0)
        whole = (size["height"], size["width"]) if {"height", "width"} <= set(size) else (short, short)
        # The crop's height is the side of a tile even where nothing is cropped.
        has_crop = settings.find("crop_size")[0] is not None
        side = settings.rectangle("crop_size")[0] if has_crop else whole[0]
        if not side or not whole[0]:
            raise UserError(f"{settings.find('size')[1]} needs shortest_edge, or height and width")
        resolutions = settings.pairs("image_grid_pinpoints")
        for height, width in resolutions:
            if height % side or width % side:
                raise UserError(
                    f"{settings.find('image_grid_pinpoints')[1]}: {height} by {width} is not made of tiles "
                    f"of {side}"
                )
        mean = settings.per_channel("image_mean")
        background = tuple(int(value * 255) for value in mean) if several_whole else None
        return cls(Square.read(settings), whole, side, resolutions, background)

    def one(self, image: Pixels, alone: bool) -> One:
        size = size_of(image)
        if self.background is not None and not alone:
            return One(self.fit.fit(pad_to_square(image, self.background))[None], size, alone=False)
        resample = self.fit.resample
        tiles = [resize(image, *self.whole, resample)]
        tiles += cut(
            letterbox(image, best_resolution(size, self.resolutions), resample), self.side, self.side
        )
        return One(np.stack([self.fit.fit(tile) for tile in tiles]), size, alone=alone)

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """images float32 [images, most tiles, 3, height, width] (zeros after an image's own), image_sizes."""
        most = max(len(one.pixels) for one in ones)
        filled = [np.pad(one.pixels, [(0, most - len(one.pixels)), (0, 0), (0, 0), (0, 0)]) for one in ones]
        arrays = {"images": join([f[None] for f in filled]), "image_sizes": int32([o.size for o in ones])}
        if self.background is not None:
            arrays["batch_num_images"] = int32([len(ones)])
        return arrays


def best_resolution(size: tuple[int, int], resolutions: Pairs) -> tuple[int, int]:
    """The resolution that keeps most of the image's pixels, and of such the one that wastes least."""
    height, width = size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def letterbox(image: Pixels, resolution: tuple[int, int], resample: int) -> Pixels:
    """The image as large as fits into the resolution, in the middle of black."""
    height, width = image.shape[:2]
    down, across = resolution[0] / height, resolution[1] / width
    if across < down:
        inner = min(math.ceil(height * across), resolution[0]), resolution[1]
    else:
        inner = resolution[0], min(math.ceil(width * down), resolution[1])
    canvas = np.zeros((*resolution, 3), np.uint8)
    top, left = (resolution[0] - inner[0]) // 2, (resolution[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = resize(image, *inner, resample)
    return canvas


def without_padding(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """The (rows, columns) of patches that remain where those of the black edges are dropped."""
    height, width = size
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return rows, columns


@dataclass(frozen=True)
class NextText(LlavaText):
    """<image> once for each patch of the whole image, then of the tiles without their black edges, with one
    more at the end of each row."""

    resolutions: Pairs

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "NextText":
        llava = LlavaText.read(settings, model)
        return cls(
            llava.patch_size, llava.additional, llava.drops_first, settings.pairs("image_grid_pinpoints")
        )

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        height, width = one.pixels.shape[-2:]
        best = best_resolution(one.size, self.resolutions)
        rows, columns = height // self.patch_size, width // self.patch_size
        count = rows * columns + self.additional - self.drops_first
        rows, columns = without_padding(one.size, rows * (best[0] // height), columns * (best[1] // width))
        return words["image"] * (count + rows * columns + rows)


@dataclass(frozen=True)
class OneVisionText(TextPart):
    """As LLaVA-NeXT, shrunk to what so many tiles have; of several images, each is whole."""

    count: int
    """Image tokens of a tile."""
    drops_first: bool
    resolutions: Pairs
    most_tiles: int
    tokens: ClassVar = LlavaText.tokens
    separator: ClassVar = "\n"
    video: ClassVar = Token(("video_token_index", "video_token_id"), "<video>")

    @classmethod
    def read(cls, settings: ProcessorSettings, model: ProcessorSettings) -> "OneVisionText":
        vision = vision_settings(model)
        count = settings.maybe_whole("num_image_tokens", most=1 << 16)
        if count is None:
            count = (vision.whole("image_size") // vision.whole("patch_size")) ** 2
        both = ProcessorSettings((*settings.layers, *model.layers))
        aspect = both.word("vision_aspect_ratio", "anyres_max_9")
        most = re.fullmatch(r"anyres_max_(\d{1,4})", aspect)
        if most is None or int(most[1]) == 0:
            raise UserError(f"{both.find('vision_aspect_ratio')[1]} must be like anyres_max_9, is {aspect!r}")
        drops_first = both.word("vision_feature_select_strategy", "full") == "default"
        return cls(count, drops_first, settings.pairs("image_grid_pinpoints"), int(most[1]))

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        count = self.count - self.drops_first
        if not one.alone:
            return words["image"] * (count + 1)
        height, width = one.pixels.shape[-2:]
        best = best_resolution(one.size, self.resolutions)
        side = math.isqrt(self.count)
        rows, columns = without_padding(one.size, side * (best[0] // height), side * (best[1] // width))
        ratio = math.sqrt(rows * columns / (self.most_tiles * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return words["image"] * (count + rows * columns + rows)


LLAVA_NEXT = ProcessorKind("LlavaNextProcessor", "LlavaNextImageProcessor", NextText.read)
LLAVA_ONEVISION = ProcessorKind("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", OneVisionText.read)
