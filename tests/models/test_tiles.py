"""Images cut to tiles: which grid, how many tiles, which features make which token."""

import numpy as np
import pytest

from jaxlab.models.vision import tiles

GRID = ((8, 16), (16, 8), (16, 16), (24, 8))


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((10, 30), (8, 16)),  # wide
        ((30, 10), (24, 8)),  # tall: 8 x 24 of it fit there, 5 x 16 in 16 x 8
        ((40, 40), (16, 16)),  # square and large: the most pixels
        ((4, 4), (8, 16)),  # all keep it whole: the least room to spare, the first of two
    ],
)
def test_the_resolution_that_keeps_most_and_spares_least(size, best):
    assert tiles.fit(size, GRID) == best
    assert tiles.count_tiles(size, GRID, 8) == 1 + best[0] * best[1] // 64


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((10, 40), slice(2, 6), slice(0, 16)),  # 16 wide, 4 high in 8: 2 off above and below
        ((40, 10), slice(0, 8), slice(7, 9)),
        ((20, 40), slice(0, 8), slice(0, 16)),
    ],
)
def test_padding_is_as_much_on_both_sides(size, rows, columns):
    assert tiles.unpadded(size, 8, 16) == (rows, columns)


def features(packed, table):
    rows = table[packed.rows]
    return rows[:, 0] if packed.weights is None else np.sum(rows * packed.weights, axis=1)


def as_image(table, start, down, across, side):
    """The features of tiles, row by row of the whole image, by loops."""
    image = np.empty((down * side, across * side), np.float32)
    for tile in range(down * across):
        for place in range(side * side):
            y, x = tile // across * side + place // side, tile % across * side + place % side
            image[y, x] = table[start + tile * side * side + place]
    return image


def test_tokens_are_the_whole_image_and_then_its_rows_each_with_a_newline():
    sizes, side = [(10, 40), (16, 8)], 4
    table = np.arange(16 * (1 + 2 + 1 + 2) + 1, dtype=np.float32)
    packed = tiles.pack(sizes, [False] * 2, grid=GRID, tile=8, side=side, max_tiles=0)
    assert packed.weights is None
    first = as_image(table, 16, 1, 2, side)[1:3]  # 4 x 8 features, of them 2 x 8 without padding
    second = as_image(table, 16 * 4, 2, 1, side)
    expected = []
    for start, image in ((0, first), (16 * 3, second)):
        expected += table[start : start + 16].tolist()
        for row in image:
            expected += [*row.tolist(), table[-1]]
    assert features(packed, table).tolist() == expected


def test_whole_images_are_one_tile_and_a_newline():
    table = np.arange(2 * 4 + 1, dtype=np.float32)
    packed = tiles.pack([(9, 9), (3, 7)], [True] * 2, grid=GRID, tile=8, side=2, max_tiles=9)
    assert features(packed, table).tolist() == [0, 1, 2, 3, 8, 4, 5, 6, 7, 8]


def test_many_features_are_scaled_down_bilinearly():
    """6 x 6 features of at most one tile of 2 x 2: the root of 9 times as small a side."""
    table = np.sin(np.arange(4 + 36 + 1)).astype(np.float32)
    packed = tiles.pack([(30, 30)], [False], grid=((24, 24),), tile=8, side=2, max_tiles=1)
    image = as_image(table, 4, 3, 3, 2)
    expected = table[:4].tolist()
    for y in range(2):
        for x in range(2):  # centres of halves of six are the middle of the second pixel of three
            expected.append(float(image[3 * y + 1, 3 * x + 1]))
        expected.append(float(table[-1]))
    np.testing.assert_allclose(features(packed, table), expected, rtol=0, atol=1e-6)
    # 4 tiles at most: 6 x 6 are within 1.1 of 4 x 4, scaled by 1.5; four corners are mixed.
    packed = tiles.pack([(30, 30)], [False], grid=((24, 24),), tile=8, side=2, max_tiles=4)
    at = [0.25, 1.75, 3.25, 4.75]
    mixed = []
    for y in at:
        for x in at:
            (a, down), (b, across) = divmod(y, 1), divmod(x, 1)
            a, b = int(a), int(b)
            upper = image[a, b] * (1 - across) + image[a, b + 1] * across
            lower = image[a + 1, b] * (1 - across) + image[a + 1, b + 1] * across
            mixed.append(upper * (1 - down) + lower * down)
        mixed.append(table[-1])
    np.testing.assert_allclose(features(packed, table)[4:], mixed, rtol=0, atol=1e-6)


def test_an_image_of_which_scaling_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 900\) pixels is too narrow"):
        tiles.pack([(5, 900)], [False], grid=((8, 320),), tile=8, side=8, max_tiles=1)
