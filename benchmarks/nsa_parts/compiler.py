"""The Hopper kernels of one branch compiled for an H100 that is not there."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.nsa import (
    Recent,
    cached_attention,
    compressed_attention,
    init_cache,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.specs import h100
from kernels_pallas.nsa.specs.arg_specs import ArgSpec
from kernels_pallas.target import compiled_elsewhere

BRANCHES = ("compression", "selection", "window")
OPERANDS = {
    "compression": ("q", "k_cmp", "v_cmp"),
    "selection": ("q", "k_slc", "v_slc"),
    "window": ("q", "k_win", "v_win"),
}


def dump_folder() -> Path:
    """Where reports of kernels go, from here on; must come before the first kernel."""
    folder = Path(tempfile.mkdtemp(prefix="nsa_reports_"))
    h100.dump_to(folder)
    return folder


def attend(spec: ArgSpec, branch: str) -> Callable[..., jax.Array]:
    """(q, k, v, indices) -> output of a branch by the kernels."""
    common: dict[str, Any] = {"implementation": "mosaic_gpu"}

    def run(q, k, v, indices):
        if branch == "compression":
            return compressed_attention(q, k, v, block_len=spec.block_len, stride=spec.stride, **common)[0]
        if branch == "selection":
            return selected_attention(q, k, v, indices, block_size=spec.block_size, **common)
        return window_attention(q, k, v, window=spec.window, **common)

    return run


def indices_of(spec: ArgSpec) -> jax.ShapeDtypeStruct:
    shape = (spec.batch, spec.kv_heads, spec.length, spec.num_blocks)
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def compile_branch(spec: ArgSpec, branch: str, dump: Path) -> Any:
    """Forward and backward of a branch: a report with one kernel for each of its three."""
    shapes = spec.shapes()

    def step(d_out, indices, *operands):
        out, pull = jax.vjp(lambda *x: attend(spec, branch)(*x, indices), *operands)
        return out, pull(d_out)

    operands = [shapes[name] for name in OPERANDS[branch]]
    with compiled_elsewhere():
        return h100.compile_for_h100(step, spec.output(), indices_of(spec), *operands, dump=dump)


def compile_whole(spec: ArgSpec, dump: Path, backward: bool) -> Any:
    """`nsa_attention`, forward alone or with all its gradients."""

    def forward(args):
        return nsa_attention(**args, implementation="mosaic_gpu")[0]

    def step(args, d_out):
        out, pull = jax.vjp(forward, args)
        return out, pull(d_out)[0]

    with compiled_elsewhere():
        if backward:
            return h100.compile_for_h100(step, spec.shapes(), spec.output(), dump=dump)
        return h100.compile_for_h100(forward, spec.shapes(), dump=dump)


def compile_block_selection(spec: ArgSpec, dump: Path) -> Any:
    shapes = spec.shapes()
    lse = jax.ShapeDtypeStruct(shapes["q"].shape[:3], jnp.float32)

    def select(q, k_cmp, lse):
        return select_blocks(q, k_cmp, lse, **spec.selection_sizes, implementation="mosaic_gpu")

    with compiled_elsewhere():
        return h100.compile_for_h100(select, shapes["q"], shapes["k_cmp"], lse, dump=dump)


def compile_decoding(spec: ArgSpec, batch: int, dump: Path) -> Any:
    """One token of `batch` sequences over caches of `spec.length` tokens."""
    sizes = {name: spec.sizes[name] for name in ("block_len", "stride", "block_size", "window")}
    shapes = {"kv_heads": spec.kv_heads, "key_dim": spec.key_dim, "value_dim": spec.value_dim}
    cache = jax.eval_shape(
        functools.partial(init_cache, batch, spec.length, **sizes, **shapes, dtype=jnp.dtype(spec.dtype))
    )

    def step(cache, q, gates, num_new):
        positions = jnp.zeros((batch, spec.window), jnp.int32)
        recent = Recent(cache.k_win, cache.v_win, positions, num_new)
        return cached_attention(cache, recent, q, gates, **spec.sizes, implementation="mosaic_gpu")[0]

    like = lambda *shape: jax.ShapeDtypeStruct((batch, 1, spec.heads, *shape), jnp.dtype(spec.dtype))
    num_new = jax.ShapeDtypeStruct((batch,), jnp.int32)
    with compiled_elsewhere():
        return h100.compile_for_h100(step, cache, like(spec.key_dim), like(3), num_new, dump=dump)
