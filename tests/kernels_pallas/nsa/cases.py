"""Inputs that the tests of Native Sparse Attention share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa.specs.arg_specs import SMALL, ArgSpec
from kernels_pallas.nsa.xla import block_selection, interval_attention, selected_attention, tiling


@dataclasses.dataclass(frozen=True)
class Case(ArgSpec):
    """A spec that is not in the list, with the sizes of the small ones there."""

    heads: int = SMALL.heads
    kv_heads: int = SMALL.kv_heads
    key_dim: int = SMALL.key_dim
    value_dim: int = SMALL.value_dim
    block_len: int = SMALL.block_len
    stride: int = SMALL.stride
    block_size: int = SMALL.block_size
    num_blocks: int = SMALL.num_blocks
    window: int = SMALL.window
    dtype: str = SMALL.dtype


def cotangents(spec: ArgSpec, seed: int = 1) -> list[jax.Array]:
    """For the total and the three branches, float32."""
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(spec.output().shape), jnp.float32) for _ in range(4)]


def relative_error(x: jax.Array, reference: jax.Array, floor: float = 0.1) -> float:
    """RMS of the difference over RMS of the reference (or the floor, where the reference is all but zero)."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    if x.size == 0:
        return 0.0
    return float(np.sqrt(np.mean((x - reference) ** 2)) / max(np.sqrt(np.mean(reference**2)), floor))


def shrink_tiles(monkeypatch) -> None:
    """Tiles and chunks so small that a hundred tokens need many of each."""
    monkeypatch.setattr(tiling, "CPU_TILE_ELEMENTS", 1 << 10)
    monkeypatch.setattr(selected_attention, "PARTIAL_ELEMENTS", 1 << 11)
    monkeypatch.setattr(interval_attention, "KEY_TILE", 16)
    monkeypatch.setattr(block_selection, "KEY_TILE", 8)


def random_selection(random, shape, blocks):
    """[..., n] different blocks."""
    everything = np.tile(np.arange(blocks), (*shape[:-1], 1))
    return random.permuted(everything, axis=-1)[..., : shape[-1]]
