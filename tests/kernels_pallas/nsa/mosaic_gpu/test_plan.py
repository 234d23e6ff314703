"""Plans of the kernels against sets: what each tile reads, and who reads each block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa.mosaic_gpu.common import Visible
from kernels_pallas.nsa.mosaic_gpu.plan import TilesOfBlocks, inverse, lists, plan_rows, ranges, readers


@pytest.mark.parametrize("largest", [np.iinfo(np.int32).max, 8])
def test_unions_and_their_inverse_hold_every_choice(monkeypatch, largest):
    """Against sets, for queries that do not fill a tile and slots that are missing; block and tile as one key
    and, as if they were too many for that, as two."""
    monkeypatch.setattr("kernels_pallas.nsa.mosaic_gpu.plan.LARGEST", largest)
    random = np.random.default_rng(0)
    length, chosen, blocks, rows = 37, 3, 9, 64
    layout = plan_rows(length, 5, rows)
    queries = layout.queries(rows)
    assert queries == 8  # five heads are padded to eight
    indices = np.sort(
        random.permuted(np.tile(np.arange(blocks), (2, length, 2, 1)), axis=3)[..., :chosen], axis=3
    )
    indices[random.random(indices.shape) < 0.2] = -1
    plan = lists(layout, TilesOfBlocks(jnp.asarray(indices, jnp.int32), None), blocks, rows, 1)
    turned = inverse(plan, blocks)
    steps, union, members = map(np.asarray, plan[:3])
    found = {}
    for batch in range(2):
        for head in range(2):
            x = batch * 2 + head
            for tile in range(layout.padded_length // queries):
                mine = indices[batch, tile * queries : (tile + 1) * queries, head]
                expected = sorted(set(mine[mine >= 0].tolist()))
                assert union[x, tile, : steps[x, tile]].tolist() == expected
                for slot, block in enumerate(expected):
                    owners = {t for t in range(queries) if members[x, tile, slot] >> t & 1}
                    assert owners == {t for t, row in enumerate(mine.tolist()) if block in row}
                    found.setdefault((x, block), []).append((tile, int(members[x, tile, slot])))
    start, tiles, bits = map(np.asarray, turned[:3])
    for x in range(4):
        for block in range(blocks):
            here = slice(start[x, block], start[x, block + 1])
            pairs = list(zip(tiles[x, here].tolist(), bits[x, here].tolist(), strict=True))
            assert pairs == found.get((x, block), [])


def test_ranges_cover_what_rows_see_and_no_more():
    random = np.random.default_rng(0)
    first = random.integers(0, 90, (2, 64))
    end = np.minimum(first + random.integers(-5, 60, first.shape), 100)
    first[0, :16], end[0, :16] = 0, 0  # a tile that sees nothing
    visible = Visible(jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32))
    plan = ranges(visible, 16, 8)
    readers_of = np.asarray(readers(plan, 13))
    for b in range(2):
        for p in range(4):
            rows = [set(range(first[b, r], end[b, r])) for r in range(p * 16, p * 16 + 16)]
            seen = sorted({key // 8 for row in rows for key in row})
            start, full_start, full_end, stop = np.asarray(plan.bounds)[b, p].tolist()
            assert (start, stop) == ((seen[0], seen[-1] + 1) if seen else (0, 0))
            assert start <= full_start <= full_end <= stop
            for tile in range(full_start, full_end):
                assert all(set(range(tile * 8, tile * 8 + 8)) <= row for row in rows)
            for tile in seen:
                assert readers_of[b, tile, 0] <= p < readers_of[b, tile, 1]


def test_forced_blocks_are_read_once_per_tile_of_queries():
    """In the order of the queries: the first block and the two local ones are those of all queries of a tile,
    so the union holds no more than them and the free choices."""
    random = np.random.default_rng(0)
    length, groups, free, blocks = 1024, 4, 3, 16
    newest = np.arange(length) // 64
    indices = np.full((length, 3 + free), -1, np.int32)
    for t, block in enumerate(newest):
        forced = sorted({0, max(block - 1, 0), block})
        others = sorted(set(range(1, block - 1)))
        chosen = sorted(forced + random.permutation(others)[:free].astype(int).tolist())
        indices[t, : len(chosen)] = chosen
    layout = plan_rows(length, groups, 128)
    queries = layout.queries(128)
    plan = jax.jit(lists, static_argnums=(0, 2, 3, 4))(
        layout, TilesOfBlocks(jnp.asarray(indices)[None, :, None], None), blocks, 128, 2
    )
    steps, union, members = (np.asarray(x)[0] for x in plan[:3])
    everyone = (1 << queries) - 1
    for p in range(length // queries):
        block = int(newest[p * queries])
        forced = {0, max(block - 1, 0), block}
        chosen = indices[p * queries : (p + 1) * queries]
        others = set(chosen[chosen >= 0].tolist()) - forced
        assert steps[p] == len(forced) + len(others) <= 3 + queries * free
        read = dict(zip(union[p, : steps[p]].tolist(), members[p].tolist(), strict=False))
        assert all(read[j] & everyone == everyone for j in forced)
