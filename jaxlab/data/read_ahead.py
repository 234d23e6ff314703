"""Training batches that are built while the step before them computes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxlab.data.documents.source import DocumentsSource
from jaxlab.data.image_chats import ImageChatsSource

if TYPE_CHECKING:
    from jaxlab.data.source import Source

AHEAD = 2
"""Batches that wait."""


class BatchReader:
    """The training batches of a source, in a thread of `grain` that is ahead of what is asked for.

    What it gives is what `Source.batch` gives: steps may be passed by or asked for again, which only costs
    the batches that had been built for nothing.
    """

    def __init__(
        self,
        source: "Source",
        seed: int,
        batch_size: int,
        *,
        rows: slice | None = None,
        ahead: int | None = None,
    ) -> None:
        """
        Args:
          rows: of the batch, those of this process; None: all.
          ahead: batches that may wait; 0: each is built when it is asked for. None: AHEAD where the source
            reads files, 0 for those that are in memory.
        """
        self._source, self._seed, self._batch_size = source, seed, batch_size
        self._rows = rows
        reads_files = isinstance(source, DocumentsSource | ImageChatsSource)
        self._ahead = (AHEAD if reads_files else 0) if ahead is None else ahead
        self._next = 0
        self._batches: Iterator[dict[str, np.ndarray]] | None = None

    def read(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step.

        Raises:
          UserError: as the source does.
        """
        if not self._ahead:
            return self._build(step)
        if self._batches is None or step != self._next:
            self.close()
            self._batches = self._from(step)
        self._next = step + 1
        return next(self._batches)

    def close(self) -> None:
        """Ends the thread; `read` begins another."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
            self._batches = None

    def _build(self, step: int) -> dict[str, np.ndarray]:
        return self._source.batch(self._seed, step, self._batch_size, self._rows)

    def _from(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        import grain

        steps = grain.MapDataset.range(step, (1 << 62)).map(self._build)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._ahead)
        found: Iterator[dict[str, np.ndarray]] = iter(steps.to_iter_dataset(options))
        return found
