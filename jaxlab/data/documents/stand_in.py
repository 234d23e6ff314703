"""What stands for documents that are not tokenised yet, where only the shapes of batches are asked for."""

import warnings
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.documents.source import DocumentsSource
from jaxlab.data.rows import take_rows
from jaxlab.errors import UserNote


class StandIn:
    """Batches of the right shapes with nothing in them."""

    identity = ""

    def __init__(self, source: DocumentsSource) -> None:
        self.source_names = source.source_names
        self._source = source
        text = "the data is not tokenised yet (prepare CONFIG does it): its amount is not checked"
        for note in (*source.notes, text):
            warnings.warn(note, UserNote, stacklevel=3)

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        config = self._source.config
        shape = (batch_size, config.sequence_length)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "loss_mask": np.zeros(shape, bool),
            "source_ids": np.zeros(batch_size, np.int32),
        }
        if not config.attend_across:
            batch["segment_ids"] = np.zeros(shape, np.int32)
        return take_rows(batch, rows)

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        for step in range(count):
            yield self.batch(0, step, batch_size, rows)

    def held_out_rows(self, batch_size: int, split: str) -> int:
        return batch_size

    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer()

    @property
    def largest_token(self) -> int:
        return 0
