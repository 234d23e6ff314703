"""Finds tile sizes of the Hopper kernels for a device: kernels_pallas/nsa/mosaic_gpu/tuning/<device>.json.

    python benchmarks/nsa_tune.py                                       # on the GPU: the fastest
    JAX_PLATFORMS=cpu python benchmarks/nsa_tune.py --compile-only      # for an H100 that is not there

Tries warpgroups, keys in a tile and stages for every kernel of every branch at the specs with the tag "tune".
On a GPU the median of the times decides, among those that run. `--compile-only` (extra `gpu-compile`) keeps
what compiles without a spilled register and fits into shared memory; that ranks nothing, so the defaults of
`Tuning` stay where they are among them, else the first that is. The file says which of both it was and lists
every candidate with what was found.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from nsa_parts import compiler, subjects, timing
from tqdm import tqdm

from jaxlab.app.provenance import environment
from jaxlab.files import write_json
from kernels_pallas.nsa.base import Positions, SelectionGrid
from kernels_pallas.nsa.mosaic_gpu import block_selection, vjp
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.nsa.mosaic_gpu.tuning import COMPILED_FOR, file_of, padded
from kernels_pallas.nsa.specs.arg_specs import ArgSpec, with_tag
from kernels_pallas.target import compiled_elsewhere

Row = dict[str, Any]
FIELDS = {"forward": "forward", "query_gradient": "query", "key_gradients": "key"}
"""Of vjp.Kernels."""
COMPILED_ONLY = "compiled only, not timed: nothing says which candidate is faster"
NAMES = {
    "forward": "nsa_forward",
    "query_gradient": "nsa_query_gradient",
    "key_gradients": "nsa_key_gradients",
    "scores": "nsa_choice",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is tried."""

    out: Path | None = None
    """JSON file; None: that of the device, in the package."""
    specs: tuple[str, ...] = tuple(with_tag("tune"))
    warpgroups: tuple[int, ...] = (1, 2)
    keys: tuple[int, ...] = (64, 128)
    """Selection keeps 64, its block."""
    stages: tuple[int, ...] = (2, 3)
    compile_only: bool = False
    overlap: float = 0.5
    """Of the blocks that selection is timed with."""
    samples: int = 10
    compile_length: int = 8192
    """Tokens with compile_only: a kernel's code is the same for all lengths."""


def candidates(a: Arguments, kernel: str, branch: str) -> Iterator[Tuning]:
    """Those that differ in what the kernel heeds."""
    keys = a.keys if kernel in ("forward", "query_gradient") and branch != "selection" else (64,)
    warpgroups = (Tuning.warpgroups,) if kernel == "key_gradients" else a.warpgroups
    for sizes in itertools.product(warpgroups, keys, a.stages):
        yield Tuning(*sizes)


def points(a: Arguments) -> list[tuple[ArgSpec, str, str]]:
    kernels = [(kernel, branch) for kernel in FIELDS for branch in compiler.BRANCHES]
    return [
        (with_tag("tune")[n], *point) for n in a.specs for point in [*kernels, ("scores", "block_selection")]
    ]


def program(spec: ArgSpec, kernel: str, branch: str, tuning: Tuning) -> tuple[Callable[..., Any], list[Any]]:
    """A function in which the kernel is the one that takes time, and the shapes of its arguments."""
    shapes = spec.shapes()
    grouped = lambda x: x.reshape(*x.shape[:2], spec.kv_heads, spec.groups, x.shape[3])
    positions = jax.ShapeDtypeStruct((spec.batch, spec.length), jnp.int32)
    if kernel == "scores":
        rule = [spec.sizes[n] for n in ("num_blocks", "num_init", "num_local")]
        grid = SelectionGrid(
            spec.block_len, spec.stride, spec.block_size, *rule, spec.length, spec.key_dim**-0.5
        )
        lse = jax.ShapeDtypeStruct((*positions.shape, spec.kv_heads, spec.groups), jnp.float32)

        def select(q, k_cmp, lse, positions):
            return block_selection.select_blocks(grid, grouped(q), k_cmp, lse, Positions(positions), tuning)

        return select, [shapes["q"], shapes["k_cmp"], lse, positions]

    geometry: Row = {"stride": spec.stride, "offset": spec.block_len - 1} if branch == "compression" else {}
    geometry |= {"window": spec.window} if branch == "window" else {}
    kernels = vjp.Kernels(spec.key_dim**-0.5, **geometry, **{FIELDS[kernel]: tuning})

    def attend(q, k, v, indices, positions):
        selected = jnp.moveaxis(indices, 1, 2) if branch == "selection" else None
        return vjp.attend(kernels, grouped(q), k, v, selected, Positions(positions))[0]

    operands = [shapes[name] for name in compiler.OPERANDS[branch]]
    rest = [compiler.indices_of(spec), positions]
    if kernel == "forward":
        return attend, [*operands, *rest]
    pull = jax.eval_shape(
        lambda *x: jax.vjp(lambda *first: attend(*first, *x[3:]), *x[:3])[1], *operands, *rest
    )
    d_out = jax.eval_shape(attend, *operands, *rest)
    # What is not returned is not computed: of the two kernels one is left.
    part = (lambda g: g[0]) if kernel == "query_gradient" else (lambda g: g[1:])
    return (lambda pull, d_out: part(pull(d_out))), [pull, d_out]


