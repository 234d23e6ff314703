"""Native Sparse Attention checked and timed beside dense causal attention, in one command.

    python benchmarks/nsa.py --out nsa_h100.json --torch-python torch/bin/python
    JAX_PLATFORMS=cpu python benchmarks/nsa.py --lengths 256 512 1024 --forward-lengths 2048 --heads 4 \
        --kv-heads 1 --out nsa_cpu.json

First each implementation is compared with XLA in float32 on `check_length` tokens: outputs, gradients, chosen
blocks, and whether a second call gives the same bits. Then come, by importance: the whole attention at every
overlap of the blocks that neighbouring queries read, beside dense attention (cuDNN, tokamax where it is
installed), forward, backward (from saved residuals) and both (a forward that saves them, then that
backward), and forward alone at `forward_lengths`; decode steps in one jitted loop; with `--torch-python`,
torch's attention and flash-linear-attention's NSA on the same device; whole layers with projections; the
branches alone. What does not fit into `budget_s` is left out and told, in the table and in the JSON.
Elsewhere than on a GPU the defaults are small.

Seconds are those of one call, with all samples in the JSON, beside which a plot lies.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from nsa_parts import alternating, decoding, report, subjects, timing
from nsa_parts import layers as whole_layers
from tqdm import tqdm

from jaxlab.app.provenance import environment
from jaxlab.files import write_json
from kernels_pallas.nsa.specs.arg_specs import ArgSpec, with_tag
from kernels_pallas.target import is_hopper

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured; None: by the device."""

    out: Path
    """JSON file to write; the plot gets its name with .png."""
    implementations: tuple[Literal["xla", "mosaic_gpu"], ...] | None = None
    """Of NSA; None: the kernels on a Hopper GPU, else XLA."""
    specs: tuple[str, ...] = tuple(with_tag("benchmark"))
    """Names in kernels_pallas/nsa/specs/arg_specs.py."""
    lengths: tuple[int, ...] | None = None
    forward_lengths: tuple[int, ...] | None = None
    """Forward only."""
    overlaps: tuple[float, ...] = (0.0, 0.5, 0.8, 1.0)
    """Share of a query's free blocks that the one before it reads too: random ... a trained model."""
    batch: int = 1
    heads: int | None = None
    kv_heads: int | None = None
    dtype: str | None = None
    decode_lengths: tuple[int, ...] | None = None
    decode_batches: tuple[int, ...] = (1, 8, 64)
    samples: int = 20
    seconds: float = 0.4
    """About so long for the samples of one number."""
    budget_s: float = 480
    """For everything, compiling included."""
    check_length: int = 1024
    """Tokens of the comparison with float32; 0 leaves it out."""
    dense_up_to: int = 4096
    """Longest sequence for the dense peer without a GPU, which keeps all scores."""
    key_dim: int | None = None
    value_dim: int | None = None
    """Head dims in place of the specs'."""
    torch_python: Path | None = None
    """Python of an environment with torch, and flash-linear-attention if that is to be timed too. Without a
    GPU its flash attention, heads expanded, is timed in turn with ours, which then chooses its own blocks."""
    kinds: tuple[str, ...] = ()
    """Of jobs (attention, forward, decode, torch, layers, branches); empty: all."""
    threads: int = os.cpu_count() or 1
    """That compile."""


def resolve(a: Arguments) -> Arguments:
    """With every None replaced by what fits the device."""
    gpu = jax.default_backend() == "gpu"
    defaults: dict[str, Any] = {
        "implementations": ("mosaic_gpu",) if is_hopper() else ("xla",),
        "lengths": tuple(1024 << i for i in range(7)) if gpu else (256, 512, 1024, 2048),
        "forward_lengths": (131072,) if gpu else (4096,),
        "heads": 64 if gpu else 16,
        "kv_heads": 4 if gpu else 1,
        "dtype": "bfloat16" if gpu else "float32",
        "decode_lengths": (65536, 8192) if gpu else (1024,),
    }
    return dataclasses.replace(a, **{n: x for n, x in defaults.items() if getattr(a, n) is None})


