"""Batches of packed documents, as `jaxlab.data.Source` has them."""

import bisect
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from jaxlab.data.documents.cache import VARIABLE, Unit, cache_folder, make_units
from jaxlab.data.documents.config import SPLITS, DataSet, DocumentsConfig
from jaxlab.data.documents.document import Counts
from jaxlab.data.documents.encoders import Encoders
from jaxlab.data.documents.files import Digests, find_files
from jaxlab.data.documents.layout import Layout, Part, layout, parts_of
from jaxlab.data.documents.mixing import TrainingOrder
from jaxlab.data.documents.packing import Pieces, fill_rate
from jaxlab.data.documents.preparing import prepare_units
from jaxlab.data.documents.shards import Shard, open_shard, read_facts
from jaxlab.data.text import FindModel
from jaxlab.errors import UserError, UserNote

OPEN_SHARDS = 512
"""Mapped at once: a system limits the number of maps."""
GLANCE = 1 << 26
"""Bytes that may be read where the data should not be."""


class _OpenPart(NamedTuple):
    """The rows of a part of a split, and the shards that they are in."""

    source_id: int
    pieces: Pieces
    paths: list[Path]
    ends: list[int]
    """Where the tokens of each shard end among those of all."""

    def pieces_of(self, row: int) -> Iterator[tuple[int, int]]:
        """(start, length) of what a row is made of."""
        start, length, ends = self.pieces
        inside = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
        return zip(start[inside].tolist(), length[inside].tolist(), strict=True)


