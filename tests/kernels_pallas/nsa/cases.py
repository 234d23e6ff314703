"""Inputs that the tests of Native Sparse Attention share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa import banded, choice, num_compressed, selection, tiling


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and sizes of one call; `segments` are lengths of packed sequences, negative ones of padding."""

    length: int
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 12
    value_dim: int = 10
    batch: int = 1
    block_len: int = 8
    stride: int = 4
    block_size: int = 8
    num_blocks: int = 4
    num_init: int = 1
    num_local: int = 2
    window: int = 16
    segments: tuple[int, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        names = ("block_len", "stride", "block_size", "num_blocks", "num_init", "num_local", "window")
        return {name: getattr(self, name) for name in names}

    @property
    def choice_sizes(self) -> dict[str, int]:
        return {name: size for name, size in self.sizes.items() if name != "window"}

    @property
    def blocks(self) -> int:
        return num_compressed(self.length, self.block_len, self.stride)

    @property
    def segment_ids(self) -> jax.Array | None:
        if not self.segments:
            return None
        ids = [np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(self.segments)]
        row = np.concatenate(ids).astype(np.int32)
        return jnp.asarray(np.tile(row, (self.batch, 1)))

    def arguments(self, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> dict[str, jax.Array]:
        """Arguments of nsa_attention, normally distributed."""
        keys = {"cmp": self.blocks, "slc": self.length, "win": self.length}
        shapes = {"q": (self.length, self.heads, self.key_dim)}
        for name, length in keys.items():
            shapes[f"k_{name}"] = (length, self.kv_heads, self.key_dim)
            shapes[f"v_{name}"] = (length, self.kv_heads, self.value_dim)
        shapes["gates"] = (self.length, self.heads, 3)
        random = np.random.default_rng(seed)
        return {
            name: jnp.asarray(random.standard_normal((self.batch, *shape)), dtype)
            for name, shape in shapes.items()
        }

    def weights(self, seed: int = 1) -> list[jax.Array]:
        """Cotangents for the total and the three branches."""
        random = np.random.default_rng(seed)
        shape = (self.batch, self.length, self.heads, self.value_dim)
        return [jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(4)]


def quick_jit(function):
    """jit for programs that run once: compiled in half the time, run slowly."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def relative_error(x: jax.Array, reference: jax.Array, floor: float = 0.1) -> float:
    """RMS of the difference over RMS of the reference (or the floor, where the reference is all but zero)."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    if x.size == 0:
        return 0.0
    return float(np.sqrt(np.mean((x - reference) ** 2)) / max(np.sqrt(np.mean(reference**2)), floor))


def shrink_tiles(monkeypatch) -> None:
    """Tiles and chunks so small that a hundred tokens need many of each."""
    monkeypatch.setattr(tiling, "CPU_TILE_ELEMENTS", 1 << 10)
    monkeypatch.setattr(selection, "PARTIAL_ELEMENTS", 1 << 11)
    monkeypatch.setattr(banded, "KEY_TILE", 16)
    monkeypatch.setattr(choice, "KEY_TILE", 8)
