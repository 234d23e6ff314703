"""Native Sparse Attention beside dense causal attention: errors, seconds and memory, forward and backward.

    JAX_PLATFORMS=cpu python benchmarks/nsa.py --lengths 2048 8192 --out nsa.json
    python benchmarks/nsa.py --implementations mosaic_gpu xla --heads 64 --kv-heads 4 --head-dim 128 \
        --dtype bfloat16 --lengths 1024 4096 16384 65536 --repeats 10 --out h100.json

Every implementation is first compared with the XLA one in float32 on `check_length` tokens: outputs and
gradients, and whether a second call gives the same bits. The peers run in the same process on the same
inputs: cuDNN on a GPU (values padded to the head dim of the keys, as it takes no other), tokamax where it is
installed, and jax.nn.dot_product_attention, which keeps the whole matrix of scores and is left out above
`dense_up_to` tokens. `--memory-only` compiles and runs nothing. Beside the median of the wall-clock times is
the processor time of this process, which says more on a machine that others use too. A plot lies beside the
JSON.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
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

Implementation = Literal["xla", "mosaic_gpu"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement; the defaults are the paper's blocks with 16 heads in one group."""

    out: Path
    """JSON file to write."""
    implementations: tuple[Implementation, ...] = ("xla",)
    """Of NSA."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens."""
    batch: int = 1
    heads: int = 16
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    """That of the keys where it is not given."""
    block_len: int = 32
    stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    window: int = 512
    overlap: float | None = None
    """Share of the free blocks that a query takes over from the one before it; None: the choice by scores of
    random keys."""
    dtype: str = "float32"
    repeats: int = 3
    """Timed calls, after one that is not."""
    branches: bool = True
    """Time the branches on their own too."""
    peers: bool = True
    """Measure the dense peers."""
    dense_up_to: int = 4096
    """Longest sequence for the peer that keeps all scores."""
    check_length: int = 1024
    """Tokens of the comparison with float32; 0 leaves it out."""
    memory_only: bool = False
    """Compile only."""


def inputs(a: Arguments, length: int) -> dict[str, jax.Array]:
    blocks = num_compressed(length, a.block_len, a.stride)
    value_dim = a.value_dim or a.head_dim
    shapes = {
        "q": (length, a.heads, a.head_dim),
        "gates": (length, a.heads, 3),
        "d_out": (length, a.heads, value_dim),
    }
    for name, size in (("cmp", blocks), ("slc", length), ("win", length)):
        shapes |= {f"k_{name}": (size, a.kv_heads, a.head_dim), f"v_{name}": (size, a.kv_heads, value_dim)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    data = {
        name: jax.random.normal(keys[name], (a.batch, *s), jnp.dtype(a.dtype)) for name, s in shapes.items()
    }
    if a.overlap is not None:
        data["indices"] = jnp.asarray(overlapping_indices(a, length))
    return data


def overlapping_indices(a: Arguments, length: int) -> np.ndarray:
    """[B, Hkv, T, n]: the first and the two newest blocks, and others of which `overlap` stay from one query
    to the next."""
    random = np.random.default_rng(0)
    indices = np.full((a.batch, a.kv_heads, length, a.num_blocks), -1, np.int32)
    for row in indices.reshape(-1, length, a.num_blocks):
        kept: set[int] = set()
        for t in range(length):
            newest = t // a.block_size
            forced = {0, newest, max(newest - 1, 0)}
            free = newest + 1 - len(forced)
            wanted = min(a.num_blocks - len(forced), free)
            kept = {block for block in kept if block not in forced and random.random() < a.overlap}
            while len(kept) < wanted:
                kept.add(int(random.integers(1, newest)))
                kept -= forced
            chosen = sorted(forced | set(sorted(kept)[:wanted]))
            row[t, : len(chosen)] = chosen
    return indices


Table = dict[str, tuple[Callable[..., jax.Array], tuple[str, ...]]]


def attentions(a: Arguments, implementation: Implementation) -> Table:
    """Name -> function and the names of its arguments."""
    geometry: dict[str, Any] = {
        "block_len": a.block_len,
        "stride": a.stride,
        "implementation": implementation,
    }
    choice = {**geometry, "block_size": a.block_size, "num_blocks": a.num_blocks}

    def compressed(q, k, v):
        return compressed_attention(q, k, v, **geometry)[0]

    def chosen(q, k_cmp):
        return select_blocks(q, k_cmp, compressed_attention(q, k_cmp, k_cmp, **geometry)[1], **choice)

    def whole(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, indices=None):
        operands = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
        return nsa_attention(*operands, **choice, window=a.window, indices=indices)[0]

    operands = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    table: Table = {"nsa": (whole, operands)}
    if a.overlap is not None:
        table["nsa, given blocks"] = (whole, (*operands, "indices"))
    if a.branches:
        common = {"implementation": implementation}
        select = functools.partial(selected_attention, block_size=a.block_size, **common)
        recent = functools.partial(window_attention, window=a.window, **common)
        table |= {
            "compression": (compressed, ("q", "k_cmp", "v_cmp")),
            "compression scores and choice": (chosen, ("q", "k_cmp")),
            "selection": (select, ("q", "k_slc", "v_slc", "indices")),
            "window": (recent, ("q", "k_win", "v_win")),
        }
    return {f"{name} [{implementation}]": entry for name, entry in table.items()}


def peers(a: Arguments, length: int) -> Table:
    table: Table = {}
    dense = ("q", "k_win", "v_win")
    if jax.default_backend() == "gpu" and a.dtype != "float32":

        def cudnn(q, k, v):
            padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[3] - v.shape[3])))
            out = jax.nn.dot_product_attention(q, k, padded, is_causal=True, implementation="cudnn")
            return out[..., : v.shape[3]]

        table["cuDNN dense"] = (cudnn, dense)
    if length <= a.dense_up_to and a.value_dim in (None, a.head_dim):
        table["jax.nn dense"] = (functools.partial(jax.nn.dot_product_attention, is_causal=True), dense)
    if importlib.util.find_spec("tokamax"):
        import tokamax

        names = ("mosaic_gpu", "xla_chunked") if jax.default_backend() == "gpu" else ("xla_chunked",)
        for name in names:
            attend = functools.partial(tokamax.dot_product_attention, is_causal=True, implementation=name)
            table[f"tokamax {name}"] = (attend, dense)
    return table


