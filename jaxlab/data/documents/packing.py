"""How documents are laid into rows of T tokens. Every token of every document is in exactly one row."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

WINDOW = 1 << 18
"""Pieces that are packed together: best fit needs a choice, and their rows are written in order."""


class Pieces(NamedTuple):
    """Stretches of documents, in the order in which rows hold them."""

    start: Int[np.ndarray, " pieces"]
    """Token of the split's first document at which each begins (int64)."""
    length: Int[np.ndarray, " pieces"]
    """(int32)"""
    row_ends: Int[np.ndarray, " rows"]
    """Of the pieces of each row (int64)."""


def pack(ends: Int[np.ndarray, " documents"], row_length: int, *, how: str = "best_fit") -> Pieces:
    """Lays documents that stand one after the other into rows.

    best_fit: a document of more than T tokens fills rows of its own, and what is left of it is packed like a
    short one: each piece, the longest first, into the row that it fills best (Ding et al., "Fewer Truncations
    Improve Language Modeling", 2024, section 3). concatenate: rows are cut wherever they are full.

    Args:
      ends: of each document in the tokens of all (int64), ascending.
      row_length: T.
    """
    if not len(ends) or not ends[-1]:
        return Pieces(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64))
    if how == "concatenate":
        cuts = np.union1d(ends, np.arange(row_length, ends[-1] + 1, row_length))
        cuts = cuts[cuts > 0]
        starts = np.concatenate([[0], cuts[:-1]])
        rows = np.flatnonzero((cuts % row_length == 0) | (cuts == ends[-1])) + 1
        return Pieces(starts, (cuts - starts).astype(np.int32), rows.astype(np.int64))
    starts, lengths = _cut(ends, row_length)
    parts = [
        _best_fit(starts[at : at + WINDOW], lengths[at : at + WINDOW], row_length)
        for at in range(0, len(starts), WINDOW)
    ]
    before = np.cumsum([0, *(len(part.start) for part in parts)])
    return Pieces(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.row_ends + n for part, n in zip(parts, before[:-1], strict=True)]),
    )


def _cut(
    ends: Int[np.ndarray, " documents"], row_length: int
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """Starts and lengths of documents cut into pieces of at most T tokens, in order."""
    starts = np.concatenate([[0], ends[:-1]])
    counts = -(-(ends - starts) // row_length)
    document = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = starts[document] + number * row_length
    return at, np.minimum(ends[document] - at, row_length).astype(np.int32)


def _best_fit(
    starts: Int[np.ndarray, " pieces"], lengths: Int[np.ndarray, " pieces"], row_length: int
) -> Pieces:
    """Best fit, decreasing. Rows of equal room are alike, and so are pieces of equal length: they are placed
    by groups, so the work goes with the number of different lengths and rooms, not of pieces."""
    order = np.argsort(-lengths, kind="stable")
    at = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    room: dict[int, list[np.ndarray]] = {}  # rows by the tokens that they have left
    rooms = 0  # a bit for each room that some row has
    row_of = np.empty(len(starts), np.int64)
    rows = 0
    for group in np.split(order, at[1:]):
        length = int(lengths[group[0]])
        while len(group):
            fitting = rooms >> length
            if not fitting:
                # New rows take as many of these pieces as they hold.
                each = row_length // length
                new = -(-len(group) // each)
                placed = rows + np.arange(len(group)) // each
                row_of[group] = placed
                rooms |= _add(room, row_length - each * length, np.arange(rows, rows + len(group) // each))
                if len(group) % each:
                    rooms |= _add(room, row_length - len(group) % each * length, np.array([rows + new - 1]))
                rows += new
                break
            left = length + (fitting & -fitting).bit_length() - 1  # the smallest room that holds one
            chosen = room[left].pop()
            if not room[left]:
                rooms &= ~(1 << left)
            take = min(len(chosen), len(group))
            row_of[group[:take]] = chosen[:take]
            rooms |= _add(room, left, chosen[take:])
            rooms |= _add(room, left - length, chosen[:take])
            group = group[take:]
    by_row = np.lexsort((np.arange(len(starts)), row_of))
    return Pieces(
        starts[by_row],
        lengths[by_row].astype(np.int32),
        np.cumsum(np.bincount(row_of, minlength=rows)).astype(np.int64),
    )


def _add(room: dict[int, list[np.ndarray]], left: int, rows: np.ndarray) -> int:
    """Notes rows with so much room left; returns the bit of it."""
    if not len(rows) or not left:
        return 0
    room.setdefault(left, []).append(rows)
    return 1 << left


def fill_rate(pieces: Pieces, row_length: int) -> float:
    """Share of the rows' places that hold a token; 1 where there is no row."""
    rows = len(pieces.row_ends)
    return float(pieces.length.sum(dtype=np.int64)) / (rows * row_length) if rows else 1.0
