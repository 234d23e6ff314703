"""What is moved between the kernels at 65,536 tokens, read from what XLA compiles for an H100."""

import jax
import pytest

from kernels_pallas.nsa import nsa_attention
from kernels_pallas.nsa.specs import counts, h100
from kernels_pallas.nsa.specs.arg_specs import with_tag
from kernels_pallas.nsa.specs.outside import outside
from kernels_pallas.nsa.specs.synthetic import overlapping_indices
from kernels_pallas.target import compiled_elsewhere

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or ""),
]

MOST = {
    # GB forward, GB forward and backward, launches forward (of kernels too), ms forward and backward.
    "paper": (8.0, 16.0, 60, 27.0, 60.0),
    "equal head dims": (6.0, 16.0, 60, 21.0, 48.0),
}
OVERLAP = 0.8


def kernel_floors(spec, device) -> tuple[float, float]:
    """Milliseconds of all kernels, forward and backward."""
    indices = overlapping_indices(spec, OVERLAP)
    found = [counts.kernels(spec, branch, indices) for branch in ("compression", "selection", "window")]
    forward = sum(x["forward"].floor_ms(device) for x in found) + counts.scores(spec).floor_ms(device)
    back = sum(x[name].floor_ms(device) for x in found for name in ("query_gradient", "key_gradients"))
    return forward, back


@pytest.mark.parametrize("name", MOST)
def test_traffic_and_launches_outside_of_the_kernels(dump, name):
    spec, (forward_gb, both_gb, launches, forward_ms, backward_ms) = with_tag("compile")[name], MOST[name]

    def attend(args):
        return nsa_attention(**args, implementation="mosaic_gpu")[0]

    def step(args, d_out):
        out, pull = jax.vjp(attend, args)
        return out, pull(d_out)[0]

    with compiled_elsewhere():
        ahead = h100.compile_for_h100(attend, spec.shapes(), dump=dump)
        both = h100.compile_for_h100(step, spec.shapes(), spec.output(), dump=dump)
    forward, whole = (outside(report.compiled.as_text()) for report in (ahead, both))
    print(forward, whole)
    assert forward.kernels == 4
    assert whole.kernels == 10
    assert forward.bytes <= forward_gb * 1e9
    assert whole.bytes <= both_gb * 1e9
    assert forward.launches + forward.kernels <= launches
    for device in counts.DEVICES.values():
        ms, back_ms = kernel_floors(spec, device)
        assert ms + 1e3 * forward.bytes / device.hbm_bytes <= forward_ms, device
        assert back_ms + 1e3 * (whole.bytes - forward.bytes) / device.hbm_bytes <= backward_ms, device
