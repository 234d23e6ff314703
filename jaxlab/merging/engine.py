"""Carries out a plan of a merge: a stream from the inputs' files to the output's, on a few threads.

Operators that work element by element get chunks and never hold a tensor; the others get one tensor at a
time, and those on whole models see all tensors once more before. What is not merged is copied without being
decoded. Nothing of the result depends on chunks, threads or order.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jaxlab.checkpoints import Planned, Tensor, in_shards
from jaxlab.errors import UserError
from jaxlab.merging.injection import Given, Method, inject_tensor
from jaxlab.merging.merge import arithmetic_dtype, gather_totals, merge_tensors
from jaxlab.merging.numerics import Mode, Share, difference, rounding_by, tensor_key
from jaxlab.merging.operators import Operator, operator_named
from jaxlab.merging.plan import Input, MergePlan, Merging, PlannedTensor, Source, dtype_of

CHUNK = 1 << 18
"""Elements that are merged at once: with their intermediate results they fit in a cache."""
_COPY = 1 << 22
"""Bytes."""
_PAGE, _EVERY = 1 << 12, 1 << 18
"""Of every 256 kB of an input, 4 kB are in its sampled digest."""
_ZERO = np.uint32(0)
Hashed = Literal["none", "sampled", "full"]
"""Which bytes of the inputs are hashed: none, 4 kB of every 256 kB of each tensor, all that are read."""
_WHOLE = 3 << 29
"""Bytes that operators on whole tensors may hold at once, unless one tensor needs more."""


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

    @property
    def method(self) -> Method:
        """Of an injection."""
        return Method(self.operator, self.mode, self.fixed, self.models)


@runtime_checkable
class Destination(Protocol):
    """Where tensors go to, from any thread: a folder that is taken up again, or memory."""

    @property
    def finished(self) -> Mapping[str, dict[str, Any]]:
        """The records of complete tensors by name."""

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        """Bytes of a tensor from `start` on."""

    def finish(self, name: str, **record: Any) -> None:
        """Notes that a tensor is complete."""


class Done(NamedTuple):
    """What became of one tensor."""

    sha256: str
    not_finite: int
    sources: dict[str, str]
    """SHA-256 of the bytes that were read, by input and name, if they were asked for."""


def scope_of(step: Merging) -> str:
    """What an element of the output depends on; see `Operator.scope`."""
    return _operator(step.operator, step.injected).scope(step.mode)


def _operator(name: str, injected: bool) -> Operator:
    operator = operator_named(name)
    return operator.for_injection if injected else operator


def whole_bytes(step: Merging, size: int) -> int:
    """About what merging a tensor of `size` elements whole takes."""
    return size * 4 * (2 * len(step.everything) + 3)


def layout(plan: MergePlan, inputs: Sequence[Input], shard_bytes: int | None = None) -> list[list[Planned]]:
    """The tensors of each file of the output: those of the first input's files, or cut by size.

    Args:
      shard_bytes: cut by this size, whatever the first input has.
    """
    planned = [Planned(t.name, dtype_of(t.dtype), t.shape, _never) for t in plan.tensors]
    files: dict[str, list[Planned]] = {}
    for tensor in planned:
        try:
            file = inputs[0][tensor.name].file
        except KeyError:  # a plan may have names of its own
            file = None
        files.setdefault("" if file is None else str(file), []).append(tensor)
    if shard_bytes is not None or "" in files:
        return in_shards(planned) if shard_bytes is None else in_shards(planned, shard_bytes)
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in files.values()]


def _never() -> np.ndarray:
    raise AssertionError("an engine writes it")


def execute(
    plan: MergePlan,
    inputs: Sequence[Mapping[str, Tensor] | Input],
    folder: Destination,
    *,
    threads: int | None = None,
    chunk: int = CHUNK,
    allow_not_finite: bool = False,
    hash_inputs: Hashed = "sampled",
    statistics: Mapping[str, Any] | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, dict[str, Any]]:
    """Writes every tensor of the plan that is not finished yet.

    Args:
      inputs: tensors by name, in the order of the plan's models.
      folder: where the tensors go to.
      chunk: elements at once.
      allow_not_finite: whether NaN and infinities may be written.
      hash_inputs: which bytes of the inputs are hashed, too.
      statistics: of data, by the tensor's name, for operators that need them.
      progress: called with the bytes of each tensor.

    Returns:
      For each tensor its record: sha256, not_finite, sources.

    Raises:
      UserError: an input is damaged, or the result is not finite though that is not allowed.
    """
    files = _Files()
    threads = threads or min(4, os.cpu_count() or 1)
    worker = _Worker(plan, inputs, files, chunk, hash_inputs, statistics or {})
    try:
        todo = []
        for tensor in plan.tensors:
            record = folder.finished.get(tensor.name)
            if record is None or record["hashed"] != hash_inputs:
                todo.append(tensor)
            else:
                _check_finite(tensor, record["not_finite"], allow_not_finite)
                progress(tensor.nbytes)
        worker.gather(todo)

        def one(tensor: PlannedTensor) -> None:
            done = worker.do(tensor, functools.partial(folder.write, tensor.name))
            _check_finite(tensor, done.not_finite, allow_not_finite)
            folder.finish(tensor.name, hashed=hash_inputs, **done._asdict())
            progress(tensor.nbytes)

        _run(one, todo, threads)
    finally:
        files.close()
    return dict(folder.finished)


def _check_finite(tensor: PlannedTensor, count: int, allowed: bool) -> None:
    if count and not allowed:
        raise UserError(
            f"{tensor.name}: {count} of {math.prod(tensor.shape)} values would be NaN or infinite; find them "
            "in the inputs with `inspect --scan`, or write them with --allow-nonfinite"
        )


def _run(one: Callable[[PlannedTensor], None], todo: Sequence[PlannedTensor], threads: int) -> None:
    """All of them, in their order as far as several threads can; the first exception ends it."""
    if threads == 1:
        for tensor in todo:
            one(tensor)
        return
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="merge")
    try:
        for future in concurrent.futures.as_completed([pool.submit(one, tensor) for tensor in todo]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Files:
    """Files that are opened once and read by all threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fills the buffer.

        Raises:
          UserError: the file is shorter, or cannot be read.
        """
        try:
            with self._lock:
                if path not in self._open:
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                descriptor = self._open[path]
            while len(buffer):
                count = os.preadv(descriptor, [buffer], offset)
                if count == 0:
                    raise UserError(f"{path}: cut off while it was read")
                buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class _Budget:
    """Bytes of memory that several threads share."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[None]:
        count = min(count, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


class _Worker:
    """Reads, merges and hands on the bytes of single tensors; any number of threads may use it."""

    def __init__(
        self,
        plan: MergePlan,
        inputs: Sequence[Mapping[str, Tensor] | Input],
        files: _Files,
        chunk: int,
        hash_inputs: Hashed,
        statistics: Mapping[str, Any],
    ) -> None:
        self.plan, self.inputs, self.files = plan, inputs, files
        largest = max((math.prod(tensor.shape) for tensor in plan.tensors), default=1)
        self.chunk = min(chunk, 1 << max(0, largest - 1).bit_length())  # one program serves all
        self.hash_inputs, self.statistics, self.budget = hash_inputs, statistics, _Budget(_WHOLE)
        self.totals: dict[Any, Any] = {}

    def tensor(self, source: Source) -> Tensor:
        return self.inputs[source.model][source.name]

    def do(self, tensor: PlannedTensor, write: Callable[[np.ndarray, int], None]) -> Done:
        """One tensor; `write` is called with its bytes from the first to the last."""
        out = _Out(write)
        hashes: dict[str, Any] = {}
        if tensor.merging is None:
            assert tensor.copy is not None
            for part in self._parts(tensor.copy, 0, None, _COPY, hashes):
                out.add(_cast(part, dtype_of(tensor.dtype)))
        else:
            step = tensor.merging
            size = math.prod(tensor.shape)
            merged = size if step.rows is None else size // max(1, tensor.shape[0]) * step.rows
            if scope_of(step) == "element":
                self._by_chunks(tensor, step, merged, out, hashes)
            else:
                self._whole(tensor, step, out, hashes)
            if merged < size:
                for part in self._parts(step.sources[0], merged, size, _COPY, hashes):
                    out.add(_cast(part, dtype_of(tensor.dtype)))
            self._rest_of_hashes(step, merged, hashes)
        return Done(
            out.digest.hexdigest(), out.not_finite, {name: h.hexdigest() for name, h in hashes.items()}
        )

    def gather(self, todo: Sequence[PlannedTensor]) -> None:
        """What operators on whole models need to know of all tensors."""
        groups: dict[Any, list[PlannedTensor]] = {}
        for tensor in self.plan.tensors:
            if tensor.merging is not None and scope_of(tensor.merging) == "model":
                groups.setdefault(_group(tensor.merging), []).append(tensor)
        wanted = {_group(t.merging) for t in todo if t.merging is not None}
        for group, tensors in groups.items():
            if group in wanted:
                self.totals[group] = self._totals(tensors)

    def _totals(self, tensors: Sequence[PlannedTensor]) -> Any:
        step = tensors[0].merging
        assert step is not None
        operator = _operator(step.operator, step.injected)
        assert operator.gather is not None
        if step.injected:
            chosen = Method(step.operator, step.mode, step.parameters, len(step.sources)).chosen
        else:
            chosen = operator.resolve(dict(step.parameters), len(step.sources), step.mode)
        measure = lambda totals: (self._measured(tensor, totals) for tensor in tensors)
        return gather_totals(operator.gather, measure, chosen)

    def _measured(self, tensor: PlannedTensor, totals: Any) -> Any:
        step = tensor.merging
        assert step is not None
        shape = tensor.shape if step.rows is None else (step.rows, *tensor.shape[1:])
        size = math.prod(shape)
        program, numbers = self._program(tensor, step, size)
        arrays = [self._read(source, size, {}, step.read_as).reshape(shape) for source in step.everything]
        base = arrays.pop() if step.base is not None else None
        key = tensor_key(self.plan.seed, step.key or tensor.name)
        given = _given(key, step, totals, self.statistics.get(tensor.name))
        found = _measure(program, tuple(arrays), base, numbers, given)
        return jax.tree.map(lambda leaf: leaf[None], found)

    def _by_chunks(
        self, tensor: PlannedTensor, step: Merging, size: int, out: "_Out", hashes: dict[str, Any]
    ) -> None:
        """An operator that works element by element."""
        program, numbers = self._program(tensor, step, size)
        everything = step.everything
        streams = [
            self._parts(
                source, 0, size, self.chunk, hashes if i == everything.index(source) else {}, step.read_as
            )
            for i, source in enumerate(everything)
        ]
        key = tensor_key(self.plan.seed, step.key or tensor.name)
        start = 0
        for parts in zip(*streams, strict=True):
            count = len(parts[0])
            parts = tuple(_padded(part, self.chunk) for part in parts)
            base = parts[-1] if step.base is not None else None
            models = parts[: len(step.sources)]
            offset = np.array([start & 0xFFFFFFFF, start >> 32], np.uint32)
            merged, bad = _merge_part(
                program, models, base, numbers, _given(key, step), offset, np.uint32(count), _ZERO
            )
            out.add(np.asarray(merged)[:count], int(bad))
            start += count

    def _whole(self, tensor: PlannedTensor, step: Merging, out: "_Out", hashes: dict[str, Any]) -> None:
        """An operator that needs a tensor whole."""
        rows = step.rows
        shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
        size = math.prod(shape)
        everything = step.everything
        program, numbers = self._program(tensor, step, size)
        key = tensor_key(self.plan.seed, step.key or tensor.name)
        with self.budget.take(whole_bytes(step, size)):
            arrays = [
                self._read(source, size, hashes if i == everything.index(source) else {}, step.read_as)
                for i, source in enumerate(everything)
            ]
            arrays = [array.reshape(shape) for array in arrays]
            base = arrays.pop() if step.base is not None else None
            given = _given(key, step, self.totals.get(_group(step)), self.statistics.get(tensor.name))
            merged, bad = _merge_whole(program, tuple(arrays), base, numbers, given, _ZERO)
            del arrays, base
            out.add(np.ascontiguousarray(np.asarray(merged)).reshape(-1), int(bad))

    def _read(self, source: Source, size: int, hashes: dict[str, Any], read_as: str | None) -> np.ndarray:
        parts = list(self._parts(source, 0, size, max(1, size), hashes, read_as))
        return parts[0] if parts else np.empty(0, self.tensor(source).dtype)

    def _program(self, tensor: PlannedTensor, step: Merging, size: int) -> tuple[Program, Any]:
        """The program and its numbers; weights are among them."""
        known = _operator(step.operator, step.injected).parameters
        fixed = tuple((name, value) for name, value in step.parameters if known[name].static)
        if step.injected:
            numbers = Method(step.operator, step.mode, step.parameters, len(step.sources)).numbers(size)
        else:
            numbers = _numbers(step, size)
        weights = None if step.weights is None else [np.float32(w) for w in step.weights]
        program = Program(
            step.operator,
            step.mode,
            fixed,
            step.injected,
            tensor.dtype,
            self.plan.num_layers,
            len(step.sources),
        )
        return program, (numbers, weights)

    def _rest_of_hashes(self, step: Merging, merged: int, hashes: dict[str, Any]) -> None:
        """The hash of a source is that of all its bytes, also where only its first rows were merged."""
        if self.hash_inputs == "none":
            return
        for source in dict.fromkeys(step.everything):
            size = self.tensor(source).size
            begun = size if (step.rows is None or source == step.sources[0]) else merged
            for _ in self._parts(source, begun, size, _COPY, hashes):
                pass

    def _parts(
        self,
        source: Source,
        start: int,
        stop: int | None,
        length: int,
        hashes: dict[str, Any],
        read_as: str | None = None,
    ) -> Iterator[np.ndarray]:
        """The elements start..stop of a source, flat, in parts of `length`, the last of them shorter."""
        tensor = self.tensor(source)
        stop = tensor.size if stop is None else stop
        parts = self._of_file if tensor.file is not None else _of_rows
        digest = None
        if self.hash_inputs != "none":
            digest = hashes.setdefault(f"{source.model}:{source.name}", hashlib.sha256())
        at = start * tensor.dtype.itemsize
        for part in parts(tensor, start, stop, length):
            if digest is not None:
                raw = part.view(np.uint8)
                for first, last in _hashed(at, at + raw.nbytes, self.hash_inputs):
                    digest.update(raw[first - at : last - at])
                at += raw.nbytes
            yield part if read_as is None else part.astype(dtype_of(read_as), copy=False)

    def _of_file(self, tensor: Tensor, start: int, stop: int, length: int) -> Iterator[np.ndarray]:
        assert tensor.file is not None
        size = tensor.dtype.itemsize
        for at in range(start, stop, length):
            part = np.empty(min(length, stop - at), tensor.dtype)
            self.files.read(tensor.file, memoryview(part.view(np.uint8)), tensor.offset + at * size)
            yield part


class _Out:
    """Bytes on their way out, hashed and searched for NaN and infinities."""

    def __init__(self, write: Callable[[np.ndarray, int], None]) -> None:
        self.digest = hashlib.sha256()
        self.not_finite = 0
        self._write, self._at = write, 0

    def add(self, values: np.ndarray, not_finite: int | None = None) -> None:
        """Flat values, in their order; `not_finite` is counted here unless it is told."""
        self.not_finite += count_not_finite(values) if not_finite is None else not_finite
        raw = values.view(np.uint8)
        self.digest.update(raw)
        self._write(raw, self._at)
        self._at += raw.nbytes


def _hashed(start: int, stop: int, what: Hashed) -> Iterator[tuple[int, int]]:
    """The bytes of a tensor between two that are hashed, as ranges."""
    if what == "full":
        yield start, stop
        return
    for page in range(start // _EVERY * _EVERY, stop, _EVERY):
        if page + _PAGE > start:
            yield max(page, start), min(page + _PAGE, stop)


def count_not_finite(values: np.ndarray) -> int:
    """How many NaN and infinities there are; integers have none."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(values.dtype.name)
    if exponent is not None:
        return int(np.count_nonzero((values.view(np.uint16) & exponent) == exponent))
    if values.dtype.kind != "f" and not values.dtype.name.startswith("float8"):
        return 0
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values if values.dtype == dtype else values.astype(dtype)


def _padded(part: np.ndarray, length: int) -> np.ndarray:
    """With zeros at its end, so that one program serves all parts."""
    if len(part) == length:
        return part
    padded = np.zeros(length, part.dtype)
    padded[: len(part)] = part
    return padded


def _of_rows(tensor: Tensor, start: int, stop: int, length: int) -> Iterator[np.ndarray]:
    """The same of a tensor that is computed as it is read, by rows."""
    if not tensor.shape or tensor.size == 0:
        if start < stop:
            yield np.ascontiguousarray(tensor.read()).reshape(-1)
        return
    row = tensor.size // tensor.shape[0]
    step = max(1, length // row)
    held = np.empty(0, tensor.dtype)
    at = start // row
    skip = start - at * row
    last = -(-stop // row)
    left = stop - start
    while left:
        while len(held) < min(length, left):
            rows = tensor.read_rows(at, min(at + step, last)).reshape(-1)[skip:]
            skip, at = 0, min(at + step, last)
            held = np.concatenate([held, rows]) if len(held) else np.ascontiguousarray(rows)
        count = min(length, left)
        yield held[:count]
        held, left = held[count:], left - count


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


def _given(key: np.ndarray, step: Merging, totals: Any = None, statistics: Any = None) -> Given:
    return Given(key, np.int32(-1 if step.layer is None else step.layer), statistics, totals)


def _group(step: Merging | None) -> Any:
    """Tensors that an operator on whole models sees together."""
    return None if step is None else (step.operator, step.mode, step.injected, step.parameters)


@functools.partial(jax.jit, static_argnames="program")
def _merge_part(
    program: Program,
    models: tuple[Array, ...],
    base: Array | None,
    numbers: Any,
    given: Any,
    offset: UInt32[Array, "2"],
    count: UInt32[Array, ""],
    zero: UInt32[Array, ""],
) -> tuple[Array, Array]:
    """The merged part in the output's dtype, and how many of its first `count` values are not finite."""
    with rounding_by(zero):
        merged = _merge(program, models, base, numbers, given, offset)
    real = jax.lax.iota(jnp.uint32, merged.size) < count
    return merged, jnp.sum(~jnp.isfinite(merged) & real, dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnames="program")
def _merge_whole(
    program: Program,
    models: tuple[Array, ...],
    base: Array | None,
    numbers: Any,
    given: Given,
    zero: UInt32[Array, ""],
) -> tuple[Array, Array]:
    with rounding_by(zero):
        merged = _merge(program, models, base, numbers, given, 0)
    return merged, jnp.sum(~jnp.isfinite(merged), dtype=jnp.uint32)


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
    return merged.astype(dtype_of(program.out))


@functools.partial(jax.jit, static_argnames="program")
def _measure(
    program: Program, models: tuple[Array, ...], base: Array | None, numbers: Any, given: Given
) -> Any:
    """One round of what an operator on whole models gathers, of one tensor."""
    operator = _operator(program.operator, program.injected)
    dtype = arithmetic_dtype(operator, program.mode, models[0].dtype)
    if program.injected:
        values = program.method.values(numbers[0])
    else:
        values = operator.resolve({**dict(program.fixed), **numbers[0]}, len(models), program.mode)
    if program.injected or not operator.of_models:
        assert base is not None
        vectors = [difference(x, base, dtype) for x in models]
    else:
        vectors = [x.astype(jnp.float32) for x in models]
    supplied = {"dtype": dtype, "statistics": given.statistics, "totals": given.totals}
    return operator.measure(vectors, values, **supplied)
