"""Rows of embeddings and heads that stand for the same token in several models."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxlab.checkpoints import SameTokens, Tensor
from jaxlab.errors import UserError


@dataclass(frozen=True)
class CommonRows:
    """Rows of a table that all models have, in runs of rows that follow each other in every one of them."""

    runs: tuple[tuple[int, tuple[int, ...]], ...]
    """(how many rows, the first of them in each model), in the order of the first model's."""
    sizes: tuple[int, ...]
    """Rows of each model's table."""

    @property
    def count(self) -> int:
        """How many rows there are."""
        return sum(count for count, _ in self.runs)

    @property
    def of_first(self) -> tuple[tuple[int, int], ...]:
        """The runs as (first row, how many) in the first model."""
        return tuple((starts[0], count) for count, starts in self.runs)

    def index(self, model: int) -> Int[np.ndarray, " rows"]:
        """The rows in one model's table."""
        parts = [np.arange(starts[model], starts[model] + count) for count, starts in self.runs]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def is_prefix(self, model: int) -> bool:
        """Whether they are a model's first rows, in their order."""
        return bool(np.array_equal(self.index(model), np.arange(self.count)))

    @property
    def is_everything(self) -> bool:
        """Whether they are all rows of all models, in the same order."""
        return self.count == self.sizes[0] and all(
            self.sizes[i] == self.count and self.is_prefix(i) for i in range(len(self.sizes))
        )

    def described(self, first: str) -> str:
        """How many rows are merged, and whose the others are."""
        left = self.sizes[0] - self.count
        rows = f"{self.count:,} of {self.sizes[0]:,} rows merged"
        return rows if left == 0 else f"{rows}, the other {left:,} the {first}'s"


def common_rows(tokens: SameTokens | int | None, sizes: Sequence[int]) -> CommonRows:
    """The rows that tables of these sizes have in common.

    Args:
      tokens: which ids stand for the same token; or how many first ids do; None: all ids.
      sizes: rows of each model's table.
    """
    if tokens is None or isinstance(tokens, int):
        count = min([*sizes] if tokens is None else [tokens, *sizes])
        runs = ((count, (0,) * len(sizes)),) if count else ()
        return CommonRows(runs, tuple(sizes))
    rows = tokens[: sizes[0]]
    rows = rows[np.all((rows >= 0) & (rows < np.asarray(sizes)), axis=1)]
    if not len(rows):
        return CommonRows((), tuple(sizes))
    breaks = 1 + np.flatnonzero(np.any(np.diff(rows, axis=0) != 1, axis=1))
    bounds = [0, *breaks.tolist(), len(rows)]
    starts = rows[bounds[:-1]].tolist()
    counts = np.diff(bounds).tolist()
    return CommonRows(tuple((c, tuple(s)) for c, s in zip(counts, starts, strict=True)), tuple(sizes))


def table_of_rows(table: Tensor, rows: Int[np.ndarray, " rows"]) -> Tensor:
    """Some rows of a table, in the order given, as a tensor of its own."""
    if rows.size and not 0 <= rows.min() <= rows.max() < table.shape[0]:
        raise UserError(f"{table.name}: has {table.shape[0]} rows, row {rows.max()} is asked for")

    def read_rows(start: int, stop: int) -> np.ndarray:
        wanted = rows[start:stop]
        found = np.empty((len(wanted), *table.shape[1:]), table.dtype)
        bounds = [0, *(1 + np.flatnonzero(np.diff(wanted) != 1)).tolist(), len(wanted)]
        for first, last in itertools.pairwise(bounds):
            if first < last:
                found[first:last] = table.read_rows(int(wanted[first]), int(wanted[first]) + last - first)
        return found

    shape = (len(rows), *table.shape[1:])
    return dataclasses.replace(table, shape=shape, read_rows=read_rows, file=None)
