"""Pixels of image files, and the steps that all image processors share, on uint8 arrays [height, width, 3].

Images are resized by Pillow as uint8, as in transformers' Pillow backend, whose batches these equal bit for
bit. Its torchvision backend has kernels of its own: an image differs there by one or two of 255 steps in
0.5 % of the values, at some sizes by up to 20; and one that is smaller than its crop lies one pixel off.
What follows the last resize depends on the 256 values alone and is a table.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from jaxlab.errors import UserError
from jaxlab.processing.settings import ProcessorSettings, Size, shown

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read: others that Pillow knows start further programs (EPS) or are no photographs."""

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""Endings of files that hold videos, to say so."""

MOST_PIXELS = 1 << 26
"""Of anything made from an image, 8192 by 8192: beyond, a strange shape or size would fill the memory."""

MOST_TILES = 4096

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
RESCALE = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": int(Image.Resampling.BICUBIC),
}
"""What all image processors do unless told otherwise."""
CLIP = {**RESCALE, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
PLAIN = {**RESCALE, "image_mean": HALF, "image_std": HALF}

Pixels = UInt8[np.ndarray, "_height _width 3"]


def read_image(source: str | os.PathLike[str] | Image.Image, convert: bool) -> Pixels:
    """RGB pixels of a file or an image.

    The two differ as they do in the processors: a file is turned upright by its EXIF orientation and its
    alpha channel is dropped; an image is taken as it lies, with white behind its alpha channel. A color that
    stands for transparency becomes white in both.

    Args:
      convert: an image that is not RGB is converted; files always are.

    Raises:
      UserError: no such file, a video, not an image, broken, too large, without pixels, or not RGB without
        `convert`.
    """
    name = "the image" if isinstance(source, Image.Image) else str(source)
    if not isinstance(source, Image.Image) and not Path(source).is_file():
        raise UserError(f"{name}: no such image file")
    if name.lower().endswith(VIDEOS):
        raise UserError(f"{name}: videos are not read; give frames of it as images")
    if isinstance(source, Image.Image) and source.mode != "RGB" and not convert:
        raise UserError(
            f"{name} is {source.mode}, and the processor takes RGB only (do_convert_rgb is false)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                image = source
                image.load()
            else:
                image = ImageOps.exif_transpose(Image.open(source, formats=FORMATS)).convert("RGB")
            image = on_white(image) if convert else image
    except Exception as error:  # decoders of broken files raise nearly anything
        raise UserError(f"{name}: not an image that can be read ({error})") from error
    if 0 in image.size:
        raise UserError(f"{name}: holds no pixels, it is {image.width} by {image.height}")
    return np.asarray(image)


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, with white behind what is transparent."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def size_of(image: Pixels) -> tuple[int, int]:
    """(height, width)."""
    return image.shape[0], image.shape[1]


def resize(image: Pixels, height: int, width: int, resample: int) -> Pixels:
    """The image at exactly that size.

    Raises:
      UserError: no pixel would remain, or far too many.
    """
    if min(height, width) < 1 or height * width > MOST_PIXELS:
        raise UserError(
            f"{image.shape[1]} by {image.shape[0]} pixels would become {width} by {height}; "
            "crop the image to a less extreme shape"
        )
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(resample)))


def check_pixels(height: int, width: int) -> None:
    """Refuses a size that images are filled up to.

    Raises:
      UserError: it would fill the memory.
    """
    if height * width > MOST_PIXELS:
        raise UserError(
            f"images would be filled up to {width} by {height} pixels; crop them to less extreme shapes"
        )


def target_size(height: int, width: int, size: Size) -> tuple[int, int]:
    """The (height, width) that an image gets by `size`, its aspect kept unless both sides are given.

    {"shortest_edge": s}: the shorter side becomes s; beside a longest edge, as small as that asks for.
    """
    short, long = min(height, width), max(height, width)
    if "shortest_edge" in size:
        side, most = size["shortest_edge"], size.get("longest_edge")
        exact: float = side
        if most is not None and long / short * side > most:
            exact = most * short / long
            side = round(exact)
        if most is not None and short == side:
            return height, width
        other = int(exact * long / short)
        return (other, side) if width < height else (side, other)
    return size["height"], size["width"]


def center_crop(image: Pixels, height: int, width: int) -> Pixels:
    """The middle of the image; sides that are too short are filled up with black."""
    for axis, target in enumerate((height, width)):
        spare = image.shape[axis] - target
        if spare >= 0:
            image = image[(slice(None),) * axis + (slice(spare // 2, spare // 2 + target),)]
        else:
            before = -(spare // 2)
            image = np.pad(image, [(before, -spare - before) if a == axis else (0, 0) for a in range(3)])
    return image


def pad_to_square(image: Pixels, color: tuple[int, ...]) -> Pixels:
    """The image in the middle of a square of its longer side."""
    height, width = image.shape[:2]
    side = max(height, width)
    if side * side > MOST_PIXELS:
        raise UserError(f"{width} by {height} pixels would become {side} by {side}; crop or shrink the image")
    square = np.empty((side, side, 3), np.uint8)
    square[:] = color
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def cut(image: Pixels, height: int, width: int) -> list[Pixels]:
    """The tiles of an image of whole tiles, row by row."""
    rows, columns = image.shape[0] // height, image.shape[1] // width
    if rows * columns > MOST_TILES:
        raise UserError(f"the image falls into {rows * columns} tiles, more than {MOST_TILES}")
    return [
        image[r * height : (r + 1) * height, c * width : (c + 1) * width]
        for r in range(rows)
        for c in range(columns)
    ]


@dataclass(frozen=True)
class Scale:
    """From uint8 to what the tower sees: rescaled and normalised, in float32."""

    table: Float32[np.ndarray, "256 3"]
    """Each channel's result for each value."""

    @classmethod
    def read(cls, settings: ProcessorSettings) -> "Scale":
        values = np.arange(256, dtype=np.float64)
        if settings.flag("do_rescale"):
            values = values * settings.number("rescale_factor")
        table: np.ndarray = np.broadcast_to(values.astype(np.float32)[:, None], (256, 3))
        if settings.flag("do_normalize"):
            mean, std = settings.per_channel("image_mean"), settings.per_channel("image_std")
            if 0 in std:
                raise UserError(f"{settings.find('image_std')[1]} must not hold 0, is {shown(std)}")
            table = (table - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        return cls(table)

    def __call__(self, image: Pixels) -> Float32[np.ndarray, "3 height width"]:
        return np.stack([self.table[:, c][image[:, :, c]] for c in range(3)])


def read_resample(settings: ProcessorSettings) -> int:
    """The number of a filter of Pillow's."""
    return settings.whole("resample", least=0, most=max(Image.Resampling))
