"""The Hopper kernels in Pallas' GPU interpreter, and what they refuse."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa import selected_attention
from kernels_pallas.nsa.mosaic_gpu import operators
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.target import OLDEST_JAX, interpreted
from tests.kernels_pallas.nsa.operators_base import OperatorTests

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)


def small_tuning(kernel, branch, k, v):
    """Two tiles of rows with a warpgroup each, which costs half; for the window sizes differ by kernel."""
    if branch == "window" and kernel != "query_gradient":
        return Tuning(warpgroups=1, keys=128 if kernel == "forward" else 64, stages=3, registers=False)
    return Tuning(warpgroups=1, registers=False)


@needs_pallas
class TestOperators(OperatorTests):
    """Selected attention in the order of the queries; that of the blocks is in test_block_major.py."""

    implementation = "mosaic_gpu"
    dtype = jnp.bfloat16
    tolerance = 0.005

    def running(self):
        return interpreted()

    @pytest.fixture(autouse=True)
    def _by_queries(self, monkeypatch):
        monkeypatch.setattr(operators, "MOST_HEADS_BY_BLOCK", 0)

    @pytest.mark.parametrize("tuning", [small_tuning, pytest.param(None, marks=pytest.mark.slow)])
    def test_whole_attention_with_packed_sequences_and_poisoned_padding(self, monkeypatch, tuning):
        if tuning is not None:
            monkeypatch.setattr(operators, "kernel_tuning", tuning)
        super().test_whole_attention_with_packed_sequences_and_poisoned_padding()


@needs_pallas
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "TF32"),
        ({"key_dim": 200}, "head dims 200/64 are above"),
        ({"heads": 65}, "65 query heads"),
        ({"block_size": 32}, "block_size 32 is no multiple of 64"),
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
