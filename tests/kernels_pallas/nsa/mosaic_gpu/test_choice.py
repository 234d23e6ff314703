"""The kernel that selects blocks, in the interpreter against scores in float64: sets, near-ties by score."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa.base import SelectionGrid, num_compressed, overlap
from kernels_pallas.nsa.mosaic_gpu import choice
from kernels_pallas.nsa.mosaic_gpu.choice_plan import Texts, select_on_chip
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.target import OLDEST_JAX, interpreted

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}"
)

NEAR = 2.0**-12
"""Blocks whose importance differs by less, relatively, may stand for each other."""


class Case(NamedTuple):
    keys: int
    queries: int
    groups: int
    kv_heads: int = 1
    dim: int = 64
    num_blocks: int = 16
    block_size: int = 64
    texts: tuple[int, ...] = ()
    """Lengths of packed texts, each of which counts its blocks from its own start."""
    most_tiles: int | None = None

    @property
    def grid(self) -> SelectionGrid:
        return SelectionGrid(32, 16, self.block_size, self.num_blocks, 1, 2, self.keys, self.dim**-0.5)


CASES = {
    "taken on over three parts": Case(6500, 8, 16, most_tiles=4),
    "packed at unaligned starts": Case(
        3500, 16, 16, texts=(1000, 13, 50, 21, 716, 1700), num_blocks=7, most_tiles=4
    ),
    "four heads": Case(2500, 16, 4, num_blocks=5),
    "padded heads, few blocks": Case(200, 11, 6, kv_heads=2, num_blocks=6),
    "sixty-four heads, blocks of 128": Case(4000, 4, 64, block_size=128, num_blocks=5),
}


def draw(case: Case):
    random = np.random.default_rng(0)
    length = case.keys
    slots = num_compressed(length, 32, 16) + bool(case.texts)
    t = np.sort(random.choice(length, case.queries, replace=False))
    cuts = np.asarray(case.texts or (length,))
    start = np.repeat(np.concatenate([[0], np.cumsum(cuts)[:-1]]), cuts)[t]
    origin = -(-start // 16)
    end = np.minimum(origin + np.maximum((t - start - 31) // 16 + 1, 0), slots)
    newest = (t - start) // case.block_size
    normal = lambda *shape: jnp.asarray(random.standard_normal((1, *shape)), jnp.bfloat16)
    q = normal(case.queries, case.kv_heads, case.groups, case.dim)
    k = normal(slots, case.kv_heads, case.dim)
    return q, k, origin, end, newest


def expected(case: Case, q, k, origin, end, newest):
    """Log-sum-exps, and the importance of every block: inf for forced ones, -inf for no candidates."""
    grid, slots = case.grid, k.shape[1]
    q, k = (np.asarray(x[0], np.float64) for x in (q, k))
    scores = np.einsum("thgd,mhd->htgm", q, k) * grid.scale
    slot = np.arange(slots)
    seen = (slot >= origin[:, None]) & (slot < end[:, None])
    scores = np.where(seen[None, :, None], scores, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=3)
    shares = np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None]).sum(axis=2)
    importance = np.zeros((*shares.shape[:2], grid.candidates))
    for j in range(grid.candidates):
        for i in range(max(0, (j * grid.block_size - 32) // 16), (j + 1) * grid.block_size // 16 + 1):
            at = origin + i
            taken = shares[:, np.arange(len(at)), np.minimum(at, slots - 1)]
            weight = overlap(i * 16, 32, j * grid.block_size, grid.block_size) / 16
            importance[:, :, j] += weight * np.where(at < slots, taken, 0)
    j = np.arange(grid.candidates)
    forced = (j < grid.num_init) | (j > newest[:, None] - grid.num_local)
    importance = np.where(forced, np.inf, importance)
    return np.moveaxis(lse, 0, 1)[None], np.where(j <= newest[:, None], importance, -np.inf)


def select(case: Case, q, k, lse, origin, end, newest):
    row = lambda x: jnp.asarray(x[None], jnp.int32)
    texts = Texts(row(origin), row(end), row(origin) if case.texts else None, row(newest))
    spread = choice.spread_of(case.grid)
    tuning = Tuning(warpgroups=1, registers=False)
    with interpreted():
        run = jax.jit(
            lambda q, k, lse: select_on_chip(case.grid, spread, q, k, lse, texts, tuning, case.most_tiles)
        )
        arguments = q, k, jnp.asarray(lse, jnp.float32)
        return np.asarray(run(*arguments)[0])


def wrong(case: Case, found, importance) -> list[tuple[int, int]]:
    """Heads and queries whose blocks are not the best ones, in ascending order, then -1."""
    bad = []
    for head, query in np.ndindex(found.shape[:2]):
        worth, mine = importance[head, query], found[head, query]
        order = np.lexsort((np.arange(len(worth)), -worth))[: case.num_blocks]
        want = sorted(j for j in order.tolist() if worth[j] > -np.inf)
        mine = mine[mine >= 0].tolist()
        whole = mine + [-1] * (case.num_blocks - len(mine))
        exchanged = [worth[j] for j in set(mine) ^ set(want)]
        least, most = min(exchanged, default=0), max(exchanged, default=0)
        near = -np.inf < least and most < np.inf and most - least <= NEAR * most
        in_order = mine == sorted(set(mine)) and whole == found[head, query].tolist()
        if not in_order or len(mine) != len(want) or not near:
            bad.append((head, query))
    return bad


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i < 2 else pytest.mark.slow) for i, name in enumerate(CASES)]
)
def test_the_best_blocks_are_selected(name):
    case = CASES[name]
    q, k, *where = draw(case)
    lse, importance = expected(case, q, k, *where)
    if case.keys > 1000:  # most queries leave blocks out, so there is something to get wrong
        assert np.mean((importance > -np.inf).sum(axis=2) > case.num_blocks) >= 0.5
    assert wrong(case, select(case, q, k, lse, *where), importance) == []


@pytest.mark.slow
def test_the_check_finds_a_wrong_overlap_and_repeats_are_equal(monkeypatch):
    case = CASES["taken on over three parts"]
    q, k, *where = draw(case)
    lse, importance = expected(case, q, k, *where)
    first = select(case, q, k, lse, *where)
    np.testing.assert_array_equal(first, select(case, q, k, lse, *where))
    right = choice.overlaps
    shifted = lambda *args: np.roll(right(*args), 1, axis=2)  # each key counts where its neighbour lies
    monkeypatch.setattr(choice, "overlaps", shifted)
    assert wrong(case, select(case, q, k, lse, *where), importance)


def test_blocks_that_the_kernel_cannot_do():
    grid = CASES["four heads"].grid
    assert choice.spread_of(grid) == choice.Spread(4, 18)
    assert choice.spread_of(grid._replace(stride=24)) is None
    assert choice.spread_of(grid._replace(block_len=64, stride=64)) is None  # 65 rows a tile of keys


def test_equal_importance_takes_the_lowest_index():
    """All keys alike: only the forced blocks and then the first ones."""
    case = Case(4200, 8, 16, num_blocks=9, most_tiles=4)
    q, k, *where = draw(case)
    q = jnp.zeros_like(q)
    lse, _ = expected(case, q, k, *where)
    found = select(case, q, k, lse, *where)
    for query, newest in enumerate(where[2]):
        # Blocks inside have weights 1, 2, 2, 2, 1; the first lacks its first.
        inside = [j for j in range(1, newest - 1)][:6]
        want = sorted({0, newest, newest - 1} | set(inside))
        assert [j for j in found[0, query].tolist() if j >= 0] == want
