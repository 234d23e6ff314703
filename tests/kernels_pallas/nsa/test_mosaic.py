"""The Hopper kernels in Pallas' GPU interpreter, against the float64 oracle and the XLA implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import (
    compressed_attention,
    mosaic_blocks,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.mosaic_forward import Visible
from kernels_pallas.nsa.mosaic_plan import inverse, lists, plan_rows, ranges, readers
from kernels_pallas.nsa.support import OLDEST_JAX, interpreted
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import Case, cotangents, relative_error

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)
PACKED = Case(
    96,
    heads=3,
    kv_heads=1,
    key_dim=60,
    value_dim=40,
    block_size=64,
    num_blocks=1,
    num_init=0,
    num_local=0,
    window=40,
    segments=(70, 14, -5, 7),
)


def poisoned(case: Case, args: dict) -> dict:
    """NaN wherever a token is padding, in blocks that touch padding too."""
    if case.segment_ids is None:
        return args
    padding = np.asarray(case.segment_ids == 0)
    starts = np.arange(case.blocks) * case.stride
    touched = np.stack([padding[:, s : s + case.block_len].any(axis=1) for s in starts], axis=1)
    hide = lambda x, where: jnp.where(where[..., None, None], jnp.nan, x).astype(x.dtype)
    return {
        k: x if k == "gates" else hide(x, touched if k.endswith("cmp") else padding) for k, x in args.items()
    }


@needs_pallas
def test_whole_attention_with_packed_sequences_and_poisoned_padding(monkeypatch):
    """Outputs, chosen blocks and all gradients; selection in the order of the queries."""
    monkeypatch.setattr(mosaic_blocks, "MOST_HEADS", 0)
    case = PACKED
    args = {k: x.astype(jnp.bfloat16) for k, x in case.arguments().items()}
    d_outputs = [w.astype(jnp.bfloat16) for w in cotangents(case)]

    def attention(args):
        out, branches = nsa_attention(
            **args, **case.sizes, segment_ids=case.segment_ids, implementation="mosaic_gpu"
        )
        return (out, *branches[:3]), branches.indices

    @jax.jit
    def step(args, d_outputs):
        outputs, pull, indices = jax.vjp(attention, args, has_aux=True)
        return outputs, indices, pull(tuple(d_outputs))[0]

    with interpreted():
        outputs, indices, gradients = jax.tree.map(np.asarray, step(poisoned(case, args), d_outputs))

    args = {k: x.astype(jnp.float32) for k, x in args.items()}
    chosen, _ = oracle.brute_force_choice(
        args["q"][0], args["k_cmp"][0], case.length, case.sizes, case.segment_ids[0]
    )
    for head in range(case.kv_heads):
        for t in range(case.length):
            assert [j for j in indices[0, head, t].tolist() if j >= 0] == chosen[head][t], (head, t)
    expected, expected_gradients = oracle.batched_nsa(
        args, indices, case.sizes, [d.astype(jnp.float32) for d in d_outputs], case.segment_ids
    )
    for name, x, reference in zip(("total", "cmp", "slc", "win"), outputs, expected, strict=True):
        assert relative_error(x, reference, floor=1e-3) < 0.005, name
    for name, reference in expected_gradients.items():
        assert relative_error(gradients[name], reference) < 0.005, name


@needs_pallas
def test_a_chunk_of_queries_with_sixteen_heads_at_the_end_of_the_keys():
    """Positions, two tiles of rows that share the union of their blocks, tiles seen in full; a second run
    gives the same bits."""
    length, queries = 330, 8
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
    q, k, v = draw(1, queries, 16, 64), draw(1, length, 1, 64), draw(1, length, 1, 64)
    k_cmp, v_cmp = draw(1, 81, 1, 64), draw(1, 81, 1, 64)  # blocks of 8 every 4
    positions = jnp.arange(length - queries, length, dtype=jnp.int32)[None]

    def run(q, k, v, k_cmp, v_cmp, name):
        place = {"q_positions": positions, "implementation": name}
        blocks = {"block_len": 8, "stride": 4}
        compressed, lse = compressed_attention(q, k_cmp, v_cmp, **blocks, **place)
        indices = select_blocks(
            q, k_cmp, lse, block_size=64, num_blocks=3, num_local=1, kv_len=length, **blocks, **place
        )
        selected = selected_attention(q, k, v, indices, block_size=64, **place)
        wide = selected_attention(q, k, v, jnp.minimum(indices[..., :2], 2), block_size=128, **place)
        recent = window_attention(q, k, v, window=200, **place)
        return compressed, lse, selected, wide, recent, indices

    # Half of the queries choose others, so that rows of one tile differ in what they see.
    with interpreted():
        kernels = jax.jit(run, static_argnums=5)
        *found, indices = jax.tree.map(np.asarray, kernels(q, k, v, k_cmp, v_cmp, "mosaic_gpu"))
        again = kernels(q, k, v, k_cmp, v_cmp, "mosaic_gpu")
    for x, y in zip((*found, indices), again, strict=True):
        assert x.tobytes() == np.asarray(y).tobytes()
    assert len(np.unique(np.asarray(indices)[0, 0], axis=0)) > 2
    wide = [x.astype(jnp.float32) for x in (q, k, v, k_cmp, v_cmp)]
    *expected, expected_indices = jax.jit(run, static_argnums=5)(*wide, "xla")
    np.testing.assert_array_equal(indices, expected_indices)
    for x, reference in zip(found, expected, strict=True):
        assert relative_error(x, reference) < 0.005


@pytest.mark.parametrize("largest", [np.iinfo(np.int32).max, 8])
def test_unions_and_their_inverse_hold_every_choice(monkeypatch, largest):
    """Against sets, for queries that do not fill a tile and slots that are missing; block and tile as one key
    and, as if they were too many for that, as two."""
    monkeypatch.setattr("kernels_pallas.nsa.mosaic_plan.LARGEST", largest)
    random = np.random.default_rng(0)
    length, chosen, blocks, rows = 37, 3, 9, 64
    layout = plan_rows(length, 5, rows)
    queries = layout.queries(rows)
    assert queries == 8  # five heads are padded to eight
    indices = np.sort(
        random.permuted(np.tile(np.arange(blocks), (2, length, 2, 1)), axis=3)[..., :chosen], axis=3
    )
    indices[random.random(indices.shape) < 0.2] = -1
    plan = lists(layout, jnp.asarray(indices, jnp.int32), blocks, rows, 1)
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
    start, tiles, bits = map(np.asarray, turned)
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


@needs_pallas
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "TF32"),
        ({"key_dim": 200}, "head dims 200/64 are above"),
        ({"heads": 65}, "65 query heads"),
        ({"block_size": 32}, "block_size 32 is no multiple of 64"),
        ({"length": 0}, "no queries"),
        ({"place": "device"}, "no Hopper GPU"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_its_reason(change, reason):
    sizes = {"dtype": jnp.bfloat16, "key_dim": 64, "heads": 2, "block_size": 64, "length": 4} | change
    q = jnp.zeros((1, sizes["length"], sizes["heads"], sizes["key_dim"]), sizes["dtype"])
    k, v = q[:, :, :1], jnp.zeros((1, sizes["length"], 1, 64), sizes["dtype"])
    indices = jnp.zeros((1, 1, sizes["length"], 1), jnp.int32)

    def call():
        selected_attention(q, k, v, indices, block_size=sizes["block_size"], implementation="mosaic_gpu")

    if "place" in change:
        with pytest.raises(NotImplementedError, match=reason):
            call()
    else:
        with interpreted(), pytest.raises(NotImplementedError, match=reason):
            call()
