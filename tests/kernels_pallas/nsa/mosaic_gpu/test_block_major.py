"""Selected attention in the order of the blocks: the plan against sets, the kernels in Pallas' GPU
interpreter against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import selected_attention
from kernels_pallas.nsa.base import Block, Positions
from kernels_pallas.nsa.mosaic_gpu import block_major_plan, operators
from kernels_pallas.nsa.mosaic_gpu.block_major_plan import lay_out, sort_entries
from kernels_pallas.target import OLDEST_JAX, interpreted
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import random_selection, relative_error

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)


def shrink(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(block_major_plan, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(block_major_plan, "ROWS_PER_BLOCK", 1)


def expected_of(q, k, v, indices, d_out, segments):
    """Output and gradients of one row of a batch, by the oracle."""
    q, k, v, d_out = (np.asarray(x, np.float64)[0] for x in (q, k, v, d_out))
    out, dq, dk, dv = np.zeros_like(d_out), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    groups = q.shape[1] // k.shape[1]
    tokens = oracle.visible_tokens(len(k), segments)
    for head in range(q.shape[1]):
        group = head // groups
        mask = oracle.selected_tokens(tokens, indices[0, group], np.arange(len(k)), 64, segments)
        out[:, head], dq[:, head], d_keys, d_values = oracle.attend(
            q[:, head], k[:, group], v[:, group], mask, q.shape[-1] ** -0.5, d_out[:, head]
        )
        dk[:, group] += d_keys
        dv[:, group] += d_values
    return [x[None] for x in (out, dq, dk, dv)]


def attention_and_gradients(q, k, v, indices, d_out, segments):
    out, pull = jax.vjp(
        lambda *a: selected_attention(
            *a, indices, block_size=64, segment_ids=segments, implementation="mosaic_gpu"
        ),
        q,
        k,
        v,
    )
    return (out, *pull(d_out))


@needs_pallas
@pytest.mark.parametrize(
    ("length", "groups", "kv_heads", "dims", "segments", "rows"),
    [
        (85, 3, 1, (60, 40), (7, 67, -5, 6), 300),  # two chunks of queries, of which the second is cut
        pytest.param(70, 1, 2, (64, 64), None, 1000, marks=pytest.mark.slow),  # both heads at once
    ],
)
def test_outputs_and_gradients(monkeypatch, length, groups, kv_heads, dims, segments, rows):
    """With slots that are missing, in the future, or in another segment, and NaN in the last token, which
    reaches no output or gradient of those before; in the slow case a second run gives the same bits."""
    shrink(monkeypatch, rows)
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal((1, length, *shape)), jnp.bfloat16)
    heads = groups * kv_heads
    q, k, v = draw(heads, dims[0]), draw(kv_heads, dims[0]), draw(kv_heads, dims[1])
    d_out = draw(heads, dims[1]).at[:, -1].set(0)
    indices = random_selection(random, (1, kv_heads, length, 2), 2)
    indices[random.random(indices.shape) < 0.2] = -1
    ids = None
    if segments is not None:
        ids = np.concatenate([np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(segments)])
    operands = (q, k, v, jnp.asarray(indices, jnp.int32), d_out)
    segment_ids = None if ids is None else jnp.asarray(ids[None], jnp.int32)
    poisoned = (q, *(x.at[:, -1].set(jnp.nan) for x in (k, v)), *operands[3:])
    with interpreted():
        step = jax.jit(attention_and_gradients)
        found = jax.tree.map(np.asarray, step(*poisoned, segment_ids))
        again = found if segments else step(*poisoned, segment_ids)
    for x, y in zip(found, again, strict=True):
        assert x.tobytes() == np.asarray(y).tobytes()
    expected = expected_of(*operands, ids)
    for name, x, reference in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(x[:, :-1], reference[:, :-1], floor=1e-3) < 0.005, name


@pytest.mark.parametrize("groups", [1, 3, 16])
def test_sorted_entries_hold_every_visible_choice_once(groups):
    """Against sets: queries, intervals, what each tile of rows reads and who reads each block."""
    random = np.random.default_rng(groups)
    heads, queries, slots, blocks, rows = 2, 50, 3, 6, 128
    indices = random_selection(random, (heads, queries, slots), blocks)
    indices[random.random(indices.shape) < 0.2] = -1
    indices[0, 0, 0] = blocks  # there is none
    first = random.integers(0, 64 * blocks, (heads, queries))
    end = np.minimum(first + random.integers(-20, 300, first.shape), 64 * blocks)
    layout = lay_out((1, queries, heads, slots), groups, blocks, rows)
    assert (layout.heads, layout.queries) == (heads, queries)
    of_slots = (np.broadcast_to(x[..., None], indices.shape) for x in (first, end))
    operands = (jnp.asarray(x, jnp.int32) for x in (indices, *of_slots))
    entries = jax.tree.map(np.asarray, jax.jit(sort_entries, static_argnums=0)(layout, *operands))
    of_entry = layout.padded_groups
    assert entries.visible.first.shape[1] % rows == 0
    for x in range(heads):
        seen = {
            (j, t): (max(first[x, t], 64 * j), min(end[x, t], 64 * j + 64))
            for t in range(queries)
            for j in indices[x, t].tolist()
            if 0 <= j < blocks and max(first[x, t], 64 * j) < min(end[x, t], 64 * j + 64)
        }
        limits = np.stack([entries.visible.first[x], entries.visible.end[x]], 1).reshape(-1, of_entry, 2)
        assert (limits == limits[:, :1]).all()  # the heads of a query see the same
        limits = limits[:, 0]
        used = np.flatnonzero(limits[:, 0] < limits[:, 1])
        found = [(int(limits[e, 0]) // 64, int(entries.query[x, e])) for e in used]
        assert found == sorted(seen)
        assert [tuple(limits[e]) for e in used] == [seen[pair] for pair in found]
        block_of = dict(zip(used.tolist(), (j for j, _ in found), strict=True))
        per_tile = rows // of_entry
        for p, bounds in enumerate(entries.plan.bounds[x].tolist()):
            mine = {block_of[e] for e in range(p * per_tile, (p + 1) * per_tile) if e in block_of}
            assert len(mine) <= 1
            assert set(range(bounds[0], bounds[3])) == mine
            for j in mine:
                begin, stop = entries.readers[x, j]
                assert begin <= 2 * p < 2 * p + 2 <= stop
        assert (np.diff(entries.readers[x].reshape(-1)) >= 0).all()
        for t in range(queries):
            for slot in range(slots):
                j = int(indices[x, t, slot])
                assert entries.there[x, t, slot] == ((j, t) in seen)
                if (j, t) in seen:
                    place = int(entries.place[x, t, slot])
                    assert (block_of[place], entries.query[x, place]) == (j, t)


@pytest.mark.parametrize(
    ("length", "groups", "heads", "queries"),
    [
        (65536, 1, 2, 65536),
        (65536, 8, 1, 16384),
        (2048, 4, 16, 2048),
        (1 << 20, 1, 1, 1 << 19),
        (1, 64, 16, 1),
    ],
)
def test_work_is_cut_to_the_rows_at_once(length, groups, heads, queries):
    layout = lay_out((1, length, 16, 16), groups, -(-length // 64), 128)
    assert (layout.heads, layout.queries) == (heads, queries)


def test_cutting_and_joining_rows_are_inverse(monkeypatch):
    shrink(monkeypatch, 40)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 13, 3, 5, 7)), jnp.float32)
    layout = lay_out((2, 13, 3, 2), 5, 1, 128)
    rows = layout.cut_rows(x, 4)
    assert rows.shape == (6, 5, 1, 3, 8 * 8)
    np.testing.assert_array_equal(layout.join_rows(rows, 7), x)


def test_small_groups_take_the_order_of_the_blocks_unless_told(monkeypatch):
    taken = []
    monkeypatch.setattr(operators, "attend_by_block", lambda op, q, *_: taken.append("blocks") or (q,))
    monkeypatch.setattr(operators, "attend", lambda op, q, *_: taken.append("queries") or (q,))

    def select(groups, order=None):
        q, k = jnp.zeros((1, 2, 1, groups, 64), jnp.bfloat16), jnp.zeros((1, 2, 1, 64), jnp.bfloat16)
        places = Positions(jnp.arange(2, dtype=jnp.int32)[None])
        operators.selected_attention(
            Block(64, 1.0), q, k, k, jnp.zeros((1, 2, 1, 1), jnp.int32), places, order=order
        )
        return taken.pop()

    most = operators.MOST_HEADS_BY_BLOCK
    assert [select(n) for n in (1, most, most + 1, 64)] == ["blocks", "blocks", "queries", "queries"]
    assert (select(1, "queries"), select(64, "blocks")) == ("queries", "blocks")
