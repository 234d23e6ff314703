"""Where patches and tokens of images of any size stand (Qwen2-VL and after): numpy, on the host."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Ints = Int[np.ndarray, " N"]


def places(grids: Int[np.ndarray, "images 2"], merge: int) -> tuple[Ints, Ints]:
    """Row and column of each patch, int32, in the order of patches: squares of merge x merge, row by row."""
    rows, columns = [], []
    for height, width in grids.tolist():
        index = np.indices((height, width), dtype=np.int32)
        index = index.reshape(2, height // merge, merge, width // merge, merge).transpose(0, 1, 3, 2, 4)
        rows.append(index[0].reshape(-1))
        columns.append(index[1].reshape(-1))
    empty = np.zeros(0, np.int32)
    return np.concatenate([empty, *rows]), np.concatenate([empty, *columns])


def windows(images: Ints, rows: Ints, columns: Ints, side: int) -> Ints:
    """The number, from 0 on, of the window of side x side patches in which each patch lies.

    Windows begin at the top left of each image; those at the other edges may be smaller.
    """
    window = np.stack([images, rows // side, columns // side], axis=-1)
    _, number = np.unique(window, axis=0, return_inverse=True)
    return number.reshape(-1).astype(np.int32)


class Cut(NamedTuple):
    """Patches in groups, a row for each, all int32."""

    rows: Int[np.ndarray, "groups most"]
    """The patches of each group; at the end 0 where it has fewer than the largest."""
    filled: Int[np.ndarray, "groups most"]
    """1 where there is a patch, 0 at the end."""
    order: Ints
    """Where each patch went, counted over all rows."""


def cut(numbers: Ints) -> Cut:
    """Patches whose groups have the given numbers, 0, 1, ..., in the order that they have within them."""
    index = np.argsort(numbers, kind="stable")
    counts = np.bincount(numbers)
    filled = np.arange(counts.max())[None] < counts[:, None]
    rows = np.zeros(filled.shape, np.int32)
    rows[filled] = index
    order = np.empty(len(numbers), np.int32)
    order[index] = np.flatnonzero(filled)
    return Cut(rows, filled.astype(np.int32), order)


def corners(
    sizes: Int[np.ndarray, "N 2"], rows: Ints, columns: Ints, side: int
) -> tuple[Int[np.ndarray, "N 4"], Float[np.ndarray, "N 4"]]:
    """Rows of a table of side x side positions around each patch, int32, and their float32 weights.

    The corners of the table are those of the image: bilinear interpolation, corners aligned.

    Args:
      sizes: rows and columns of the image of each patch.
    """
    along = []
    for index, size in ((rows, sizes[:, 0]), (columns, sizes[:, 1])):
        place = index.astype(np.float32) * np.float32(side - 1) / np.maximum(size - 1, 1).astype(np.float32)
        before = np.floor(place).astype(np.int32)
        after = np.minimum(before + 1, side - 1).astype(np.int32)
        beyond = place - before.astype(np.float32)
        along.append((np.stack([before, after], -1), np.stack([np.float32(1) - beyond, beyond], -1)))
    (down, of_down), (across, of_across) = along
    index = down[:, :, None] * np.int32(side) + across[:, None, :]
    weights = of_down[:, :, None] * of_across[:, None, :]
    return index.reshape(-1, 4), weights.reshape(-1, 4)


def of_text(
    tokens: Int[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"] | None,
    sizes: Int[np.ndarray, "images 2"],
    image_token: int,
) -> Int[np.ndarray, "B T 3"]:
    """M-RoPE positions (arXiv 2409.12191, sec. 2.1), int32: time, row, column.

    A token of text has three times the same, one more than the largest before it. The tokens of an image
    that begins at s have (s, s + row, s + column), and the text after it goes on at s + max(rows, columns).
    Padding has 0.

    Args:
      segment_ids: 1 on tokens, 0 on padding; None: no padding.
      sizes: rows and columns of tokens of each image, in the order of their placeholders in the batch.

    Raises:
      ValueError: placeholders that are not those of the images, or several sequences in a row.
    """
    if segment_ids is not None and (segment_ids > 1).any():
        raise ValueError("packed sequences cannot hold images of this model: give each a row of its own")
    made, placed = int(np.prod(sizes, axis=1).sum()), int(np.sum(tokens == image_token))
    if made != placed:
        raise ValueError(f"the text has {placed} placeholders, its images make {made} tokens")
    if segment_ids is not None and (tokens[segment_ids == 0] == image_token).any():
        raise ValueError("padding holds placeholders of images")
    positions = np.zeros((*tokens.shape, 3), np.int32)
    left = iter(sizes.tolist())
    for row in range(len(tokens)):
        kept = slice(None) if segment_ids is None else segment_ids[row] != 0
        positions[row, kept] = _of_row(tokens[row, kept] == image_token, left)
    return positions


def _of_row(is_image: Bool[np.ndarray, " T"], left: Iterator[list[int]]) -> Int[np.ndarray, "T 3"]:
    """Positions of one row's tokens; its images are taken from `left`."""
    positions = np.zeros((len(is_image), 3), np.int32)
    at = start = 0
    while at < len(is_image):
        if is_image[at]:
            height, width = next(left)
            end = at + height * width
            if end > len(is_image) or not is_image[at:end].all():
                found = int(np.append(is_image[at:end], False).argmin())
                raise ValueError(
                    f"an image of {height} x {width} tokens has {found} placeholders in its place"
                )
            positions[at:end, 1:] = np.indices((height, width)).reshape(2, -1).T
            positions[at:end] += start
            start += max(height, width)
        else:
            following = np.flatnonzero(is_image[at:])
            end = at + int(following[0]) if len(following) else len(is_image)
            positions[at:end] = np.arange(start, start + end - at)[:, None]
            start += end - at
        at = end
    return positions
