"""FLOPs and bytes: by hand, by brute force over masks, and the figures of the design."""

import dataclasses

import numpy as np
import pytest

from kernels_pallas.nsa.specs import counts
from kernels_pallas.nsa.specs.arg_specs import ArgSpec, with_tag
from kernels_pallas.nsa.specs.synthetic import overlapping_indices
from tests.kernels_pallas.nsa import oracle

PAPER = with_tag("compile")["paper"]


def query_centric_bytes(spec):
    """Of keys and values, if every query read its blocks for itself, once for all heads of a group."""
    of_token = (spec.key_dim + spec.value_dim) * counts.ITEM
    return counts.pairs(spec)["selection"] * spec.batch * spec.kv_heads * of_token


def test_the_papers_figures_at_64k():
    """88.0 TFLOP dense against 9.5 (5.5 compression, 2.6 selection, 1.4 window); 165 GB of K/V."""
    tera = {branch: counts.forward_flops(PAPER, branch) / 1e12 for branch in counts.pairs(PAPER)}
    assert tera["dense"] == pytest.approx(88.0, abs=0.05)
    assert tera["compression"] == pytest.approx(5.5, abs=0.05)
    assert tera["selection"] == pytest.approx(2.6, abs=0.05)
    assert tera["window"] == pytest.approx(1.4, abs=0.05)
    assert sum(tera.values()) - tera["dense"] == pytest.approx(9.5, abs=0.05)
    assert query_centric_bytes(PAPER) / 1e9 == pytest.approx(165, abs=1.5)


def test_pairs_are_those_of_the_masks():
    spec = ArgSpec(150, heads=1, kv_heads=1, block_len=8, stride=4, block_size=8, num_blocks=5, window=20)
    tokens = oracle.visible_tokens(150)
    age = np.arange(150)[:, None] - np.arange(150)[None]
    assert counts.pairs(spec) == {
        "compression": oracle.visible_blocks(tokens, 8, 4).sum(),
        "selection": sum(len(seen) for seen in chosen_tokens(spec, overlapping_indices(spec, 0.3)[0, 0])),
        "window": (tokens & (age < 20)).sum(),
        "dense": tokens.sum(),
    }


def chosen_tokens(spec, rows):
    size = spec.block_size
    return [
        [s for j in row.tolist() if j >= 0 for s in range(j * size, (j + 1) * size) if s <= t]
        for t, row in enumerate(rows)
    ]


def test_one_tile_of_keys_by_hand():
    """64 tokens of 16 heads: 16 row tiles of 64 rows (4 queries), in 8 programs, and one tile of keys."""
    spec = ArgSpec(64, heads=16, kv_heads=1, key_dim=60, value_dim=128, window=64)
    found = counts.kernels(spec, "window")
    assert found["forward"].flops == 16 * 2 * 64 * 64 * (64 + 128)  # 60 features are padded to 64
    assert found["forward"].useful_flops == 2 * (64 * 65 // 2) * 16 * (60 + 128)
    # Eight loads of the tile; a row is 64 numbers of q, its first and its end.
    assert found["forward"].l2_bytes == 8 * 64 * (64 + 128) * 2 + 1024 * (64 * 2 + 8)
    # Rows in, rows out (128 numbers and a log-sum-exp), keys and values.
    assert found["forward"].hbm_bytes == 1024 * (64 * 2 + 8) + 1024 * (128 * 2 + 4) + 64 * (64 + 128) * 2
    assert found["query_gradient"].flops == 16 * 2 * 64 * 64 * (64 + 128 + 64)
    assert found["key_gradients"].flops == 16 * 2 * 64 * 64 * (2 * 64 + 2 * 128)
    assert found["key_gradients"].l2_bytes == 16 * 64 * ((64 + 128) * 2 + 16) + 64 * (64 + 128) * 2


@pytest.mark.parametrize("branch", ["compression", "selection", "window"])
@pytest.mark.parametrize("groups", [1, 16])
def test_tiles_are_those_that_brute_force_finds(branch, groups):
    spec = ArgSpec(700, heads=2 * groups, kv_heads=2, key_dim=64, value_dim=64, window=100, num_blocks=5)
    indices = overlapping_indices(spec, 0.5)
    tokens = oracle.visible_tokens(700)
    age = np.arange(700)[:, None] - np.arange(700)[None]
    loaded = computed = reading = 0
    for head in range(2):
        if branch == "compression":
            mask = oracle.visible_blocks(tokens, spec.block_len, spec.stride)
        elif branch == "window":
            mask = tokens & (age < 100)
        else:
            mask = np.zeros((700, 700), bool)
            for t, seen in enumerate(chosen_tokens(spec, indices[0, head])):
                mask[t, seen] = True
        rows = np.pad(mask, ((0, 4), (0, -mask.shape[1] % 64)))  # 704 is 11 times 64, 88 times 8
        key_tiles = rows.reshape(704, -1, 64).any(axis=2)
        # Rows of one query lie beside each other; groups of one are padded to four: 32 queries a tile.
        of_tile = 128 // max(4, groups)
        by_program = key_tiles.reshape(-1, of_tile, key_tiles.shape[1])
        by_warpgroup = key_tiles.reshape(-1, of_tile // 2, key_tiles.shape[1])
        loaded += by_program.any(axis=1).sum()
        computed += by_warpgroup.any(axis=1).sum()
        reading += by_warpgroup.any(axis=1).sum()
    found = counts.kernels(spec, branch, indices)
    per_tile = 2 * 64 * 64 * 128
    if branch != "selection":  # only with lists does a warpgroup pass over tiles
        computed = 2 * loaded
    assert found["forward"].flops == computed * per_tile
    assert found["key_gradients"].flops == reading * 2 * per_tile
    rows_in = 704 * max(4, groups) * 2 * (64 * 2 + (12 if branch == "selection" else 8))
    assert found["forward"].l2_bytes == loaded * 64 * 128 * 2 + rows_in


def test_more_overlap_reads_less_and_every_count_is_above_the_useful():
    spec = dataclasses.replace(PAPER, length=8192)
    bytes_by_overlap = []
    for overlap in (0.0, 0.5, 1.0):
        found = counts.kernels(spec, "selection", overlapping_indices(spec, overlap))
        bytes_by_overlap.append(found["forward"].l2_bytes)
        assert all(count.flops >= count.useful_flops for count in found.values())
    assert bytes_by_overlap == sorted(bytes_by_overlap, reverse=True)
    # Eight queries share what they read: with no overlap all but the forced blocks are read for each.
    assert bytes_by_overlap[0] < query_centric_bytes(spec)
    assert counts.scores(spec).flops > counts.scores(spec).useful_flops
    with pytest.raises(ValueError, match="give indices"):
        counts.kernels(spec, "selection")


def test_floors_by_hand():
    count = counts.Count(flops=8e12, useful_flops=1.0, l2_bytes=5.4e9, hbm_bytes=6e9)
    assert count.floors_ms() == pytest.approx({"products": 10.0, "l2": 1.0, "hbm": 2.0})
    assert count.floor_ms() == pytest.approx(10.0)
