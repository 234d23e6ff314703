"""The programs of the check compile for an H100 without one: what runs there first, both ways to wgmma."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa.checking import CASES, SMALL_CASES, CheckCase, comparison
from kernels_pallas.nsa.mosaic_gpu import tuning
from kernels_pallas.nsa.specs import h100
from kernels_pallas.target import compiled_elsewhere

pytestmark = [pytest.mark.slow, pytest.mark.skipif(h100.missing() is not None, reason=str(h100.missing()))]


def operands(case: CheckCase):
    like = case.shapes()
    if case.segments:
        tokens = jax.ShapeDtypeStruct(like["k_slc"].shape, jnp.float32)
        blocks = jax.eval_shape(lambda x: comparison._compressed(case, x), tokens).shape[1]
        for name in ("k_cmp", "v_cmp"):
            x = like[name]
            like[name] = jax.ShapeDtypeStruct((x.shape[0], blocks, *x.shape[2:]), x.dtype)
    return like


@pytest.mark.parametrize(
    ("case", "registers"),
    [
        *((case, registers) for case in SMALL_CASES for registers in (True, False)),
        *((case, True) for case in CASES if case.length == 4097),
    ],
    ids=lambda x: x.label if isinstance(x, CheckCase) else "registers" if x else "shared memory",
)
def test_forward_and_backward_compile(dump, case, registers):
    function = comparison._function(case, "whole", "mosaic_gpu")

    def step(args, d_outputs):
        results, pull, indices = jax.vjp(lambda x: function(x, None), args, has_aux=True)
        return results, indices, pull(d_outputs)[0]

    with compiled_elsewhere(), tuning.forced(registers=registers):
        report = h100.compile_for_h100(step, operands(case), (case.output(),) * 4, dump=dump)
    assert len(report.kernels) >= 4
    if registers:
        assert not any(kernel.spilled_bytes for kernel in report.kernels)
