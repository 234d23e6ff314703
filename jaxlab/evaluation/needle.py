"""Needles found, by depth: what the rows of held-out needle batches came to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool


class ByDepth:
    """Collects batches of needles; data of other kinds has none and gives None."""

    def __init__(self) -> None:
        self._found: dict[int, list[bool]] = {}
        self._positions: dict[int, list[int]] = {}
        self._length = 0

    def add(self, batch: dict[str, np.ndarray], matches: Bool[np.ndarray, " B"]) -> None:
        """A batch and which of its rows were answered right."""
        if "needle_depths" not in batch:
            return
        self._length = batch["tokens"].shape[1]
        for depth, position, match in zip(
            batch["needle_depths"].tolist(), batch["needle_positions"].tolist(), matches.tolist(), strict=True
        ):
            self._found.setdefault(depth, []).append(match)
            self._positions.setdefault(depth, []).append(position)

    def results(self) -> dict[str, Any] | None:
        """For each depth, from the start of the text on: the value's position as a share of the length, the
        tokens from it to the answer, rows, and the share of them answered right."""
        if not self._found:
            return None
        return {"length": self._length, "depths": [self._at(depth) for depth in sorted(self._found)]}

    def _at(self, depth: int) -> dict[str, Any]:
        found: Sequence[bool] = self._found[depth]
        position = round(float(np.mean(self._positions[depth])))  # facts in text differ by a token or two
        return {
            "depth": position / (self._length - 1),
            "distance": self._length - 1 - position,
            "sequences": len(found),
            "exact_match": float(np.mean(found)),
        }
