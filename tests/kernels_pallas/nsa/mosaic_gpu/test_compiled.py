"""The Hopper kernels compiled for an H100 at the sizes of the list: no spilled registers, shared memory that
a block may have, linear memory."""

from collections import Counter

import jax
import pytest

from kernels_pallas.nsa import nsa_attention
from kernels_pallas.nsa.specs import h100
from kernels_pallas.nsa.specs.arg_specs import with_tag
from kernels_pallas.target import compiled_elsewhere

pytestmark = pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or "")

SPECS = with_tag("compile")
KERNELS = {"nsa_forward": 3, "nsa_choice": 1, "nsa_query_gradient": 3, "nsa_key_gradients": 3}
"""One of each for compression, selection and window."""
QUICK = [name for name, spec in SPECS.items() if spec.length == 65536]


def step(args, d_out):
    out, pull = jax.vjp(lambda a: nsa_attention(**a, implementation="mosaic_gpu")[0], args)
    return out, pull(d_out)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SPECS]
)
def test_forward_and_backward(dump, name):
    spec = SPECS[name]
    with compiled_elsewhere():
        report = h100.compile_for_h100(step, spec.shapes(), spec.output(), dump=dump)
    print(report)
    assert Counter(kernel.name for kernel in report.kernels) == KERNELS
    for kernel in report.kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.registers <= 168, kernel  # three warpgroups fill the register file with more
        assert 0 < kernel.shared_bytes <= h100.SHARED_BYTES, kernel
    # Shares of attention exist in chunks (128 MiB and a few copies) and the rest is linear in the tokens: at
    # 65,536 tokens a score of every query for every block would take 1 GiB by itself.
    assert report.temporary_bytes < 2**30 + 2.5 * report.argument_bytes


def test_forward_and_backward_at_a_million_tokens_are_lowered(dump):
    """Through Pallas into what XLA would compile: shapes only."""
    spec = with_tag("shapes")["a million tokens"]
    with compiled_elsewhere():
        lowered = jax.jit(step).trace(spec.shapes(), spec.output()).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") >= sum(KERNELS.values())
