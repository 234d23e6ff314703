"""Sizes of calls of `nsa_attention`: one list for tests, compile checks, tuning and benchmarks."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa.base import num_compressed

Tag = Literal["test", "compile", "shapes", "tune", "benchmark"]
"""test: small enough for the float64 oracle. compile: compiled for an H100. shapes: traced and lowered only.
tune: its tile sizes are searched. benchmark: timed, at other lengths than its own too."""


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """Shapes and sizes of one call; the defaults are the paper's model."""

    length: int
    """T and S: as many queries as keys."""
    name: str = ""
    batch: int = 1
    heads: int = 64
    kv_heads: int = 4
    key_dim: int = 192
    value_dim: int = 128
    block_len: int = 32
    stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    num_init: int = 1
    num_local: int = 2
    window: int = 512
    segments: tuple[int, ...] = ()
    """Lengths of packed sequences, negative ones of padding; empty: one sequence a row."""
    dtype: str = "bfloat16"
    tags: frozenset[Tag] = frozenset()

    @property
    def sizes(self) -> dict[str, int]:
        """Keyword arguments of `nsa_attention`."""
        names = ("block_len", "stride", "block_size", "num_blocks", "num_init", "num_local", "window")
        return {name: getattr(self, name) for name in names}

    @property
    def selection_sizes(self) -> dict[str, int]:
        """Those of `select_blocks`."""
        return {name: size for name, size in self.sizes.items() if name != "window"}

    @property
    def blocks(self) -> int:
        """M, complete compressed blocks, or slots for those of packed texts."""
        return num_compressed(self.length, self.block_len, self.stride, packed=bool(self.segments))

    @property
    def groups(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def segment_ids(self) -> jax.Array | None:
        """int32 [B, S], or None without `segments`."""
        if not self.segments:
            return None
        ids = [np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(self.segments)]
        return jnp.asarray(np.tile(np.concatenate(ids).astype(np.int32), (self.batch, 1)))

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays that `nsa_attention` takes, by name, without `segment_ids`."""
        sizes = {"q": (self.length, self.heads, self.key_dim)}
        for branch, length in (("cmp", self.blocks), ("slc", self.length), ("win", self.length)):
            sizes[f"k_{branch}"] = (length, self.kv_heads, self.key_dim)
            sizes[f"v_{branch}"] = (length, self.kv_heads, self.value_dim)
        sizes["gates"] = (self.length, self.heads, 3)
        dtype = jnp.dtype(self.dtype)
        return {name: jax.ShapeDtypeStruct((self.batch, *size), dtype) for name, size in sizes.items()}

    def output(self) -> jax.ShapeDtypeStruct:
        """The output, and its cotangent: [B, T, H, Dv]."""
        shape = (self.batch, self.length, self.heads, self.value_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

    def arguments(self, seed: int = 0, dtype: jax.typing.DTypeLike | None = None) -> dict[str, jax.Array]:
        """Normally distributed arrays of `shapes`, drawn on the host: the same on every device."""
        random = np.random.default_rng(seed)
        return {
            name: jnp.asarray(random.standard_normal(like.shape), like.dtype if dtype is None else dtype)
            for name, like in self.shapes().items()
        }


SMALL = ArgSpec(
    1,
    heads=4,
    kv_heads=2,
    key_dim=12,
    value_dim=10,
    block_len=8,
    stride=4,
    block_size=8,
    num_blocks=4,
    window=16,
    dtype="float32",
)
"""What small specs have in common."""


def small(length: int, name: str, **changes: Any) -> ArgSpec:
    return dataclasses.replace(SMALL, length=length, name=name, tags=frozenset({"test"}), **changes)


def paper(length: int, name: str, *tags: Tag, **changes: Any) -> ArgSpec:
    return ArgSpec(length, name, tags=frozenset(tags), **changes)


PAPER_BLOCKS = {"block_len": 32, "stride": 16, "block_size": 64}

ARG_SPECS = (
    small(127, "many tiles", batch=2),
    small(65, "one head per group", heads=3, kv_heads=3, key_dim=5, value_dim=7),
    small(97, "sixteen heads per group", heads=16, kv_heads=1, key_dim=10, value_dim=6),
    small(
        90,
        "nothing divides anything",
        heads=6,
        kv_heads=3,
        block_len=10,
        stride=3,
        block_size=7,
        num_blocks=5,
        window=9,
    ),
    small(
        110,
        "packed, with padding",
        kv_heads=4,
        block_size=16,
        num_blocks=3,
        num_local=1,
        window=20,
        segments=(30, 41, -3, 16, 11, -9),
    ),
    small(1, "one token", **PAPER_BLOCKS, window=512),
    small(63, "odd head dims", heads=2, kv_heads=1, key_dim=60, value_dim=100, block_len=32, stride=16),
    small(513, "paper's blocks", kv_heads=1, key_dim=16, value_dim=8, **PAPER_BLOCKS, window=200),
    paper(65536, "paper", "compile", "tune", "benchmark"),
    paper(65536, "equal head dims", "compile", "tune", "benchmark", key_dim=128),
    paper(8192, "one head a group", "compile", heads=4, key_dim=128),
    paper(8192, "eight heads a group", "compile", heads=32, key_dim=128),
    paper(8192, "sixty-four heads a group", "compile", heads=64, kv_heads=1),
    paper(2**20, "a million tokens", "shapes"),
)


def with_tag(tag: Tag) -> dict[str, ArgSpec]:
    """Name -> spec, in the order of the list."""
    return {spec.name: spec for spec in ARG_SPECS if tag in spec.tags}
