"""Carries out plans of merges: a stream from the inputs' files to the outputs', on a few threads.

Operators that work element by element, or row by row, get chunks and never hold a tensor. Those that need to
know where a tensor is cut, or all of them, see the same stream once before. The others get one tensor at a
time. What is not merged is copied without being decoded. Several plans share what they read. Nothing of a
result depends on chunks, threads, order, or the plans beside it.
"""

import concurrent.futures
import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxlab.checkpoints import Tensor
from jaxlab.errors import UserError
from jaxlab.merging.cutting import cuts_of, thresholds_of
from jaxlab.merging.injection import Method
from jaxlab.merging.layout import CHUNK, default_threads, is_streamed, operator_of, scope_of, whole_bytes
from jaxlab.merging.merge import gather_totals
from jaxlab.merging.numerics import Cut
from jaxlab.merging.plan import Input, MergePlan, Merging, PlannedTensor, Source, dtype_of
from jaxlab.merging.programs import ZERO, measure, merge_part, merge_whole, rank_bits
from jaxlab.merging.ranks import ranks_of
from jaxlab.merging.steps import Step, offset_words
from jaxlab.merging.streams import (
    COPY,
    AmongKeptRows,
    Files,
    Hashed,
    Out,
    Reader,
    cast,
    keep_freed_pages,
    padded,
)

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


class Merge(NamedTuple):
    """A plan, what it reads and where it goes."""

    plan: MergePlan
    inputs: Sequence[Mapping[str, Tensor] | Input]
    """Tensors by name, in the order of the plan's models."""
    folder: Destination
    statistics: Mapping[str, Any] = {}
    """Of data, by the tensor's name, for operators that need them."""


class Done(NamedTuple):
    """What became of one tensor."""

    sha256: str
    not_finite: int
    sources: dict[str, str]
    """SHA-256 of the bytes that were read, by input and name, if they were asked for."""


