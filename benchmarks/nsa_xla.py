"""Native Sparse Attention in XLA beside dense causal attention: seconds and memory, forward and backward.

    JAX_PLATFORMS=cpu python benchmarks/nsa_xla.py --lengths 2048 8192 --out nsa_xla.json

The peers run in the same process on the same inputs: tokamax's chunked attention where tokamax is installed,
and jax.nn.dot_product_attention, which keeps the whole matrix of scores and is left out above `dense_up_to`
tokens. `--memory-only` compiles and runs nothing. Beside wall-clock time stands the processor time of this
process, which says more on a machine that others use too.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from jaxlab.files import write_json
from jaxlab.provenance import environment
from kernels_pallas.nsa import (
    compressed_attention,
    nsa_attention,
    num_compressed,
    select_blocks,
    selected_attention,
    window_attention,
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement; the defaults are the paper's blocks with 16 heads in one group."""

    out: Path
    """JSON file to write."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens."""
    batch: int = 1
    heads: int = 16
    kv_heads: int = 1
    head_dim: int = 64
    block_len: int = 32
    stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    window: int = 512
    dtype: str = "float32"
    repeats: int = 2
    """Timed calls, after one that is not; the best counts."""
    branches: bool = True
    """Time the branches on their own too."""
    peers: bool = True
    """Measure the dense peers."""
    dense_up_to: int = 4096
    """Longest sequence for the peer that keeps all scores."""
    memory_only: bool = False
    """Compile only."""


def inputs(a: Arguments, length: int) -> dict[str, jax.Array]:
    blocks = num_compressed(length, a.block_len, a.stride)
    shapes = {
        "q": (length, a.heads, a.head_dim),
        "gates": (length, a.heads, 3),
        "d_out": (length, a.heads, a.head_dim),
    }
    for name, size in (("cmp", blocks), ("slc", length), ("win", length)):
        shapes |= {f"{x}_{name}": (size, a.kv_heads, a.head_dim) for x in "kv"}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    return {
        name: jax.random.normal(keys[name], (a.batch, *s), jnp.dtype(a.dtype)) for name, s in shapes.items()
    }


def attentions(a: Arguments, length: int) -> dict[str, tuple[Callable[..., jax.Array], tuple[str, ...]]]:
    """Name -> function and the names of its arguments."""
    geometry = {"block_len": a.block_len, "stride": a.stride}
    choice = {**geometry, "block_size": a.block_size, "num_blocks": a.num_blocks}

    def compressed(q, k, v):
        return compressed_attention(q, k, v, **geometry)[0]

    def chosen(q, k_cmp):
        return select_blocks(q, k_cmp, compressed_attention(q, k_cmp, k_cmp, **geometry)[1], **choice)

    def whole(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates):
        return nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, **choice, window=a.window)[0]

    table = {"nsa": (whole, ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"))}
    if a.branches:
        select = functools.partial(selected_attention, block_size=a.block_size)
        table |= {
            "compression": (compressed, ("q", "k_cmp", "v_cmp")),
            "compression scores and choice": (chosen, ("q", "k_cmp")),
            "selection": (select, ("q", "k_slc", "v_slc", "indices")),
            "window": (functools.partial(window_attention, window=a.window), ("q", "k_win", "v_win")),
        }
    if a.peers:
        dense = ("q", "k_win", "v_win")
        if length <= a.dense_up_to:
            table["jax.nn dense"] = (functools.partial(jax.nn.dot_product_attention, is_causal=True), dense)
        if importlib.util.find_spec("tokamax"):
            import tokamax

            chunked = functools.partial(
                tokamax.dot_product_attention, is_causal=True, implementation="xla_chunked"
            )
            table["tokamax xla_chunked"] = (chunked, dense)
    return table


def measure(a: Arguments, function: Callable[..., Any], args: tuple[jax.Array, ...]) -> dict[str, float]:
    """Compile and, unless only memory is wanted, time one function."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    result = {
        "compile_s": time.perf_counter() - start,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "total_mib": (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)
        / 2**20,
    }
    if a.memory_only:
        return result
    jax.block_until_ready(compiled(*args))
    wall, processor = [], []
    for _ in range(a.repeats):
        start, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(compiled(*args))
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return result | {"wall_s": min(wall), "processor_s": min(processor)}


def with_gradients(function: Callable[..., jax.Array], moving: int) -> Callable[..., Any]:
    """Output and gradients of the first `moving` arguments, given the output's cotangent."""

    def step(d_out: jax.Array, *args: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *first: function(*first, *args[moving:]), *args[:moving])
        return out, pull(d_out)

    return step


def main(a: Arguments) -> None:
    rows = []
    for length in a.lengths:
        data = inputs(a, length)
        table = attentions(a, length)
        if "selection" in table:
            data["indices"] = jax.jit(table["compression scores and choice"][0])(data["q"], data["k_cmp"])
        for name, (function, names) in (bar := tqdm(table.items(), desc=f"{length} tokens")):
            bar.set_postfix_str(name)
            args = tuple(data[n] for n in names)
            row: dict[str, Any] = {"name": name, "length": length, "forward": measure(a, function, args)}
            if name != "compression scores and choice":
                moving = len([n for n in names if n != "indices"])
                step = with_gradients(function, moving)
                row["forward_backward"] = measure(a, step, (data["d_out"], *args))
            rows.append(row)
    report = {
        "arguments": dataclasses.asdict(a),
        "environment": environment(),
        "rows": rows,
    }
    if importlib.util.find_spec("tokamax"):
        report["environment"]["versions"]["tokamax"] = importlib.metadata.version("tokamax")
    write_json(a.out, report)
    for row in rows:
        both = row.get("forward_backward", {})
        numbers = [
            part.get(key, float("nan"))
            for part in (row["forward"], both)
            for key in ("wall_s", "processor_s")
        ]
        mib = both.get("total_mib", row["forward"]["total_mib"])
        seconds = "{:8.2f} s ({:8.2f} processor), with backward {:8.2f} s ({:8.2f})".format(*numbers)
        print(f"{row['length']:7d} {row['name']:30s} {seconds} {mib:8.0f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