class DocumentsSource:
    """Rows of packed documents. The data is tokenised when the first thing of it is asked for.

    Each row is of one data set, which source_ids int32[B] says. segment_ids int32[B, T] number the documents
    of a row from 1, 0 is padding (none with `attend_across`), and loss_mask bool[B, T] is False where a
    document begins and where a conversation is not the assistant's. The rows of a data set are shuffled anew
    in each pass, by the seed.
    """

    def __init__(self, config: DocumentsConfig, find_model: FindModel) -> None:
        """Finds the files and the tokenizer; no data is read.

        Raises:
          UserError: they are not there, or do not fit together.
        """
        self.config = config
        self.source_names = config.names
        self._find_model = find_model
        self.cache = cache_folder()
        """Where tokens are kept."""
        self._encoders = Encoders(config, find_model)
        found = {data: find_files(data) for data in config.all_sets}
        self._files = {data: files for data, (files, _) in found.items()}
        self.notes = [note for _, notes in found.values() for note in notes]
        """What of the folders is passed by."""
        self._layouts: dict[Part, Layout] = {}
        self._order: TrainingOrder | None = None
        self._held_out: dict[str, np.ndarray] = {}
        self._parts: dict[str, list[_OpenPart]] = {}
        self._shards: dict[Path, Shard] = {}
        self._ready = False

    @functools.cached_property
    def identity(self) -> str:
        """A digest of the contents of the files and of all that makes tokens of them."""
        names = {data.title: [u.folder.name for u in units] for data, units in self._units.items()}
        return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()

    @property
    def prepared(self) -> bool:
        """Whether all is tokenised. Not much is read to find out: large files that were touched are new."""
        unknown = (Digests(self.cache, d.path).unknown(files) for d, files in self._files.items())
        if sum(unknown) > GLANCE:
            return False
        return all(unit.done for units in self._units.values() for unit in units)

    def prepare(self, processes: int | None = None) -> None:
        """Tokenises what is not tokenised yet.

        Raises:
          UserError: data, tokenizer, template or disk fail, or a row is bad and that is refused.
        """
        if self._ready:
            return
        units = [unit for of_set in self._units.values() for unit in of_set]
        if not all(unit.done for unit in units):
            print(f"tokens are kept in {self.cache} ({VARIABLE} sets it)")
        prepare_units(units, self.config, self._encoders, self._find_model, processes=processes)
        for title, counts in self.counts().items():
            if counts.bad and self.config.on_bad_rows == "refuse":
                raise UserError(
                    f"{counts.first_bad} ({counts.bad} such rows; set data.on_bad_rows to skip to pass "
                    "them by)"
                )
            if text := counts.describe():
                warnings.warn(f"{title}: {text}", UserNote, stacklevel=2)
        for note in self.notes:
            warnings.warn(note, UserNote, stacklevel=2)
        self._ready = True

    @property
    def end_of_text(self) -> str | None:
        """The token after each text; None: the byte 0, or there are conversations alone."""
        return self._encoders.end_word

    def files(self) -> dict[str, dict[str, int]]:
        """How many files each data set has, and how many bytes."""
        return {
            data.title: {"files": len(files), "bytes": sum(file.size for file in files)}
            for data, files in self._files.items()
        }

    def counts(self) -> dict[str, Counts]:
        """What became of the rows of each data set, so far."""
        found: dict[str, Counts] = {}
        for data, units in self._units.items():
            for unit in units:
                found.setdefault(data.title, Counts()).add(unit.counts())
        return found

    def describe(self) -> dict[str, Any]:
        """What each split has of each data set: rows, documents, tokens, and how full the rows are."""
        length = self.config.sequence_length
        found: dict[str, Any] = {}
        for split in SPLITS:
            for part in parts_of(self.config, split):
                there = self._layout(part)
                filled = {"rows": there.rows, **there.facts, "fill": fill_rate(there.pieces, length)}
                found.setdefault(split, {})[part.data.title] = filled
        return found

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        order = self._training_order(seed)
        numbers = range(step * batch_size, (step + 1) * batch_size)
        chosen = [order[number] for number in (numbers if rows is None else numbers[rows])]
        return self._rows(np.asarray(chosen, np.int64).reshape(-1, 2), "train")

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Full batches of a split: its data sets in their weights, until one of them is used up."""
        order = self._held_out_order(split)
        for number in range(min(count, len(order) // batch_size)):
            chosen = order[number * batch_size : (number + 1) * batch_size]
            yield self._rows(chosen if rows is None else chosen[rows], split)

    def held_out_rows(self, batch_size: int, split: str) -> int:
        return batch_size if len(self._held_out_order(split)) >= batch_size else 0

    def tokenizer(self) -> Tokenizer | None:
        return self._encoders.tokenizer

    @functools.cached_property
    def largest_token(self) -> int:
        self.prepare()
        shards = (path for units in self._units.values() for unit in units for path in unit.shards())
        return max((int(read_facts(path)["largest"]) for path in shards), default=0)

    @functools.cached_property
    def _units(self) -> dict[DataSet, list[Unit]]:
        """What is tokenised together. Files that are new or were touched are read for their digests."""
        found = {}
        for data, files in self._files.items():
            digests = Digests(self.cache, data.path).read(files, data.title)
            found[data] = make_units(data, files, digests, self._encoders.of(data), self.cache)
        return found

    def _layout(self, part: Part) -> Layout:
        if part not in self._layouts:
            self.prepare()
            found = layout(part, self._units[part.data], self.config, self.cache)
            if number := found.facts.get("overlong"):
                what = "dropped" if self.config.overlong == "drop" else "truncated"
                length = self.config.sequence_length
                warnings.warn(
                    f"{part.data.title}: {number} conversations of more than {length} tokens are {what}",
                    UserNote,
                    stacklevel=2,
                )
            self._layouts[part] = found
        return self._layouts[part]

    def training_rows(self) -> dict[str, int]:
        """How many rows each data set has to train on.

        Raises:
          UserError: one has none, or more than can be numbered.
        """
        rows = {part.data.title: self._layout(part).rows for part in parts_of(self.config, "train")}
        for title, count in rows.items():
            if not 0 < count < 1 << 32:
                raise UserError(
                    f"{title}: {count} rows of {self.config.sequence_length} tokens to train on; give "
                    "more data, or change data.held_out or sequence_length"
                )
        return rows

    def _training_order(self, seed: int) -> TrainingOrder:
        if self._order is None or self._order.seed != seed:
            weights = [part.data.weight for part in parts_of(self.config, "train")]
            self._order = TrainingOrder(seed, self.training_rows(), weights)
        return self._order

    def _held_out_order(self, split: str) -> Int[np.ndarray, "rows 2"]:
        """(part, row of it) of all rows of a split."""
        if split not in self._held_out:
            chosen: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
            turns: list[np.ndarray] = [np.zeros(0)]
            for number, part in enumerate(parts_of(self.config, split)):
                rows = self._layout(part).rows
                order = np.random.default_rng(0).permutation(rows)
                chosen.append(np.stack([np.full(rows, number), order], axis=1))
                turns.append((np.arange(rows) + 0.5) / part.data.weight)
            by_turn = np.argsort(np.concatenate(turns), kind="stable")
            self._held_out[split] = np.concatenate(chosen)[by_turn]
        return self._held_out[split]

    def _rows(self, chosen: Int[np.ndarray, "B 2"], split: str) -> dict[str, np.ndarray]:
        """Rows by (part of the split, row of it)."""
        parts, shape = self._open_parts(split), (len(chosen), self.config.sequence_length)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask, ids = np.zeros(shape, bool), np.zeros(len(chosen), np.int32)
        for row, (number, which) in enumerate(chosen.tolist()):
            part = parts[number]
            ids[row] = part.source_id
            at = 0
            for segment, (address, size) in enumerate(part.pieces_of(which), 1):
                shard, first = self._find(part, address)
                end = at + size
                tokens[row, at:end] = shard.tokens[first : first + size]
                mask[row, at:end] = True if shard.targets is None else shard.targets[first : first + size]
                segments[row, at:end] = segment
                if segment == 1 or not self.config.attend_across:
                    mask[row, at] = False
                at = end
        batch = {"tokens": tokens, "loss_mask": mask, "source_ids": ids}
        return batch if self.config.attend_across else {**batch, "segment_ids": segments}

    def _open_parts(self, split: str) -> list[_OpenPart]:
        if split not in self._parts:
            self._parts[split] = []
            for part in parts_of(self.config, split):
                pieces = self._layout(part).pieces
                paths = [path for unit in self._units[part.data] for path in unit.shards()]
                ends = np.cumsum([int(read_facts(path)["tokens"]) for path in paths])
                self._parts[split].append(_OpenPart(part.source_id, pieces, paths, ends.tolist()))
        return self._parts[split]

    def _find(self, part: _OpenPart, address: int) -> tuple[Shard, int]:
        """The shard that holds a token of a data set, and where in it."""
        number = bisect.bisect_right(part.ends, address)
        path = part.paths[number]
        shard = self._shards.get(path)
        if shard is None:
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.clear()
            shard = self._shards[path] = open_shard(path)
        return shard, address - (part.ends[number - 1] if number else 0)
