"""The Hopper kernels compiled for an H100 at the paper's sizes: no spilled registers, linear memory."""

import os
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa import nsa_attention
from kernels_pallas.nsa.support import compiled_elsewhere
from tests.kernels_pallas import h100

pytestmark = pytest.mark.skipif(h100.missing() is not None, reason=h100.missing() or "")

LENGTH, HEADS, KV_HEADS = 65536, 64, 4
KERNELS = {"nsa_forward": 3, "nsa_group_shares": 1, "nsa_query_gradient": 3, "nsa_key_gradients": 3}
"""One of each for compression, selection and window."""


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """Where ptxas' reports go: read from the environment when the first kernel is compiled."""
    folder = tmp_path_factory.mktemp("ptxas")
    os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    return folder


def shapes(key_dim: int, value_dim: int, length: int = LENGTH) -> dict[str, jax.ShapeDtypeStruct]:
    blocks = length // 16 - 1
    sizes = {
        "q": (length, HEADS, key_dim),
        "k_cmp": (blocks, KV_HEADS, key_dim),
        "v_cmp": (blocks, KV_HEADS, value_dim),
        "k_slc": (length, KV_HEADS, key_dim),
        "v_slc": (length, KV_HEADS, value_dim),
        "k_win": (length, KV_HEADS, key_dim),
        "v_win": (length, KV_HEADS, value_dim),
        "gates": (length, HEADS, 3),
    }
    return {name: jax.ShapeDtypeStruct((1, *size), jnp.bfloat16) for name, size in sizes.items()}


@pytest.mark.parametrize(("key_dim", "value_dim"), [(192, 128), (128, 128)])
def test_forward_and_backward_at_64k(dump, key_dim, value_dim):
    def step(args, d_out):
        out, pull = jax.vjp(lambda a: nsa_attention(**a, implementation="mosaic_gpu")[0], args)
        return out, pull(d_out)[0]

    d_out = jax.ShapeDtypeStruct((1, LENGTH, HEADS, value_dim), jnp.bfloat16)
    with compiled_elsewhere():
        report = h100.compile_for_h100(step, shapes(key_dim, value_dim), d_out, dump=dump)
    print(report)
    assert Counter(kernel.name for kernel in report.kernels) == KERNELS
    for kernel in report.kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.registers <= 168, kernel  # three warpgroups fill the register file with more
    # A score of every query for every block would take 4 * 65536 * 1024 * 4 bytes = 1 GiB by itself.
    assert report.temporary_bytes < 12 * 2**30
