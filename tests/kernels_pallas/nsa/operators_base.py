"""What each implementation must give, by the float64 oracle: inherit `OperatorTests` and say how it runs."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa import (
    Implementation,
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from tests.kernels_pallas.nsa import oracle
from tests.kernels_pallas.nsa.cases import Case, cotangents, relative_error

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
    segments=(5, 73, -4, 11, -3),
)
"""The second text begins at no multiple of anything, and its first block ends within another tile of keys."""
QUERIES = np.linspace(0, 95, 32).round().astype(int)
"""Positions of the queries: of every segment, and of padding."""


def poisoned(case: Case, args: dict) -> dict:
    """NaN wherever a token is padding, and in slots of no compressed block."""
    padding = np.asarray(case.segment_ids == 0)
    slots = oracle.compressed_slots(case.length, case.block_len, case.stride, np.asarray(case.segment_ids)[0])
    touched = np.asarray([[slot not in slots for slot in range(case.blocks)]])
    hide = lambda x, where: jnp.where(where[..., None, None], jnp.nan, x).astype(x.dtype)
    where = {"q": padding[:, QUERIES], "gates": np.zeros_like(padding[:, QUERIES])}
    where |= {"k_cmp": touched, "v_cmp": touched}
    return {name: hide(x, where.get(name, padding)) for name, x in args.items()}


class OperatorTests:
    """The tests of one implementation."""

    implementation: Implementation
    dtype: jax.typing.DTypeLike
    tolerance: float
    """Of the RMS of errors over that of the oracle's numbers, from arguments that are rounded to `dtype`."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Where its operators are traced and run."""
        return contextlib.nullcontext()

    def test_whole_attention_with_packed_sequences_and_poisoned_padding(self):
        """Outputs, selected blocks and all gradients of queries among packed keys, NaN in all padding."""
        case, names = PACKED, ("q", "gates")
        args = case.arguments(dtype=self.dtype)
        args |= {name: args[name][:, QUERIES] for name in names}
        d_outputs = [w[:, QUERIES].astype(self.dtype) for w in cotangents(case)]
        positions = jnp.asarray(QUERIES[None], jnp.int32)

        def attention(args):
            out, branches = nsa_attention(
                **args,
                **case.sizes,
                segment_ids=case.segment_ids,
                q_positions=positions,
                implementation=self.implementation,
            )
            return (out, *branches[:3]), branches.indices

        @jax.jit
        def step(args, d_outputs):
            outputs, pull, indices = jax.vjp(attention, args, has_aux=True)
            return outputs, indices, pull(tuple(d_outputs))[0]

        with self.running():
            outputs, indices, gradients = jax.tree.map(np.asarray, step(poisoned(case, args), d_outputs))

        wide = {name: np.asarray(x, np.float64) for name, x in args.items()}
        segments = case.segment_ids[0]
        chosen, _ = oracle.brute_force_choice(
            wide["q"][0], wide["k_cmp"][0], case.length, case.sizes, segments, QUERIES
        )
        for head in range(case.kv_heads):
            for t in range(len(QUERIES)):
                assert [j for j in indices[0, head, t].tolist() if j >= 0] == chosen[head][t], (head, t)
        expected, expected_gradients = oracle.batched_nsa(
            wide, indices, case.sizes, d_outputs, case.segment_ids, positions
        )
        for name, x, reference in zip(("total", "cmp", "slc", "win"), outputs, expected, strict=True):
            assert x.dtype == self.dtype
            assert relative_error(x, reference, floor=1e-3) < self.tolerance, name
        for name, reference in expected_gradients.items():
            assert relative_error(gradients[name], reference) < self.tolerance, name
        padding = np.asarray(case.segment_ids)[:, QUERIES] == 0
        assert padding.any()
        assert all((x[padding] == 0).all() for x in outputs)

    def test_a_chunk_of_queries_with_sixteen_heads_at_the_end_of_the_keys(self):
        """Tiles seen in full, blocks of two sizes, rows of one tile that share the union of their blocks, and
        NaN in the future of all queries, in the tiles that they read."""
        length, heads, positions = 336, 16, np.arange(322, 330)
        random = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(random.standard_normal((1, *shape)), self.dtype)
        q, k, v = draw(8, heads, 64), draw(length, 1, 64), draw(length, 1, 64)
        k_cmp, v_cmp = draw(83, 1, 64), draw(83, 1, 64)  # blocks of 8 every 4

        @jax.jit
        def run(q, k, v, k_cmp, v_cmp):
            place = {
                "q_positions": jnp.asarray(positions[None], jnp.int32),
                "implementation": self.implementation,
            }
            blocks = {"block_len": 8, "stride": 4}
            compressed, lse = compressed_attention(q, k_cmp, v_cmp, **blocks, **place)
            indices = select_blocks(
                q, k_cmp, lse, block_size=64, num_blocks=3, num_local=1, kv_len=length, **blocks, **place
            )
            selected = selected_attention(q, k, v, indices, block_size=64, **place)
            wide = selected_attention(q, k, v, jnp.minimum(indices[..., :2], 2), block_size=128, **place)
            recent = window_attention(q, k, v, window=200, **place)
            return compressed, lse, selected, wide, recent, indices

        with self.running():
            unseen = [
                x.at[:, start:].set(jnp.nan) for x, start in ((k, 330), (v, 330), (k_cmp, 81), (v_cmp, 81))
            ]
            *found, indices = jax.tree.map(np.asarray, run(q, *unseen))

        q, k, v, k_cmp, v_cmp = (np.asarray(x[0], np.float64) for x in (q, k, v, k_cmp, v_cmp))
        tokens = oracle.visible_tokens(length, None, positions)
        blocks, scale = oracle.visible_blocks(tokens, 8, 4), 64**-0.5

        def attend(keys, values, mask):
            weights = [oracle.softmax(q[:, h], keys[:, 0], mask, scale) for h in range(heads)]
            return np.stack(weights, 1), np.stack([w @ values[:, 0] for w in weights], 1)[None]

        def of_blocks(rows, size):
            return tokens & (rows[:, :, None] == np.arange(length) // size).any(axis=1)

        weights, compressed = attend(k_cmp, v_cmp, blocks)
        scores = oracle.importance(weights.sum(axis=1), length, 8, 4, 64)
        chosen = np.asarray(oracle.choose(scores, tokens, positions, 64, 3, 1, 1))
        assert len(np.unique(chosen, axis=0)) > 2  # rows of one tile differ in what they see
        np.testing.assert_array_equal(indices[0, 0], chosen)
        scores = np.where(blocks[:, None], np.einsum("thd,sd->ths", q, k_cmp[:, 0]) * scale, -np.inf)
        lse = np.log(np.exp(scores).sum(axis=2))[None]
        expected = [
            compressed,
            lse,
            attend(k, v, of_blocks(chosen, 64))[1],
            attend(k, v, of_blocks(np.minimum(chosen[:, :2], 2), 128))[1],
            attend(k, v, tokens & (positions[:, None] - np.arange(length) < 200))[1],
        ]
        for x, reference in zip(found, expected, strict=True):
            assert relative_error(x, reference) < self.tolerance