def specs(a: Arguments, length: int) -> Iterator[ArgSpec]:
    for name in a.specs:
        changes = {"heads": a.heads, "kv_heads": a.kv_heads, "dtype": a.dtype}
        changes |= {n: getattr(a, n) for n in ("key_dim", "value_dim") if getattr(a, n) is not None}
        yield dataclasses.replace(with_tag("benchmark")[name], length=length, batch=a.batch, **changes)


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of the measurement that is done or left out as a whole."""

    kind: str
    length: int
    run: Callable[[float], list[Row]]
    """Given the seconds that are left."""
    spec: str = ""


FIRST_GUESS_S = 60.0
"""Of the first job: compiling, mostly."""
LIKE_ATTENTION = {"forward": 0.5, "decode": 1.0, "torch": 1.0, "layers": 0.8, "branches": 1.0}
"""How long the first job of another kind takes, as a share of the shortest of the whole attention."""


MARGIN = 1.2
"""By which estimates may be too low."""


class Schedule:
    """Runs jobs in their order while the budget lasts."""

    def __init__(self, budget_s: float, start: float):
        self.budget_s, self.start = budget_s, start
        self.taken: dict[str, list[tuple[int, float]]] = {}
        self.dropped: list[Row] = []

    def left(self) -> float:
        return self.budget_s - (time.perf_counter() - self.start)

    def estimate(self, job: Job) -> float:
        """No more than what the kind took at this length or a longer one; beyond, by its square."""
        taken = self.taken.get(job.kind, [])
        if not taken:
            shares = [seconds for _, seconds in self.taken.get("attention", [])]
            return LIKE_ATTENTION.get(job.kind, 1.0) * min(shares, default=FIRST_GUESS_S)
        bounds = [seconds for length, seconds in taken if length >= job.length]
        length, seconds = max(taken)
        return min(bounds, default=seconds * (job.length / length) ** 2)

    def __call__(self, job: Job) -> list[Row]:
        estimate, left = self.estimate(job), self.left()
        if MARGIN * estimate > left:
            about = {"job": job.kind, "spec": job.spec, "length": job.length}
            self.dropped.append(about | {"estimate_s": estimate, "left_s": left})
            return []
        start = time.perf_counter()
        rows = job.run(left)
        self.taken.setdefault(job.kind, []).append((job.length, time.perf_counter() - start))
        return rows


def by_importance(lengths: tuple[int, ...]) -> list[int]:
    """The longest and the shortest, then always the middle of the widest gap."""
    left, chosen = sorted(lengths), []
    for end in (-1, 0):
        if left:
            chosen.append(left.pop(end))
    while left:
        gap = lambda x: min(abs(np.log(x / y)) for y in chosen)
        chosen.append(left.pop(int(np.argmax([gap(x) for x in left]))))
    return chosen


def timed(a: Arguments, spec: ArgSpec, table: list[timing.Subject], data: dict[str, Any]) -> list[Row]:
    """Rows of the subjects; those that read `indices` once for every overlap."""
    about = {"spec": spec.name, "length": spec.length}
    if any("indices" in subject.fixed for subject in table):
        data = data | subjects.given(spec, a.overlaps[0])
    built = timing.build(table, data, a.threads)
    sets, rows = timing.copies(data), []
    for subject in table:
        programs = built[subject.name]
        if isinstance(programs, str):
            rows.append({**about, "name": subject.name, "part": "forward", "reason": programs})
            continue
        for overlap in a.overlaps if "indices" in subject.fixed else (None,):
            if overlap is not None:
                indices = subjects.given(spec, overlap)
                sets = [each | indices for each in sets]
            measured = timing.time_parts(subject, programs, sets, a.samples, a.seconds)
            rows += [{**about, "overlap": overlap, **row} for row in measured]
    return rows


def jobs(a: Arguments) -> list[Job]:
    """By importance."""

    def attention(parts: tuple[str, ...], spec: ArgSpec, left: float) -> list[Row]:
        if a.torch_python is not None and jax.default_backend() == "cpu":
            return beside_torch(a, spec, parts)
        table = [subjects.nsa(spec, i) for i in a.implementations] + subjects.peers(spec, a.dense_up_to)
        return timed(a, spec, [s._replace(parts=parts) for s in table], subjects.draw(spec))

    def layers(spec: ArgSpec, left: float) -> list[Row]:
        rows = []
        for implementation in a.implementations:
            table, data = whole_layers.layers(spec, implementation)
            if jax.default_backend() != "gpu" and spec.length > a.dense_up_to:
                table = table[:1]
            rows += timed(a, spec, table, data)
        return rows

    def branches(spec: ArgSpec, left: float) -> list[Row]:
        table = [s for i in a.implementations for s in subjects.branches(spec, i)]
        return timed(a, spec, table, subjects.draw(spec))

    def of(kind: str, run: Callable[[ArgSpec, float], list[Row]], lengths: Sequence[int]) -> list[Job]:
        points = [(length, spec) for length in lengths for spec in specs(a, length)]
        return [Job(kind, length, functools.partial(run, spec), spec.name) for length, spec in points]

    all_parts, forward = (functools.partial(attention, parts) for parts in (timing.PARTS, ("forward",)))
    torch = functools.partial(torch_rows, a)
    lengths = by_importance(a.lengths)
    with_torch = [] if a.torch_python is None or jax.default_backend() == "cpu" else lengths
    decoding = of("decode", functools.partial(decode, a), a.decode_lengths)
    first, rest = slice(0, 3), slice(3, None)
    found = [
        *of("attention", all_parts, lengths[first]),
        *of("forward", forward, a.forward_lengths),
        *(job for job in decoding if job.spec == a.specs[0]),
        *of("torch", torch, with_torch[first]),
        *of("layers", layers, lengths[:1]),
        *of("attention", all_parts, lengths[rest]),
        *of("torch", torch, with_torch[rest]),
        *of("branches", branches, lengths[:1]),
        *of("layers", layers, lengths[1:]),
        *of("branches", branches, lengths[1:]),
    ]
    return [job for job in found if not a.kinds or job.kind in a.kinds]


def decode(a: Arguments, spec: ArgSpec, left: float) -> list[Row]:
    """Steps of one layer over a cache, NSA beside dense."""
    shape = {n: getattr(spec, n) for n in ("heads", "kv_heads", "key_dim", "value_dim", "dtype")}
    blocks = {n: spec.sizes[n] for n in ("block_len", "stride", "block_size", "num_blocks", "window")}
    sizes = decoding.Sizes(
        implementations=tuple(dict.fromkeys(("xla", *a.implementations))),
        lengths=(spec.length,),
        batches=a.decode_batches,
        **shape,
        **blocks,
    )
    rows = []
    for row in decoding.rows(sizes):
        about = {"spec": spec.name, "length": row["length"], "batch": row["batch"], "part": "decode"}
        found = {what: value for what, value in row.items() if what in ("tokens", "bytes", "reason")}
        if "wall_s" in row:
            found |= {"median_s": row["wall_s"], "differs": row["differs_from_first_of_kind"]}
        rows.append({**about, "name": f"decode, {row['name']}, batch {row['batch']}", **found})
    return rows


def torch_sizes(a: Arguments, spec: ArgSpec) -> Row:
    """For nsa_torch.py."""
    sizes = {n: getattr(spec, n) for n in ("batch", "length", "heads", "kv_heads", "key_dim", "value_dim")}
    sizes |= {n: spec.sizes[n] for n in ("block_size", "num_blocks", "window")} | {"dtype": spec.dtype}
    sizes |= {"device": "cuda" if jax.default_backend() == "gpu" else "cpu"}
    return sizes | {"samples": a.samples, "seconds": a.seconds}


def beside_torch(a: Arguments, spec: ArgSpec, parts: tuple[str, ...]) -> list[Row]:
    """Forward, and forward and backward, in turn with torch's dense attention."""
    about = {"spec": spec.name, "length": spec.length, "overlap": None}
    assert a.torch_python is not None
    try:
        peer = alternating.TorchPeer(a.torch_python, torch_sizes(a, spec))
    except (OSError, RuntimeError) as error:
        return [{**about, "name": "torch", "part": "forward", "reason": timing.reason(error)}]
    data, found = subjects.draw(spec), []
    try:
        for implementation in a.implementations:
            subject = subjects.nsa_by_itself(spec, implementation)
            moving, fixed = timing.operands(subject, data)
            forward, both = jax.jit(subject.function), jax.jit(timing.gradients(subject))
            calls = {
                "forward": lambda f=forward, m=moving: jax.block_until_ready(f(*m)),
                "both": lambda f=both, m=moving, x=fixed: jax.block_until_ready(f(m, x, data["d_out"])),
            }
            calls = {part: call for part, call in calls.items() if part in parts}
            first = {part: alternating.timed(call)().seconds for part, call in calls.items()}
            for row in alternating.rows(subject.name, calls, peer, a.samples, a.seconds):
                own = {"first_call_s": first[row["part"]]} if row["name"] == subject.name else {}
                found.append({**about, **row, **own})
    finally:
        peer.close()
    return found


