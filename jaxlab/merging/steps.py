"""One tensor's merge as compiled programs want it: its numbers, and its chunks at sizes that few programs
serve."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt32

from jaxlab.merging.injection import Given
from jaxlab.merging.layout import operator_of, scope_of
from jaxlab.merging.operators.registry import Scope
from jaxlab.merging.plan import MergePlan, Merging, PlannedTensor
from jaxlab.merging.programs import given_to, program_of
from jaxlab.merging.random_masks import tensor_key
from jaxlab.merging.streams import Reader, padded

_FINER = 1 << 5
"""What would fill less than a quarter of a chunk gets chunks so many times smaller: a call takes about as
long as some ten thousand elements."""


class Chunk(NamedTuple):
    """Elements that a program takes at once."""

    arguments: tuple[Any, ...]
    """Models, base, numbers, given, offset."""
    elements: int
    """So many of them are elements; what follows is zeros."""


def offset_words(index: int) -> UInt32[np.ndarray, "2"]:
    """Where a chunk begins, as programs take it: the lower word first."""
    return np.array([index & 0xFFFFFFFF, index >> 32], np.uint32)


class Step:
    """A tensor of a plan with all that merging it takes."""

    def __init__(
        self,
        plan: MergePlan,
        tensor: PlannedTensor,
        reader: Reader,
        chunk: int,
        totals: Any = None,
        statistics: Any = None,
    ) -> None:
        assert tensor.merging is not None
        self.merging: Merging = tensor.merging
        self.name = tensor.name
        self.reader, self.chunk, self.totals, self.statistics = reader, chunk, totals, statistics
        self.shape = self.merging.merged_shape(tensor.shape)
        self.size = math.prod(self.shape)
        """Of what is merged."""
        self.program, self.numbers = program_of(tensor, self.merging, self.size, plan.num_layers)
        self._key = tensor_key(plan.seed, self.merging.key or tensor.name)

    @functools.cached_property
    def scope(self) -> Scope:
        return scope_of(self.merging)

    @functools.cached_property
    def prepared_by(self) -> Any:
        """Equal for steps whose tensors are cut alike: what the weights have no part in."""
        step, operator = self.merging, operator_of(self.merging.operator, self.merging.injected)
        if operator.preparation is None or operator.weighted_first:
            return id(self)
        parameters = tuple((k, v) for k, v in step.parameters if k in operator.preparation_parameters)
        places = tuple(self.reader.place(source) for source in step.everything)
        return operator.preparation, step.mode, parameters, places, step.read_as, self.size

    def given(self, totals: Any = None) -> Given:
        """What an operator may ask for, of the whole tensor."""
        return given_to(self._key, self.merging, totals, self.statistics)

    def split(
        self, arrays: Sequence[np.ndarray], shape: tuple[int, ...] | None = None
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        """Arrays of everything that is read as the models and the base."""
        arrays = [array if shape is None else array.reshape(shape) for array in arrays]
        base = arrays.pop() if self.merging.base is not None else None
        return tuple(arrays), base

    def parts(self, length: int, *, start: int = 0, stop: int | None = None) -> Iterator[list[np.ndarray]]:
        """The elements of everything that is read, in parts; not hashed."""
        stop = self.size if stop is None else stop
        read_as = self.merging.read_as
        streams = [self.reader.parts(s, start, stop, length, None, read_as) for s in self.merging.everything]
        return map(list, zip(*streams, strict=True))

    def chunks(self, arrays: Sequence[np.ndarray], start: int, most: int | None = None) -> Iterator[Chunk]:
        """A part that begins at element `start`, at sizes that few programs serve; at most `most` at once."""
        at, given = 0, self.given(self.totals)
        most = min(most or self.chunk, self.chunk)
        while at < len(arrays[0]):
            left, length = len(arrays[0]) - at, most
            if left * 4 <= length and length > _FINER:
                length //= _FINER
            count = min(left, length)
            first = start + at
            models, base = self.split([padded(array[at : at + count], length) for array in arrays])
            own = given
            if self.statistics is not None:
                own = given._replace(statistics=self._statistics(first, count, length))
            yield Chunk((models, base, self.numbers, own, offset_words(first)), count)
            at += count

    def _statistics(self, first: int, count: int, length: int) -> Any:
        """Those of the tensor's shape, of these elements; the others as they are."""

        def one(leaf: Any) -> Any:
            if np.shape(leaf) != self.shape or self.size == 1:
                return leaf
            return padded(np.asarray(leaf).reshape(-1)[first : first + count], length)

        return jax.tree.map(one, self.statistics)
