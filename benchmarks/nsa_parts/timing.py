"""Compiling the parts of an attention (forward, backward, both) side by side, and timing them."""

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

PARTS = ("forward", "backward", "both")
STEPS = {"forward": ("forward",), "backward": ("backward",), "both": ("saving", "backward")}
"""Programs of each part: forward(*moving, *fixed), saving(moving, fixed) -> (output, pullback, anything),
backward(pullback, cotangent) -> gradients."""
L2_BYTES = 100e6
"""Twice an H100's: inputs go round among so many bytes, so that none of a call's are still there."""
LEAST_SAMPLE_S = 0.02
"""Calls of less are timed several in a row: waiting for the device costs some tens of microseconds."""


class Subject(NamedTuple):
    """What is timed: function(*moving, *fixed) -> (output, anything); gradients are those of `moving`."""

    name: str
    function: Callable[..., tuple[jax.Array, Any]]
    moving: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS


class Program(NamedTuple):
    call: Callable[..., Any]
    compile_s: float
    temporary_mib: float


Programs = dict[str, Program]


def _pulled(subject: Subject, moving: tuple[Any, ...], fixed: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Output, pullback and what else the function returns: dropped, it would not be computed."""
    return jax.vjp(lambda *first: subject.function(*first, *fixed), *moving, has_aux=True)


def gradients(subject: Subject) -> Callable[..., Any]:
    """(moving, fixed, cotangent) -> output and gradients of `moving`, in one program."""

    def both(moving: tuple[Any, ...], fixed: tuple[Any, ...], d_out: jax.Array) -> Any:
        out, pull, _ = _pulled(subject, moving, fixed)
        return out, pull(d_out)

    return both


def build(subjects: list[Subject], data: dict[str, Any], threads: int) -> dict[str, Programs | str]:
    """Name -> programs, or the reason why there are none. Traced in turn, compiled side by side."""
    like = jax.eval_shape(lambda x: x, data)
    waiting: dict[str, dict[str, Any]] = {}
    built: dict[str, Programs | str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for subject in subjects:
            moving, fixed = operands(subject, like)
            try:
                steps = {"forward": jax.jit(subject.function).lower(*moving, *fixed)}
                if "backward" in subject.parts:
                    save = functools.partial(_pulled, subject)
                    _, pull, _ = jax.eval_shape(save, moving, fixed)
                    steps["saving"] = jax.jit(save).lower(moving, fixed)
                    steps["backward"] = jax.jit(lambda pull, d_out: pull(d_out)).lower(pull, like["d_out"])
                waiting[subject.name] = {n: pool.submit(_compile, step) for n, step in steps.items()}
            except Exception as error:  # a peer that cannot run is told in the table with its reason
                built[subject.name] = reason(error)
        for name, futures in waiting.items():
            try:
                built[name] = {part: future.result() for part, future in futures.items()}
            except Exception as error:
                built[name] = reason(error)
    return built


def _compile(lowered: Any) -> Program:
    start = time.perf_counter()
    compiled = lowered.compile()
    taken = time.perf_counter() - start
    return Program(compiled, taken, compiled.memory_analysis().temp_size_in_bytes / 2**20)


def reason(error: Exception) -> str:
    """One line of it."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def operands(subject: Subject, data: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(data[n] for n in subject.moving), tuple(data[n] for n in subject.fixed)


def time_parts(
    subject: Subject, programs: Programs, sets: list[dict[str, Any]], samples: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each part. `sets` are copies of the inputs that calls take in turn."""
    rows = []
    for part in subject.parts:
        used = [programs[name] for name in STEPS[part]]
        row: dict[str, Any] = {"name": subject.name, "part": part}
        try:
            args = _arguments(subject, programs, sets, part)
            row |= measure(_chain(used), args, samples, seconds)
            del args
        except Exception as error:  # out of memory, above all
            row["reason"] = reason(error)
        row["compile_s"] = sum(program.compile_s for program in used)
        row["temporary_mib"] = max(program.temporary_mib for program in used)
        rows.append(row)
    return rows


def _arguments(subject: Subject, programs: Programs, sets: list[dict[str, Any]], part: str) -> list[Any]:
    if part == "backward":
        return [(programs["saving"].call(*operands(subject, data))[1], data["d_out"]) for data in sets]
    if part == "both":
        return [(operands(subject, data), data["d_out"]) for data in sets]
    return [tuple(x for group in operands(subject, data) for x in group) for data in sets]


def _chain(programs: list[Program]) -> Callable[..., Any]:
    """One program, or the one that saves and then the one that pulls back."""
    if len(programs) == 1:
        return programs[0].call
    saving, backward = programs

    def both(operands: tuple[Any, ...], d_out: jax.Array) -> Any:
        out, pull, more = saving.call(*operands)
        return out, more, backward.call(pull, d_out)

    return both


def measure(
    call: Callable[..., Any], args: list[tuple[Any, ...]], samples: int, seconds: float
) -> dict[str, Any]:
    """Seconds of one call: the median of up to `samples` samples that take about `seconds` in all (at least
    three samples on a GPU, one elsewhere), with all of them."""
    for each in args:  # the first call of a program loads it
        jax.block_until_ready(call(*each))
    one = _run(call, args, 0, 1)
    calls = max(1, min(50, round(LEAST_SAMPLE_S / one)))
    least = 3 if jax.default_backend() == "gpu" else 1
    samples = max(least, min(samples, int(seconds / (one * calls))))
    taken = [_run(call, args, i * calls, calls) / calls for i in range(samples)]
    return {"median_s": statistics.median(taken), "samples_s": taken, "calls_per_sample": calls}


def _run(call: Callable[..., Any], args: list[tuple[Any, ...]], first: int, calls: int) -> float:
    start = time.perf_counter()
    for i in range(first, first + calls):
        out = call(*args[i % len(args)])
    jax.block_until_ready(out)
    return time.perf_counter() - start


def copies(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs, as often as it takes to fill the second-level cache."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
    more = 0 if jax.default_backend() == "cpu" else min(7, int(L2_BYTES // size))
    return [data, *(jax.tree.map(lambda x: x.copy(), data) for _ in range(more))]