def torch_rows(a: Arguments, spec: ArgSpec, left: float) -> list[Row]:
    """Of a process of its own with another Python: nsa_torch.py beside this file."""
    script = str(Path(__file__).with_name("nsa_torch.py"))
    command = [str(a.torch_python), script, json.dumps(torch_sizes(a, spec))]
    about = {"spec": spec.name, "length": spec.length, "overlap": None}
    failed = {**about, "name": "torch", "part": "forward"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, left))
    except (OSError, subprocess.TimeoutExpired) as error:
        return [{**failed, "reason": timing.reason(error)}]
    if done.returncode:
        return [{**failed, "reason": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}]
    return [{**about, **row} for row in json.loads(done.stdout.splitlines()[-1])]


def check(spec: ArgSpec, implementation: str) -> Row:
    """Relative errors of outputs and gradients against XLA in float32, the blocks given to both."""
    data = subjects.draw(spec)
    wide = {name: x.astype(jnp.float32) for name, x in data.items()}
    subject, reference = subjects.nsa(spec, implementation), subjects.nsa(spec, "xla")
    given = subjects.given(spec, 0.5)
    step = jax.jit(timing.gradients(subject))
    args = (*timing.operands(subject, data | given), data["d_out"])
    found, again = step(*args), step(*args)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(timing.gradients(reference))
        expected = exact(*timing.operands(reference, wide | given), wide["d_out"])
        choose = jax.jit(reference.function)
        own = choose(*(wide[n] for n in reference.moving), given["indices"])[1]
    chosen = jax.jit(subject.function)(*(data[n] for n in subject.moving), given["indices"])[1]
    errors = jax.tree.map(relative_error, found, expected)
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), found, again)
    names = ("output", *(f"d_{name}" for name in subject.moving))
    return {
        "spec": spec.name,
        "implementation": implementation,
        "length": spec.length,
        "relative_errors": dict(zip(names, (errors[0], *errors[1]), strict=True)),
        "same_blocks": float(np.mean(np.asarray(chosen) == np.asarray(own))),
        "same_bits_again": all(jax.tree.leaves(same)),
    }


