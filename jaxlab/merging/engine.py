"""Carries out a plan of a merge: a stream from the inputs' files to the output's, on a few threads.

Operators that work element by element get chunks and never hold a tensor; the others get one tensor at a
time, and those on whole models see all tensors once more before. What is not merged is copied without being
decoded. Nothing of the result depends on chunks, threads or order.
"""

import concurrent.futures
import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxlab.checkpoints import Planned, Tensor, in_shards
from jaxlab.errors import UserError
from jaxlab.merging.injection import Method
from jaxlab.merging.merge import gather_totals
from jaxlab.merging.numerics import tensor_key
from jaxlab.merging.plan import Input, MergePlan, Merging, PlannedTensor, dtype_of
from jaxlab.merging.programs import (
    ZERO,
    given_to,
    measure,
    merge_part,
    merge_whole,
    operator_of,
    program_of,
    scope_of,
)
from jaxlab.merging.streams import COPY, AmongKeptRows, Files, Hashed, Out, Reader, cast, padded

CHUNK = 1 << 18
"""Elements that are merged at once: with their intermediate results they fit in a cache."""
_WHOLE = 3 << 29
"""Bytes that operators on whole tensors may hold at once, unless one tensor needs more."""


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
    files = Files()
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
        files: Files,
        chunk: int,
        hash_inputs: Hashed,
        statistics: Mapping[str, Any],
    ) -> None:
        self.plan, self.reader = plan, Reader(inputs, files, hash_inputs)
        largest = max((math.prod(tensor.shape) for tensor in plan.tensors), default=1)
        self.chunk = min(chunk, 1 << max(0, largest - 1).bit_length())  # one program serves all
        self.statistics, self.budget = statistics, _Budget(_WHOLE)
        self.totals: dict[Any, Any] = {}

    def do(self, tensor: PlannedTensor, write: Callable[[np.ndarray, int], None]) -> Done:
        """One tensor; `write` is called with its bytes from the first to the last."""
        out = Out(write)
        hashes: dict[str, Any] = {}
        if tensor.merging is None:
            assert tensor.copy is not None
            for part in self.reader.parts(tensor.copy, 0, None, COPY, hashes):
                out.add(cast(part, dtype_of(tensor.dtype)))
        else:
            step = tensor.merging
            merged = math.prod(step.merged_shape(tensor.shape))
            among = None if step.rows is None else self._among_kept(tensor, step, out, hashes)
            if scope_of(step) == "element" and tensor.name not in self.statistics:
                self._by_chunks(tensor, step, merged, among or out, hashes)
            else:
                self._whole(tensor, step, among or out, hashes)
            if among is not None:
                among.keep_to(tensor.shape[0])
            self.reader.rest_of_hashes(step, merged, hashes)
        return Done(
            out.digest.hexdigest(), out.not_finite, {name: h.hexdigest() for name, h in hashes.items()}
        )

    def _among_kept(
        self, tensor: PlannedTensor, step: Merging, out: Out, hashes: dict[str, Any]
    ) -> AmongKeptRows:
        """Where merged rows go to when others are kept."""
        kept = step.kept
        assert kept is not None
        assert step.rows is not None

        def parts(start: int, stop: int) -> Iterator[np.ndarray]:
            for part in self.reader.parts(kept, start, stop, COPY, hashes):
                yield cast(part, dtype_of(tensor.dtype))

        return AmongKeptRows(out, step.rows, math.prod(tensor.shape[1:]), parts)

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
        operator = operator_of(step.operator, step.injected)
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
        shape = step.merged_shape(tensor.shape)
        size = math.prod(shape)
        program, numbers = program_of(tensor, step, size, self.plan.num_layers)
        arrays = [
            self.reader.read(source, size, {}, step.read_as).reshape(shape) for source in step.everything
        ]
        base = arrays.pop() if step.base is not None else None
        key = tensor_key(self.plan.seed, step.key or tensor.name)
        given = given_to(key, step, totals, self.statistics.get(tensor.name))
        found = measure(program, tuple(arrays), base, numbers, given)
        return jax.tree.map(lambda leaf: leaf[None], found)

    def _by_chunks(
        self,
        tensor: PlannedTensor,
        step: Merging,
        size: int,
        out: Out | AmongKeptRows,
        hashes: dict[str, Any],
    ) -> None:
        """An operator that works element by element."""
        program, numbers = program_of(tensor, step, size, self.plan.num_layers)
        everything = step.everything
        streams = [
            self.reader.parts(
                source, 0, size, self.chunk, hashes if i == everything.index(source) else {}, step.read_as
            )
            for i, source in enumerate(everything)
        ]
        key = tensor_key(self.plan.seed, step.key or tensor.name)
        start = 0
        for parts in zip(*streams, strict=True):
            count = len(parts[0])
            parts = tuple(padded(part, self.chunk) for part in parts)
            base = parts[-1] if step.base is not None else None
            models = parts[: len(step.sources)]
            offset = np.array([start & 0xFFFFFFFF, start >> 32], np.uint32)
            merged, bad = merge_part(
                program, models, base, numbers, given_to(key, step), offset, np.uint32(count), ZERO
            )
            out.add(np.asarray(merged)[:count], int(bad))
            start += count

    def _whole(
        self, tensor: PlannedTensor, step: Merging, out: Out | AmongKeptRows, hashes: dict[str, Any]
    ) -> None:
        """An operator that needs a tensor whole."""
        shape = step.merged_shape(tensor.shape)
        size = math.prod(shape)
        everything = step.everything
        program, numbers = program_of(tensor, step, size, self.plan.num_layers)
        key = tensor_key(self.plan.seed, step.key or tensor.name)
        with self.budget.take(whole_bytes(step, size)):
            arrays = [
                self.reader.read(source, size, hashes if i == everything.index(source) else {}, step.read_as)
                for i, source in enumerate(everything)
            ]
            arrays = [array.reshape(shape) for array in arrays]
            base = arrays.pop() if step.base is not None else None
            given = given_to(key, step, self.totals.get(_group(step)), self.statistics.get(tensor.name))
            merged, bad = merge_whole(program, tuple(arrays), base, numbers, given, ZERO)
            del arrays, base
            out.add(np.ascontiguousarray(np.asarray(merged)).reshape(-1), int(bad))


def _group(step: Merging | None) -> Any:
    """Tensors that an operator on whole models sees together."""
    return None if step is None else (step.operator, step.mode, step.injected, step.parameters)
