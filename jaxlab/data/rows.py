"""Rows of a batch."""

from collections.abc import Mapping

import numpy as np


def take_rows(batch: Mapping[str, np.ndarray], rows: slice | None) -> dict[str, np.ndarray]:
    """Some rows of a batch, by its arrays' first axis; all of them for None."""
    return dict(batch) if rows is None else {name: value[rows] for name, value in batch.items()}