def relative_error(x: jax.Array, reference: jax.Array) -> float:
    """RMS of the difference over RMS of the reference."""
    difference = np.asarray(x, np.float64) - np.asarray(reference, np.float64)
    return float(np.sqrt(np.mean(difference**2) / np.mean(np.asarray(reference, np.float64) ** 2)))


def main(a: Arguments) -> None:
    start = time.perf_counter()
    if a.torch_python is not None:  # two processes share the GPU: this one must not take all of its memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    a = resolve(a)
    result: Row = {"arguments": arguments(a), "environment": environment()}
    if importlib.util.find_spec("tokamax"):
        result["environment"]["versions"]["tokamax"] = importlib.metadata.version("tokamax")
    wanted = [(spec, i) for i in a.implementations for spec in specs(a, a.check_length)]
    with ThreadPoolExecutor(a.threads) as pool:  # they compile side by side
        checks = list(pool.map(lambda pair: check(*pair), wanted if a.check_length else []))
    for found in checks:
        worst = max(found["relative_errors"].values())
        print(
            f"{found['spec']}, {found['implementation']}: largest relative error {worst:.1e}, blocks as in "
            f"float32 {found['same_blocks']:.4f}, same bits again: {found['same_bits_again']}"
        )
    schedule, rows = Schedule(a.budget_s, start), []
    with contextlib.closing(tqdm(jobs(a))) as bar:
        for job in bar:
            bar.set_postfix_str(f"{job.kind} {job.spec} {job.length}")
            rows += schedule(job)
            result |= {"checks": checks, "rows": rows, "crossovers": report.crossovers(rows)}
            result |= {"dropped": schedule.dropped, "seconds": time.perf_counter() - start}
            write_json(a.out, result)
    report.plot(rows, a.out.with_suffix(".png"))
    print(report.table(rows))
    for crossover in result.get("crossovers", ()):
        print(report.describe(crossover))
    for kind in dict.fromkeys(job["job"] for job in schedule.dropped):
        which = [f"{j['spec']} at {j['length']}" for j in schedule.dropped if j["job"] == kind]
        print(f"left out, as {a.budget_s:g} s did not suffice: {kind}: {', '.join(which)}")
    print(f"{time.perf_counter() - start:.0f} s")


def arguments(a: Arguments) -> Row:
    """Without the machine's paths."""
    plain = dataclasses.asdict(a) | {"out": a.out.name}
    return plain | {"torch_python": a.torch_python is not None}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
