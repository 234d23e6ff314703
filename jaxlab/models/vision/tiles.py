"""Images cut to tiles (anyres, LLaVA-NeXT): which tiles there are, which features make which token.

Index arithmetic on the host, in numpy, on sizes alone. The device then gathers, or sums four rows a token.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Size = tuple[int, int]
"""Height and width."""


class Packing(NamedTuple):
    """The tokens of images as rows of a table: all features of all tiles, and after them the newline."""

    rows: Int[np.ndarray, "P k"]
    """k = 1: the row of each token. k = 4: the rows that are mixed."""
    weights: Float[np.ndarray, "P k"] | None
    """How they are mixed; None with k = 1."""


def fit(size: Size, grid: Sequence[Size]) -> Size:
    """The resolution of the grid that keeps most of an image, and among those the one with least to spare.

    The first one on a tie.
    """

    def kept_and_spared(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(grid, key=kept_and_spared)


def count_tiles(size: Size, grid: Sequence[Size], tile: int) -> int:
    """Tiles of an image of `size`, the whole image scaled to one tile included."""
    height, width = fit(size, grid)
    return 1 + math.ceil(height / tile) * math.ceil(width / tile)


def unpadded(size: Size, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of height x width features that show the image rather than its padding."""
    if size[1] / size[0] > width / height:
        padding = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return slice(padding, height - padding), slice(0, width)
    padding = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return slice(0, height), slice(padding, width - padding)


def pack(
    sizes: Sequence[Size],
    whole: Sequence[bool],
    *,
    grid: Sequence[Size],
    tile: int,
    side: int,
    max_tiles: int,
) -> Packing:
    """The tokens of each image, one image after the other.

    Those of the image scaled to one tile come first; then, row by row, those of its tiles without the
    padding, each row ended by the newline. An image that is `whole` has but one tile, and a newline after it.

    Args:
      sizes: of the original images.
      tile: height and width of a tile in pixels.
      side: features of a tile along each side.
      max_tiles: more features than this many tiles have are scaled down bilinearly; 0: never.

    Raises:
      ValueError: scaling down would leave nothing of an image.
    """
    counts = [1 if one else count_tiles(size, grid, tile) for size, one in zip(sizes, whole, strict=True)]
    newline = sum(counts) * side * side
    rows, weights, start = [], [], 0
    for size, one, count in zip(sizes, whole, counts, strict=True):
        first = start + np.arange(side * side)
        parts = [_plain(first), _plain(np.array([newline]))] if one else [_plain(first)]
        if not one:
            resolution = fit(size, grid)
            parts.append(_tiled(start + side * side, newline, size, resolution, tile, side, max_tiles))
        rows += [part[0] for part in parts]
        weights += [part[1] for part in parts]
        start += count * side * side
    all_rows, all_weights = np.concatenate(rows), np.concatenate(weights)
    if (all_weights[:, 0] == 1).all():
        return Packing(all_rows[:, :1].astype(np.int32), None)
    return Packing(all_rows.astype(np.int32), all_weights)


Part = tuple[Int[np.ndarray, "P 4"], Float[np.ndarray, "P 4"]]


def _plain(rows: np.ndarray) -> Part:
    """Rows that are taken as they are."""
    weights = np.zeros((len(rows), 4), np.float32)
    weights[:, 0] = 1
    return np.repeat(rows[:, None], 4, axis=1), weights


def _tiled(
    start: int, newline: int, size: Size, resolution: Size, tile: int, side: int, max_tiles: int
) -> Part:
    down, across = resolution[0] // tile, resolution[1] // tile
    of_tiles = start + np.arange(down * across * side * side).reshape(down, across, side, side)
    index = of_tiles.transpose(0, 2, 1, 3).reshape(down * side, across * side)
    index = index[unpadded(size, down * side, across * side)]
    height, width = index.shape
    ratio = math.sqrt(height * width / (max_tiles * side**2)) if max_tiles else 0.0
    if ratio > 1.1:
        height, width = int(height // ratio), int(width // ratio)
        if not height or not width:
            raise ValueError(f"an image of {size} pixels is too narrow to be cut to tiles")
        rows, weights = _scaled(index, height, width)
    else:
        rows, weights = (part.reshape(height, width, 4) for part in _plain(index.reshape(-1)))
    ends = _plain(np.full(height, newline))
    rows = np.concatenate([rows, ends[0][:, None]], axis=1)
    weights = np.concatenate([weights, ends[1][:, None]], axis=1)
    return rows.reshape(-1, 4), weights.reshape(-1, 4)


def _scaled(index: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and weights [height, width, 4] of bilinear scaling, pixels being squares (align_corners false)."""
    (top, bottom, below), (left, right, beyond) = (
        _neighbours(old, new) for old, new in zip(index.shape, (height, width), strict=True)
    )
    pairs = [(top, left), (top, right), (bottom, left), (bottom, right)]
    rows = np.stack([index[np.ix_(*pair)] for pair in pairs], axis=-1)
    down, across = np.stack([1 - below, below]), np.stack([1 - beyond, beyond])
    weights = np.einsum("ay,bx->yxab", down, across).reshape(height, width, 4)
    return rows, weights.astype(np.float32)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` places: the two of `old` between which it lies, and how far towards the second."""
    place = np.float32(old / new) * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    place = np.maximum(place, np.float32(0))
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, old - 1), place - first.astype(np.float32)
