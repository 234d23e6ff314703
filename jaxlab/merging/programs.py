"""Compiled programs of a merge: a chunk or a tensor merged, or measured for an operator on whole models."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8, UInt32

from jaxlab.merging.injection import Given, Method, inject_tensor
from jaxlab.merging.layout import operator_of
from jaxlab.merging.merge import arithmetic_dtype, merge_tensors
from jaxlab.merging.numerics import (
    Chunks,
    Cut,
    Mode,
    Share,
    difference,
    in_chunks,
    magnitude_bits,
    rounding_by,
)
from jaxlab.merging.operators import Operator, operator_named
from jaxlab.merging.plan import MergePlan, Merging, PlannedTensor, dtype_of
from jaxlab.merging.ranks import asked_ranks, known_ranks

ZERO = np.uint32(0)
"""What `rounding_by` takes."""


class Program(NamedTuple):
    """What a compiled merge depends on beside shapes and dtypes."""

    operator: str
    mode: Mode
    fixed: tuple[tuple[str, Any], ...]
    """Switches and counts."""
    injected: bool
    out: str
    num_layers: int
    models: int
    task: int | None = None

    @property
    def method(self) -> Method:
        """Of an injection."""
        return Method(self.operator, self.mode, self.fixed, self.models)


def program_of(tensor: PlannedTensor, step: Merging, size: int, num_layers: int) -> tuple[Program, Any]:
    """The program and its numbers; weights are among them."""
    known = operator_of(step.operator, step.injected).parameters
    fixed = tuple((name, value) for name, value in step.parameters if known[name].static)
    if step.injected:
        numbers = Method(step.operator, step.mode, step.parameters, len(step.sources)).numbers(size)
    else:
        numbers = _numbers(step, size)
    weights = None if step.weights is None else [np.float32(w) for w in step.weights]
    count = len(step.sources)
    program = Program(
        step.operator, step.mode, fixed, step.injected, tensor.dtype, num_layers, count, step.task
    )
    return program, (numbers, weights)


def _numbers(step: Merging, size: int) -> dict[str, Any]:
    """What is traced of the parameters of a merge, for a tensor of `size` elements."""
    known = operator_named(step.operator).parameters
    numbers: dict[str, Any] = {}
    given = {name: p.default_in(step.mode) for name, p in known.items() if p.counted} | dict(step.parameters)
    for name, value in given.items():
        one = (lambda x: Share.of(float(x), size)) if known[name].counted else np.float32
        if known[name].per_model:
            values = value if isinstance(value, tuple) else (value,)
            numbers[name] = [one(x) for x in values * (len(step.sources) // len(values))]
        elif not known[name].static:
            numbers[name] = one(value)
    return numbers


def given_to(key: np.ndarray, step: Merging, totals: Any = None, statistics: Any = None) -> Given:
    return Given(key, np.int32(-1 if step.layer is None else step.layer), statistics, totals)


def check_operators(plan: MergePlan, statistics: Mapping[str, Any] | None = None) -> None:
    """Whether the operators of a plan take what it gives them, without computing anything.

    Raises:
      UserError: an operator refuses the number of models, a parameter or its statistics.
    """
    seen = set()
    for tensor in plan.tensors:
        step = tensor.merging
        if step is None:
            continue
        shape = step.merged_shape(tensor.shape)
        program, numbers = program_of(tensor, step, math.prod(shape), plan.num_layers)
        own = (statistics or {}).get(tensor.name)
        asked = (program, step.base is None, len(shape), own is None)
        if asked not in seen:
            seen.add(asked)
            arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for _ in step.everything]
            base = arrays.pop() if step.base is not None else None
            given = given_to(np.zeros(2, np.uint32), step, statistics=own)
            jax.eval_shape(
                functools.partial(_merge, program, offset=0), tuple(arrays), base, numbers, given,
            )  # fmt: skip


class Scores(NamedTuple):
    """Of a chunk, what `largest` is asked about."""

    bits: tuple[UInt32[Array, " n"], ...]
    """`magnitude_bits` of each score."""
    sides: tuple[UInt8[Array, " n"], ...]
    """For each request: 0 below its bracket, 1 in it, 2 above."""
    counts: tuple[UInt32[Array, ""], ...]
    """For each request how many elements of the whole tensor are wanted."""
    of: tuple[UInt32[Array, ""], ...]
    """For each request which of the scores it is about."""


class _Seen(Chunks):
    """Notes what `largest` is asked about."""

    def __init__(self, size: Array) -> None:
        self.size = size
        self.scores: list[Array] = []
        self.requests: list[tuple[int, Array]] = []

    def largest(self, x: Array, count: Array) -> Array:
        places = [i for i, score in enumerate(self.scores) if score is x]
        if not places:
            self.scores.append(x)
        self.requests.append((places[0] if places else len(self.scores) - 1, count))
        return jnp.zeros(x.shape, bool)


class _Known(Chunks):
    """Answers `largest` by cuts in the order in which they were asked for."""

    def __init__(self, size: Array, cuts: Sequence[Cut], offset: Array) -> None:
        self.size, self.offset, self.cuts = size, offset, iter(cuts)

    def largest(self, x: Array, count: Array) -> Array:
        return next(self.cuts).keeps(x, self.offset)


@functools.partial(jax.jit, static_argnames="program")
def merge_part(
    program: Program,
    models: tuple[Array, ...],
    base: Array | None,
    numbers: Any,
    given: Given,
    offset: UInt32[Array, "2"],
    zero: UInt32[Array, ""],
    size: UInt32[Array, ""] | None = None,
    cuts: tuple[Cut, ...] = (),
    found: tuple[Int32[Array, "rows width"], ...] | None = None,
) -> Array:
    """A chunk that begins at `offset`, merged, in the output's dtype.

    Args:
      size, cuts: of the whole tensor, for operators of scope "cut".
      found: what `ranks` tells operators of scope "row".
    """
    with rounding_by(zero), known_ranks(found):
        if size is None:
            return _merge(program, models, base, numbers, given, offset)
        with in_chunks(_Known(size, cuts, offset)):
            return _merge(program, models, base, numbers, given, offset)


@functools.partial(jax.jit, static_argnames="program")
def score_part(
    program: Program,
    models: tuple[Array, ...],
    base: Array | None,
    numbers: Any,
    given: Given,
    offset: UInt32[Array, "2"],
    zero: UInt32[Array, ""],
    size: UInt32[Array, ""],
    brackets: UInt32[Array, "requests 2"],
) -> Scores:
    """What `largest` is asked about a chunk, by an operator of scope "cut" or one that gathers thresholds.

    Args:
      brackets: the least and the greatest value in the bracket of each request; more than there are.
    """
    seen = _Seen(size)
    with rounding_by(zero):
        gather = operator_of(program.operator, program.injected).gather
        if gather is None:
            with in_chunks(seen):
                _merge(program, models, base, numbers, given, offset)
        else:
            assert gather.thresholds is not None
            _, vectors, _ = _vectors(program, models, base, numbers)
            named = {} if given.statistics is None else {"statistics": given.statistics}
            for score in gather.thresholds.scores(vectors, **named):
                seen.largest(score, size)
    bits = [magnitude_bits(x).reshape(-1) for x in seen.scores]
    sides: list[Array] = []
    for i, (of, _) in enumerate(seen.requests):
        low, high = brackets[i, 0], brackets[i, 1]
        sides.append((bits[of] >= low).astype(jnp.uint8) + (bits[of] > high).astype(jnp.uint8))
    counts = tuple(count for _, count in seen.requests)
    return Scores(tuple(bits), tuple(sides), counts, tuple(jnp.uint32(of) for of, _ in seen.requests))


@functools.partial(jax.jit, static_argnames="program")
def merge_whole(
    program: Program,
    models: tuple[Array, ...],
    base: Array | None,
    numbers: Any,
    given: Given,
    zero: UInt32[Array, ""],
    found: tuple[Int32[Array, "*shape"], ...] | None = None,
) -> Array:
    """A whole tensor merged, in the output's dtype.

    Args:
      found: what `ranks` tells operators that ask for it.
    """
    with rounding_by(zero), known_ranks(found):
        return _merge(program, models, base, numbers, given, 0)


@functools.partial(jax.jit, static_argnames="program")
def rank_bits(
    program: Program,
    models: tuple[Array, ...],
    base: Array | None,
    numbers: Any,
    given: Given,
    zero: UInt32[Array, ""],
) -> tuple[UInt32[Array, "*rest row"], ...]:
    """What an operator asks `ranks` about, of a tensor or some of its rows."""
    with rounding_by(zero), asked_ranks() as asked:
        _merge(program, models, base, numbers, given, 0)
        return tuple(asked)


def _merge(
    program: Program, models: tuple[Array, ...], base: Array | None, numbers: Any, given: Given, offset: Any
) -> Array:
    numbers, weights = numbers
    if program.injected:
        assert base is not None
        method, layers = program.method, program.num_layers
        merged = inject_tensor(
            method, numbers, models, base, weights, given, num_layers=layers, offset=offset
        )
        merged = merged if program.task is None else merged[program.task]
        return merged.astype(dtype_of(program.out))
    operator = operator_named(program.operator)
    named = given._asdict() | ({} if weights is None else {"weight": weights})
    if operator.takes("num_layers"):
        named["num_layers"] = program.num_layers
    merged = merge_tensors(
        program.operator,
        models,
        base=base,
        mode=program.mode,
        offset=offset,
        **named,
        **dict(program.fixed),
        **numbers,
    )
    merged = merged if program.task is None else merged[str(program.task)]
    return merged.astype(dtype_of(program.out))


@functools.partial(jax.jit, static_argnames="program")
def measure(
    program: Program, models: tuple[Array, ...], base: Array | None, numbers: Any, given: Given
) -> Any:
    """One round of what an operator on whole models gathers, of one tensor."""
    operator, vectors, values = _vectors(program, models, base, numbers)
    dtype = arithmetic_dtype(operator, program.mode, models[0].dtype)
    supplied = {"dtype": dtype, "statistics": given.statistics, "totals": given.totals}
    return operator.measure(vectors, values, **supplied)


def _vectors(
    program: Program, models: tuple[Array, ...], base: Array | None, numbers: Any
) -> tuple[Operator, list[Array], dict[str, Any]]:
    """The operator, the task vectors that it gathers something of, and its parameters."""
    operator = operator_of(program.operator, program.injected)
    dtype = arithmetic_dtype(operator, program.mode, models[0].dtype)
    if program.injected:
        values = program.method.values(numbers[0])
    else:
        values = operator.resolve({**dict(program.fixed), **numbers[0]}, len(models), program.mode)
    if program.injected or not operator.of_models:
        assert base is not None
        return operator, [difference(x, base, dtype) for x in models], values
    return operator, [x.astype(jnp.float32) for x in models], values