def compiled(spec: ArgSpec, kernel: str, branch: str, tuning: Tuning, dump: Path) -> Row:
    """Facts of ptxas, or why there are none."""
    try:
        with compiled_elsewhere():
            function, args = program(spec, kernel, branch, tuning)
            report = compiler.h100.compile_for_h100(function, *args, dump=dump)
    except Exception as error:  # too much shared memory, above all
        return {"fits": False, "reason": timing.reason(error)}
    (found,) = [k for k in report.kernels if k.name == NAMES[kernel]]
    facts = {n: x for n, x in dataclasses.asdict(found).items() if n != "name"}
    return {"fits": not found.spilled_bytes and found.shared_bytes <= compiler.h100.SHARED_BYTES, **facts}


def timed(a: Arguments, spec: ArgSpec, kernel: str, branch: str, tuning: Tuning) -> Row:
    """Median seconds, or why there are none."""
    try:
        function, args = program(spec, kernel, branch, tuning)
        call = jax.jit(function).lower(*args).compile()
        result = timing.measure(call, [inputs(a, spec, args)], a.samples, 1.0)
    except Exception as error:
        return {"fits": False, "reason": timing.reason(error)}
    return {"fits": True, "median_s": result["median_s"], "samples_s": result["samples_s"]}


def inputs(a: Arguments, spec: ArgSpec, like: list[Any]) -> list[Any]:
    """Small normal numbers; for integers positions, or blocks with the overlap."""
    leaves, tree = jax.tree.flatten(like)
    indices = jnp.asarray(subjects.overlapping_indices(spec, a.overlap))
    made = []
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            made.append(0.1 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype))
        elif leaf.shape == indices.shape:
            made.append(indices)
        elif leaf.ndim == 4:  # the same among the residuals, with queries before heads
            made.append(jnp.moveaxis(indices, 1, 2))
        else:
            made.append(jnp.broadcast_to(jnp.arange(spec.length, dtype=jnp.int32)[None], leaf.shape))
    return jax.tree.unflatten(tree, made)


def pick(tried: list[Row]) -> Row | None:
    """The fastest; where nothing was timed the default, or the first that fits."""
    fitting = [row for row in tried if row["fits"]]
    if any("median_s" in row for row in fitting):
        return min(fitting, key=lambda row: row["median_s"])
    return next((row for row in fitting if Tuning(**row["tuning"]) == Tuning()), next(iter(fitting), None))


def main(a: Arguments) -> None:
    if a.compile_only:
        kind, dump = COMPILED_FOR, compiler.dump_folder()
        if missing := compiler.h100.missing():
            raise SystemExit(f"nsa_tune: {missing}")
    else:
        kind = jax.devices()[0].device_kind
        if jax.default_backend() != "gpu":
            raise SystemExit("nsa_tune: the default device is no GPU; use --compile-only or run it on one")
    entries, where = [], environment()
    for spec, kernel, branch in (bar := tqdm(points(a))):
        tried = []
        for tuning in candidates(a, kernel, branch):
            bar.set_postfix_str(f"{spec.name} {kernel} {branch} {tuning}")
            if a.compile_only:
                short = dataclasses.replace(spec, length=a.compile_length)
                found = compiled(short, kernel, branch, tuning, dump)
            else:
                found = timed(a, spec, kernel, branch, tuning)
            sizes = {n: x for n, x in dataclasses.asdict(tuning).items() if n != "registers"}
            tried.append({"tuning": sizes, **found})
        best = pick(tried)
        if best is None:
            print(f"{kernel} of {branch} at {spec.key_dim}/{spec.value_dim}: nothing fits")
            continue
        dims = [spec.key_dim, spec.key_dim if kernel == "scores" else spec.value_dim]
        at = dict(zip(("key_dim", "value_dim"), map(padded, dims), strict=True))
        entries.append({"kernel": kernel, "branch": branch, **at, "tuning": best["tuning"], "tried": tried})
        print(f"{kernel:15s} {branch:12s} {at['key_dim']}/{at['value_dim']}: {best}")
    path = file_of(kind) if a.out is None else a.out
    result = {
        "device_kind": kind,
        "command": " ".join(["python", "benchmarks/nsa_tune.py", *sys.argv[1:]]),
        "found": COMPILED_ONLY if a.compile_only else "timed",
        "environment": where,
        "entries": entries,
    }
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    print(f"{len(entries)} entries in {path.name}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