def measure(a: Arguments, function: Callable[..., Any], args: tuple[jax.Array, ...]) -> dict[str, Any]:
    """Compile and, unless only memory is wanted, time one function."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    sizes = (memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes)
    result: dict[str, Any] = {
        "compile_s": time.perf_counter() - start,
        "temporary_mib": sizes[0] / 2**20,
        "total_mib": sum(sizes) / 2**20,
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
    return result | {
        "wall_s": statistics.median(wall),
        "wall_min_s": min(wall),
        "processor_s": statistics.median(processor),
    }


def with_gradients(function: Callable[..., jax.Array], moving: int) -> Callable[..., Any]:
    """Output and gradients of the first `moving` arguments, given the output's cotangent."""

    def step(d_out: jax.Array, *args: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *first: function(*first, *args[moving:]), *args[:moving])
        return out, pull(d_out)

    return step


def moving_arguments(names: tuple[str, ...]) -> int:
    return len([name for name in names if name != "indices"])


def check(a: Arguments, implementation: Implementation) -> dict[str, Any]:
    """Relative errors of outputs and gradients against XLA in float32, the blocks given to both."""
    length = a.check_length
    data = inputs(a, length)
    choose, names = attentions(a, implementation)[f"compression scores and choice [{implementation}]"]
    indices = data.get("indices")
    if indices is None:
        indices = jax.jit(choose)(*(data[n] for n in names))
    wide = {name: x.astype(jnp.float32) for name, x in data.items() if name != "indices"}
    reference = attentions(a, "xla")["nsa [xla]"]
    function, names = attentions(a, implementation)[f"nsa [{implementation}]"]
    step = jax.jit(with_gradients(function, len(names)))
    found = step(data["d_out"], *(data[n] for n in names), indices)
    again = step(data["d_out"], *(data[n] for n in names), indices)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_gradients(reference[0], len(names)))
        expected = exact(wide["d_out"], *(wide[n] for n in names), indices)
    errors = jax.tree.map(relative_error, found, expected)
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), found, again)
    by_name = {"output": errors[0], **{f"d_{n}": e for n, e in zip(names, errors[1], strict=True)}}
    return {"length": length, "relative_errors": by_name, "same_bits_again": all(jax.tree.leaves(same))}


def relative_error(x: jax.Array, reference: jax.Array) -> float:
    """RMS of the difference over RMS of the reference."""
    difference = np.asarray(x, np.float64) - np.asarray(reference, np.float64)
    return float(np.sqrt(np.mean(difference**2) / np.mean(np.asarray(reference, np.float64) ** 2)))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds by length, forward and with backward."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, part, title in zip(
        axes, ("forward", "forward_backward"), ("forward", "and backward"), strict=True
    ):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [
                (r["length"], r[part]["wall_s"] * 1e3)
                for r in rows
                if r["name"] == name and "wall_s" in r.get(part, {})
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(a: Arguments) -> None:
    checks = {}
    if a.check_length and not a.memory_only:
        full = dataclasses.replace(a, branches=True)
        checks = {name: check(full, name) for name in a.implementations}
        for name, result in checks.items():
            worst = max(result["relative_errors"].values())
            print(f"{name}: largest relative error {worst:.1e}, same bits again: {result['same_bits_again']}")
    rows = []
    for length in a.lengths:
        data = inputs(a, length)
        table = {name: e for i in a.implementations for name, e in attentions(a, i).items()}
        if "indices" not in data:
            choose = table.get(f"compression scores and choice [{a.implementations[0]}]")
            if choose is not None:
                data["indices"] = jax.jit(choose[0])(data["q"], data["k_cmp"])
        if a.peers:
            table |= peers(a, length)
        for name, (function, names) in (bar := tqdm(table.items(), desc=f"{length} tokens")):
            bar.set_postfix_str(name)
            args = tuple(data[n] for n in names)
            row: dict[str, Any] = {"name": name, "length": length, "forward": measure(a, function, args)}
            if not name.startswith("compression scores"):
                step = with_gradients(function, moving_arguments(names))
                row["forward_backward"] = measure(a, step, (data["d_out"], *args))
            rows.append(row)
    report = {
        "arguments": dataclasses.asdict(a),
        "environment": environment(),
        "checks": checks,
        "rows": rows,
    }
    if importlib.util.find_spec("tokamax"):
        report["environment"]["versions"]["tokamax"] = importlib.metadata.version("tokamax")
    write_json(a.out, report)
    if not a.memory_only:
        plot(rows, a.out.with_suffix(".png"))
    for row in rows:
        both = row.get("forward_backward", {})
        numbers = [
            part.get(key, float("nan"))
            for part in (row["forward"], both)
            for key in ("wall_s", "processor_s")
        ]
        mib = both.get("total_mib", row["forward"]["total_mib"])
        seconds = "{:9.4f} s ({:8.2f} processor), with backward {:9.4f} s ({:8.2f})".format(*numbers)
        print(f"{row['length']:7d} {row['name']:42s} {seconds} {mib:8.0f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