def execute(
    plan: MergePlan,
    inputs: Sequence[Mapping[str, Tensor] | Input],
    folder: Destination,
    *,
    statistics: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Writes every tensor of the plan that is not finished yet.

    Args:
      inputs: tensors by name, in the order of the plan's models.
      folder: where the tensors go to.
      statistics: of data, by the tensor's name, for operators that need them.
      options: see `execute_together`.

    Returns:
      For each tensor its record: sha256, not_finite, sources.

    Raises:
      UserError: an input is damaged, or the result is not finite though that is not allowed.
    """
    return execute_together([Merge(plan, inputs, folder, statistics or {})], **options)[0]


def execute_together(
    merges: Sequence[Merge],
    *,
    threads: int | None = None,
    chunk: int = CHUNK,
    allow_not_finite: bool = False,
    hash_inputs: Hashed = "sampled",
    progress: Callable[[int], Any] = lambda count: None,
) -> list[dict[str, dict[str, Any]]]:
    """Writes every tensor of several plans that is not finished yet; those of one name are made together, and
    what they are made from is read once for all of them.

    Args:
      threads: tensors at once.
      chunk: elements at once, a power of two.
      allow_not_finite: whether NaN and infinities may be written.
      hash_inputs: which bytes of the inputs are hashed, too.
      progress: called with the bytes of each tensor.

    Returns:
      For each plan and tensor its record: sha256, not_finite, sources.

    Raises:
      UserError: an input is damaged, or a result is not finite though that is not allowed.
    """
    keep_freed_pages()
    files = Files()
    threads = threads or default_threads()
    try:
        workers = [_Worker(merge, files, chunk, hash_inputs) for merge in merges]
        groups: dict[str, list[tuple[_Worker, PlannedTensor]]] = {}
        for worker in workers:
            todo = []
            for tensor in worker.plan.tensors:
                record = worker.folder.finished.get(tensor.name)
                if record is None or record["hashed"] != hash_inputs:
                    todo.append(tensor)
                    groups.setdefault(tensor.name, []).append((worker, tensor))
                else:
                    _check_finite(tensor, record["not_finite"], allow_not_finite)
                    progress(tensor.nbytes)
            worker.gather(todo, threads)
        budget = _Budget(_WHOLE)

        def one(group: Sequence[tuple[_Worker, PlannedTensor]]) -> None:
            jobs = [_Job(worker, tensor) for worker, tensor in group]
            _do(jobs, budget)
            for job in jobs:
                done = job.done()
                _check_finite(job.tensor, done.not_finite, allow_not_finite)
                job.worker.folder.finish(job.tensor.name, hashed=hash_inputs, **done._asdict())
                progress(job.tensor.nbytes)

        each_on_threads(one, list(groups.values()), threads)
    finally:
        files.close()
    return [dict(merge.folder.finished) for merge in merges]


def _check_finite(tensor: PlannedTensor, count: int, allowed: bool) -> None:
    if count and not allowed:
        raise UserError(
            f"{tensor.name}: {count} of {math.prod(tensor.shape)} values would be NaN or infinite; it is "
            "the first such tensor, and ends the merge; `inspect --scan` lists all of the inputs, "
            "--allow-nonfinite writes them"
        )


def each_on_threads(one: Callable[[Any], None], todo: Sequence[Any], threads: int) -> None:
    """All of them, in their order as far as several threads can; the first exception ends it."""
    if threads == 1:
        for item in todo:
            one(item)
        return
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="merge")
    try:
        for future in concurrent.futures.as_completed([pool.submit(one, item) for item in todo]):
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
    """A plan with what its tensors have in common; any number of threads may use it."""

    def __init__(self, merge: Merge, files: Files, chunk: int, hash_inputs: Hashed) -> None:
        self.plan, self.folder, self.statistics = merge.plan, merge.folder, merge.statistics
        self.reader = Reader(merge.inputs, files, hash_inputs)
        largest = max((math.prod(tensor.shape) for tensor in self.plan.tensors), default=1)
        self.chunk = min(chunk, 1 << max(0, largest - 1).bit_length())
        self.totals: dict[Any, Any] = {}

    def step(self, tensor: PlannedTensor) -> Step:
        assert tensor.merging is not None
        totals = self.totals.get(_group(tensor.merging))
        return Step(self.plan, tensor, self.reader, self.chunk, totals, self.statistics.get(tensor.name))

    def gather(self, todo: Sequence[PlannedTensor], threads: int) -> None:
        """What operators on whole models need to know of all tensors."""
        groups: dict[Any, list[PlannedTensor]] = {}
        for tensor in self.plan.tensors:
            if tensor.merging is not None and scope_of(tensor.merging) == "model":
                groups.setdefault(_group(tensor.merging), []).append(tensor)
        wanted = {_group(t.merging) for t in todo if t.merging is not None}
        for group, tensors in groups.items():
            if group in wanted:
                self.totals[group] = self._totals(tensors, threads)

    def _totals(self, tensors: Sequence[PlannedTensor], threads: int) -> Any:
        step = tensors[0].merging
        assert step is not None
        operator = operator_of(step.operator, step.injected)
        assert operator.gather is not None
        if step.injected:
            chosen = Method(step.operator, step.mode, step.parameters, len(step.sources)).chosen
        else:
            chosen = operator.resolve(dict(step.parameters), len(step.sources), step.mode)
        if operator.gather.thresholds is not None:
            each = lambda one, steps: each_on_threads(one, steps, threads)
            steps = [self.step(tensor) for tensor in tensors]
            kept = lambda size: operator.gather.thresholds.kept(chosen, size)
            return {"threshold": thresholds_of(steps, kept, each)}
        measure = lambda totals: (self._measured(tensor, totals) for tensor in tensors)
        return gather_totals(operator.gather, measure, chosen)

    def _measured(self, tensor: PlannedTensor, totals: Any) -> Any:
        step = self.step(tensor)
        arrays = [self.reader.read(s, step.size, None, step.merging.read_as) for s in step.merging.everything]
        found = measure(step.program, *step.split(arrays, step.shape), step.numbers, step.given(totals))
        return jax.tree.map(lambda leaf: leaf[None], found)


def _group(step: Merging | None) -> Any:
    """Tensors that an operator on whole models sees together."""
    return None if step is None else (step.operator, step.mode, step.injected, step.parameters)


class _Job:
    """A tensor of a plan that is being made."""

    def __init__(self, worker: _Worker, tensor: PlannedTensor) -> None:
        self.worker, self.tensor = worker, tensor
        self.out = Out(lambda values, start: worker.folder.write(tensor.name, values, start))
        self.hashes: dict[str, Any] = {}
        self.dtype = dtype_of(tensor.dtype)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that is read of it."""
        if self.tensor.merging is None:
            assert self.tensor.copy is not None
            return (self.tensor.copy,)
        return self.tensor.merging.everything

    @property
    def alike(self) -> Any:
        """Equal for jobs that one stream serves: how much of it, and what is kept between."""
        step = self.tensor.merging
        if step is None:
            return "copy", math.prod(self.tensor.shape)
        shape = step.merged_shape(self.tensor.shape)
        size, by_row = math.prod(shape), shape[-1:] if scope_of(step) == "row" else None
        kept = None if step.kept is None else self.worker.reader.place(step.kept)
        return "stream" if is_streamed(step) else "whole", size, by_row, step.rows, kept

    def done(self) -> Done:
        digests = {name: digest.hexdigest() for name, digest in self.hashes.items()}
        return Done(self.out.digest.hexdigest(), self.out.not_finite, digests)


def _do(jobs: Sequence[_Job], budget: _Budget) -> None:
    """Makes tensors of one name, each of another plan."""
    alike: dict[Any, list[_Job]] = {}
    for job in jobs:
        alike.setdefault(job.alike, []).append(job)
    for (kind, size, *rest), group in alike.items():
        shared = _Shared(group)
        if kind == "copy":
            _copy(group, shared, size)
            continue
        sinks = [shared.sink(job, first=job is group[0]) for job in group]
        if kind == "stream" and rest[0] is not None:
            _by_rows(group, sinks, shared, size, *rest[0])
        elif kind == "stream":
            _by_chunks(group, sinks, shared, size)
        else:
            _whole(group, sinks, shared, size, budget)
        for job, sink in zip(group, sinks, strict=True):
            if isinstance(sink, AmongKeptRows):
                sink.keep_to(job.tensor.shape[0])
        shared.hash_rest(group[0], size)
        shared.tell(group)


class _Shared:
    """The streams of several jobs, each of them once."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.streams: dict[Any, tuple[Reader, Source, str | None]] = {}
        self.hashes: dict[Any, dict[str, Any]] = {}
        for job in jobs:
            read_as = None if job.tensor.merging is None else job.tensor.merging.read_as
            for source in job.sources:
                key = self.key(job, source)
                self.streams.setdefault(key, (job.worker.reader, source, read_as))
                self.hashes.setdefault(key, {})

    def key(self, job: _Job, source: Source) -> Any:
        """The same for what has the same bytes."""
        read_as = None if job.tensor.merging is None else job.tensor.merging.read_as
        return job.worker.reader.place(source), read_as

    def parts(self, start: int, stop: int, length: int) -> Iterator[dict[Any, np.ndarray]]:
        """The same elements of all streams, part by part."""
        streams = [
            reader.parts(source, start, stop, length, self.hashes[key], read_as)
            for key, (reader, source, read_as) in self.streams.items()
        ]
        for parts in zip(*streams, strict=True):
            yield dict(zip(self.streams, parts, strict=True))

    def sink(self, job: _Job, *, first: bool) -> Out | AmongKeptRows:
        """Where merged values go to: others may be kept between them, which are hashed for the first job."""
        step = job.tensor.merging
        assert step is not None
        if step.rows is None:
            return job.out
        kept, reader = step.kept, job.worker.reader
        assert kept is not None
        hashes = self.hashes.setdefault(self.key(job, kept), {}) if first else None

        def parts(start: int, stop: int) -> Iterator[np.ndarray]:
            for part in reader.parts(kept, start, stop, COPY, hashes):
                yield cast(part, job.dtype)

        return AmongKeptRows(job.out, step.rows, math.prod(job.tensor.shape[1:]), parts)

    def hash_rest(self, job: _Job, merged: int) -> None:
        """A digest is of all bytes of a tensor, also where only its first rows are merged; of one whose rows
        are kept, all have been read."""
        step = job.tensor.merging
        if step is None or step.kept is None or job.worker.reader.hash_inputs == "none":
            return
        kept = self.key(job, step.kept)
        for key, (reader, source, _) in self.streams.items():
            if key != kept:
                for _ in reader.parts(source, merged, reader.tensor(source).size, COPY, self.hashes[key]):
                    pass

    def tell(self, jobs: Sequence[_Job]) -> None:
        """Hands each job the digests of what it reads, by its own names."""
        for job in jobs:
            step = job.tensor.merging
            kept = () if step is None or step.kept is None else (step.kept,)
            for source in (*job.sources, *kept):
                for digest in self.hashes[self.key(job, source)].values():
                    job.hashes[f"{source.model}:{source.name}"] = digest


Sinks = Sequence[Out | AmongKeptRows]


def _copy(jobs: Sequence[_Job], shared: _Shared, size: int) -> None:
    """A tensor that is not merged."""
    for parts in shared.parts(0, size, COPY):
        for job in jobs:
            job.out.add(cast(parts[shared.key(job, job.sources[0])], job.dtype))
    shared.tell(jobs)


def _by_chunks(jobs: Sequence[_Job], sinks: Sinks, shared: _Shared, size: int) -> None:
    """Operators that work element by element, once it is known where a tensor is cut."""
    steps = [job.worker.step(job.tensor) for job in jobs]
    found: dict[Any, tuple[Cut, ...]] = {}
    for step in steps:
        if step.scope == "cut" and step.prepared_by not in found:
            found[step.prepared_by] = cuts_of(step)
    cuts = [found.get(step.prepared_by, ()) for step in steps]
    keys = [[shared.key(job, source) for source in job.sources] for job in jobs]
    start = 0
    for parts in shared.parts(0, size, min(step.chunk for step in steps)):
        count = 0
        for sink, step, known, own in zip(sinks, steps, cuts, keys, strict=True):
            arrays = [parts[key] for key in own]
            count = len(arrays[0])
            for chunk in step.chunks(arrays, start):
                whole = (np.uint32(size), known) if step.scope == "cut" else ()
                merged = merge_part(step.program, *chunk.arguments, ZERO, *whole)
                sink.add(np.asarray(merged)[: chunk.elements])
        start += count


def _by_rows(jobs: Sequence[_Job], sinks: Sinks, shared: _Shared, size: int, width: int = 1) -> None:
    """Operators that work row by row."""
    steps = [job.worker.step(job.tensor) for job in jobs]
    rows = max(1, min(size, *(step.chunk for step in steps)) // max(1, width))
    for start, parts in zip(itertools.count(0, rows * width), shared.parts(0, size, rows * width)):
        for job, sink, step in zip(jobs, sinks, steps, strict=True):
            arrays = [parts[shared.key(job, source)] for source in job.sources]
            count = len(arrays[0])
            models = step.split([padded(array, rows * width) for array in arrays], (rows, width))
            arguments = step.program, *models, step.numbers, step.given(step.totals)
            merged = merge_part(*arguments, offset_words(start), ZERO, found=_ranks(step, arguments))
            sink.add(np.asarray(merged).reshape(-1)[:count])


def _ranks(step: Step, arguments: Any) -> tuple[np.ndarray, ...] | None:
    """What `ranks` will tell the operator, if it asks."""
    if not operator_of(step.merging.operator, step.merging.injected).ranked:
        return None
    return tuple(ranks_of(np.asarray(bits)) for bits in rank_bits(*arguments, ZERO))


def _whole(jobs: Sequence[_Job], sinks: Sinks, shared: _Shared, size: int, budget: _Budget) -> None:
    """Operators that need a tensor whole."""
    steps = [job.worker.step(job.tensor) for job in jobs]
    need = max(whole_bytes(step.merging, size) for step in steps)
    with budget.take(need + sum(size * 4 for _ in range(len(shared.streams) - len(jobs[0].sources)))):
        arrays = {
            key: reader.read(source, size, shared.hashes[key], read_as)
            for key, (reader, source, read_as) in shared.streams.items()
        }
        for job, sink, step in zip(jobs, sinks, steps, strict=True):
            own = [arrays[shared.key(job, source)] for source in job.sources]
            models = step.split(own, step.shape)
            if len(jobs) == 1:
                arrays, own = {}, []
            arguments = step.program, *models, step.numbers, step.given(step.totals)
            merged = merge_whole(*arguments, ZERO, _ranks(step, arguments))
            del models, arguments
            sink.add(np.ascontiguousarray(np.asarray(merged)).reshape(-1))
