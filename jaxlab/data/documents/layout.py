"""The rows of a split's part of a data set: chosen by the keys of documents, packed, kept in the cache."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.data.documents.cache import Unit, make_folder
from jaxlab.data.documents.config import DataSet, DocumentsConfig
from jaxlab.data.documents.packing import Pieces, pack
from jaxlab.data.documents.shards import damaged, open_arrays, open_shard, read_facts, write_arrays
from jaxlab.errors import UserError


class Part(NamedTuple):
    """What a split takes of a data set."""

    data: DataSet
    source_id: int
    """Which of `DocumentsConfig.names`."""
    low: float
    high: float
    """Documents whose keys lie in [low, high) of the range of keys."""


class Layout(NamedTuple):
    """The rows of a part."""

    pieces: Pieces
    """Their starts count through the tokens of all shards of the data set."""
    facts: dict[str, Any]
    """Documents, tokens, and what was left out."""

    @property
    def rows(self) -> int:
        return len(self.pieces.row_ends)


def parts_of(config: DocumentsConfig, split: str) -> list[Part]:
    """What a split is made of: data sets of its own, or the documents held out for it, by content."""
    ids = {name: number for number, name in enumerate(config.names)}
    own = {"validation": config.validation, "test": config.test}
    if own.get(split):
        return [Part(data, ids[data.title], 0.0, 1.0) for data in own[split]]
    validation, test = (0.0 if own[name] else config.held_out / 2 for name in ("validation", "test"))
    low, high = {
        "validation": (0.0, validation),
        "test": (validation, validation + test),
        "train": (validation + test, 1.0),
    }[split]
    return [Part(data, ids[data.title], low, high) for data in config.sources]


def layout(part: Part, units: Sequence[Unit], config: DocumentsConfig, cache: Path) -> Layout:
    """The rows of a part whose units are done: laid out once, then mapped.

    Raises:
      UserError: a shard is damaged, the cache cannot be written, or a conversation is too long and that is
        refused.
    """
    c = config
    options = [
        [unit.folder.name for unit in units],
        [part.low, part.high, c.sequence_length, c.packing, c.attend_across, c.overlong],
    ]
    name = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    path = cache / "rows" / f"{name}.safetensors"
    if not path.exists():
        make_folder(path.parent)
        pieces, facts = _lay_out(part, units, config)
        write_arrays(path, pieces._asdict(), facts)
    arrays = open_arrays(path)
    if set(arrays) != set(Pieces._fields):
        raise damaged(path, f"holds {', '.join(arrays)}")
    return Layout(Pieces(**arrays), read_facts(path))


def _lay_out(part: Part, units: Sequence[Unit], config: DocumentsConfig) -> tuple[Pieces, dict[str, Any]]:
    row_length = config.sequence_length
    start, size = _chosen(part, units)
    facts: dict[str, Any] = {}
    if part.data.content == "chat":
        over = size > row_length
        facts["overlong"] = int(over.sum())
        if over.any() and config.overlong == "refuse":
            raise UserError(
                f"{part.data.title}: {facts['overlong']} of {len(size)} conversations are longer than "
                f"{row_length} tokens, the longest has {int(size.max())}; set data.overlong to drop or "
                "truncate, or raise data.sequence_length"
            )
        if config.overlong == "drop":
            start, size = start[~over], size[~over]
        size = np.minimum(size, row_length)
    facts |= {"documents": len(size), "tokens": int(size.sum())}
    ends = np.cumsum(size)
    pieces = pack(ends, row_length, how=config.packing)
    if not len(pieces.start):
        return pieces, facts
    document = np.searchsorted(ends, pieces.start, side="right")
    pieces = pieces._replace(start=start[document] + pieces.start - (ends - size)[document])
    if config.attend_across and (left := int(ends[-1]) % row_length):
        # A last row that is not full would need padding.
        rows = pieces.row_ends[:-1]
        kept = int(rows[-1]) if len(rows) else 0
        pieces = Pieces(pieces.start[:kept], pieces.length[:kept], rows)
        facts["tokens_left_over"] = left
    return pieces, facts


def _chosen(part: Part, units: Sequence[Unit]) -> tuple[np.ndarray, np.ndarray]:
    """Starts in the tokens of all shards, and lengths, of the documents of a part (int64 both)."""
    starts, sizes, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for unit in units:
        for path in unit.shards():
            shard = open_shard(path)
            size = np.diff(shard.ends, prepend=0)
            at = np.asarray(shard.keys) / 2.0**64
            kept = (at >= part.low) & (at < part.high)
            starts.append((shard.ends - size)[kept] + before)
            sizes.append(size[kept])
            before += len(shard.tokens)
    return np.concatenate(starts), np.concatenate(sizes)
