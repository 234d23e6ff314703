"""Made-up indices: legal ones, as alike as asked."""

import numpy as np
import pytest

from kernels_pallas.nsa.specs.arg_specs import ArgSpec
from kernels_pallas.nsa.specs.synthetic import overlapping_indices

SPEC = ArgSpec(16384, kv_heads=2, batch=1)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8, 1.0])
def test_every_query_has_its_forced_blocks_and_the_overlap_is_that_asked(overlap):
    indices = overlapping_indices(SPEC, overlap)
    assert indices.shape == (1, 2, 16384, 16)
    for t in (0, 63, 64, 130, 1000, 1023, 1024, 9000, 16383):
        for row in indices[0, :, t].tolist():
            newest, there = t // 64, [j for j in row if j >= 0]
            assert row == there + [-1] * (16 - len(there))
            assert there == sorted(set(there))
            assert len(there) == min(16, newest + 1)
            assert {0, newest, max(0, newest - 1)} <= set(there)
            assert there[-1] == newest
    late = np.asarray(indices)[:, :, 4096:]
    newest = np.arange(4096, 16384) // 64
    free = (late > 0) & (late < newest[:, None] - 1)
    kept = [
        len({*a[f].tolist()} & {*b[g].tolist()}) / f.sum()
        for head in range(2)
        for a, f, b, g in zip(
            late[0, head, 1:], free[0, head, 1:], late[0, head, :-1], free[0, head, :-1], strict=True
        )
    ]
    assert np.mean(kept) == pytest.approx(overlap, abs=0.02)
    assert (free.sum(axis=-1) == 13).all()


def test_heads_differ_and_seeds_give_the_same_again():
    a, b = (overlapping_indices(SPEC, 0.5, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert (a[0, 0] != a[0, 1]).any()
    assert (a != overlapping_indices(SPEC, 0.5, seed=4)).any()


def test_an_overlap_is_a_share():
    with pytest.raises(ValueError, match="between 0 and 1"):
        overlapping_indices(SPEC, 1.5)
