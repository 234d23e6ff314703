"""The vocabulary that a file asks for (`tokenizer_source`, `tokenizer`), and where its rows come from.

A token that a model has keeps that model's row. One that it does not have gets the row of the base, where
that has it; else of the only model that has it; else the mean of all that do; or what the file says. A token
that nobody has is zero. Rows that only fill up a multiple are the mean of all.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from jaxlab.checkpoints import EMBEDDING, Tensor
from jaxlab.errors import UserError
from jaxlab.merging.mergekit.file import ModelReference, TokenizerRule, TokenSource
from jaxlab.merging.plan import Input, Source, dtype_of
from jaxlab.merging.vocabulary import table_of_rows

_BLOCK = 1 << 12
"""Rows that are read at once for a mean."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of the output."""

    tokenizer: Tokenizer
    owner: int
    """The input whose tokenizer files it has."""
    changed: bool
    """It is not the owner's as it was."""
    size: int
    """Rows of its tables, those that fill up a multiple among them."""
    notes: tuple[str, ...]

    @functools.cached_property
    def tokens(self) -> dict[str, int]:
        """Ids by token, in their order."""
        return _by_id(self.tokenizer)


def vocabulary_of(
    rule: TokenizerRule, references: Sequence[ModelReference], inputs: Sequence[Input]
) -> Vocabulary:
    """The vocabulary that a file asks for; the base is the first input.

    Raises:
      UserError: a model that needs one has no tokenizer.
    """
    notes: list[str] = []
    owner = 0 if isinstance(rule.source, str) else references.index(rule.source)
    tokenizer = inputs[owner].model.tokenizer
    if tokenizer is None:
        raise UserError(f"{references[owner]}: has no tokenizer, which tokenizer_source asks for")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    before = tokenizer.to_str()
    if isinstance(rule.source, str):
        tokenizer = _without_rows(tokenizer, _rows(inputs[owner]), str(references[owner]))
    if rule.source == "union":
        for reference, one in zip(references[1:], inputs[1:], strict=True):
            _add_all(tokenizer, one, str(reference), notes)
    known = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in rule.tokens if token not in known])
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    multiple = rule.pad_to_multiple_of or 1
    size = -(-highest // multiple) * multiple
    rows = _rows(inputs[0])
    if size < rows:
        notes.append(
            f"the tables are cut from {rows} rows to {size}, as mergekit does; tokenizer: "
            "pad_to_multiple_of keeps a multiple"
        )
    return Vocabulary(tokenizer, owner, tokenizer.to_str() != before, size, tuple(notes))


def _rows(one: Input) -> int:
    return one[one.holders[EMBEDDING].names[0]].shape[0]


def _by_id(tokenizer: Tokenizer) -> dict[str, int]:
    found = tokenizer.get_vocab(with_added_tokens=True)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _without_rows(tokenizer: Tokenizer, rows: int, name: str) -> Tokenizer:
    """Without tokens that have no row.

    Raises:
      UserError: they cannot be taken out.
    """
    beyond = {token for token, index in _by_id(tokenizer).items() if index >= rows}
    if not beyond:
        return tokenizer
    said = json.loads(tokenizer.to_str())
    if said["model"].get("type") != "BPE":
        raise UserError(
            f"{name}: its tokenizer has {len(beyond)} tokens more than its table has rows ({rows})"
        )
    said["added_tokens"] = [token for token in said["added_tokens"] if token["id"] < rows]
    said["model"]["vocab"] = {t: i for t, i in said["model"]["vocab"].items() if t not in beyond}
    parts = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
    kept = [m for m in said["model"]["merges"] if not ({*parts(m), "".join(parts(m))} & beyond)]
    said["model"]["merges"] = kept
    return Tokenizer.from_str(json.dumps(said))


def _add_all(tokenizer: Tokenizer, one: Input, name: str, notes: list[str]) -> None:
    """Adds the tokens of a model that are not there yet, as plain ones or, where the model has them so, as
    added ones.
    """
    theirs, rows = one.model.tokenizer, _rows(one)
    if theirs is None:
        notes.append(f"{name} has no tokenizer: taken to be the base's")
        return
    added = theirs.get_added_tokens_decoder()
    mine = tokenizer.get_vocab(with_added_tokens=True)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    extra = {token.content for token in added.values()}
    new = [t for t, i in _by_id(theirs).items() if i < rows and t not in extra and t not in mine]
    tokenizer.add_tokens([AddedToken(token, special=False) for token in new])
    for index, token in sorted(added.items()):
        if index < rows and token.content not in known:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


@dataclass(frozen=True)
class _Table:
    """A table of one model with the rows of the output's vocabulary."""

    own: np.ndarray
    """int64[size]: the model's row; -1: it has none."""
    others: Mapping[int, tuple[tuple[int, int], ...]]
    """Rows that the model does not have: the (model, row)s whose mean they are; nothing: zero."""
    filled: int
    """From this row on all are the mean of those before."""


@dataclass
class Rows:
    """Where the rows of tables come from."""

    rule: TokenizerRule
    vocabulary: Vocabulary
    references: Sequence[ModelReference]
    inputs: Sequence[Input]
    _found: dict[int, np.ndarray] = field(default_factory=dict)

    def sources(self, sources: Sequence[Source], base: int | None, read_as: str) -> list[Source]:
        """The same tensors with the rows of the vocabulary, as new tensors of their inputs.

        Args:
          base: which input is the base.

        Raises:
          UserError: a token that the file names has no row where it should.
        """
        models = [source.model for source in sources]
        tensors = {source.model: self.inputs[source.model][source.name] for source in sources}
        widths = {tensor.shape[1:] for tensor in tensors.values()}
        if len(widths) > 1:
            return list(sources)  # they differ in more than rows, which is said elsewhere
        missing = self._missing(models, tensors, base)
        result = []
        for source in sources:
            table = self._table(source.model, tensors[source.model], missing)
            digest = hashlib.sha256(
                json.dumps([table.own.tolist(), sorted(table.others.items()), read_as]).encode()
            )
            name = f"{source.name} (rows by token, {digest.hexdigest()[:16]})"
            self.inputs[source.model].relaid[name] = _as_tensor(
                name, source.model, tensors, table, dtype_of(read_as)
            )
            result.append(Source(source.model, name))
        return result

    def rows_of(self, model: int) -> np.ndarray:
        """int64[size]: the row that a model has for each token of the vocabulary, -1 none."""
        if model not in self._found:
            tokenizer = self.inputs[model].model.tokenizer or self.inputs[0].model.tokenizer
            assert tokenizer is not None
            theirs, limit = tokenizer.get_vocab(with_added_tokens=True), _rows(self.inputs[model])
            found = np.full(self.vocabulary.size, -1, np.int64)
            for token, index in self.vocabulary.tokens.items():
                row = theirs.get(token, -1)
                found[index] = row if row < limit else -1
            self._found[model] = found
        return self._found[model]

    def _missing(
        self, models: Sequence[int], tensors: Mapping[int, Tensor], base: int | None
    ) -> dict[int, tuple[bool, tuple[tuple[int, int], ...]]]:
        """For each token that not every model has, or that is forced: whether it is forced, and the rows
        whose mean stands for it.
        """
        table = np.stack([self.rows_of(model) for model in models])
        result: dict[int, tuple[bool, tuple[tuple[int, int], ...]]] = {}
        lacking = (table < 0).any(axis=0)
        for token, index in self.vocabulary.tokens.items():
            said = self.rule.tokens.get(token)
            if said is not None:
                if said.force or lacking[index]:
                    result[index] = said.force, self._said(token, index, said, models, tensors)
            elif lacking[index]:
                there = [(m, int(row)) for m, row in zip(models, table[:, index], strict=True) if row >= 0]
                of_base = [(m, row) for m, row in there if m == base]
                result[index] = False, tuple(of_base if of_base and len(there) > 1 else there)
        return result

    def _said(
        self,
        token: str,
        index: int,
        said: TokenSource,
        models: Sequence[int],
        tensors: Mapping[int, Tensor],
    ) -> tuple[tuple[int, int], ...]:
        if said.kind == "zero":
            return ()
        if said.model is None:
            raise UserError(
                f"tokenizer: tokens: {token}: needs a source, since not every model has the token"
            )
        model = self.references.index(said.model)
        if model not in models:
            raise UserError(f"tokenizer: tokens: {token}: {said.model} is not among the models of the slice")
        if said.kind == "model":
            row = int(self.rows_of(model)[index])
            if row < 0:
                raise UserError(f"tokenizer: tokens: {token}: {said.model} does not have it")
            return ((model, row),)
        row = said.token_id if said.token_id is not None else -1
        if said.token is not None:
            tokenizer = self.inputs[model].model.tokenizer
            found = None if tokenizer is None else tokenizer.token_to_id(said.token)
            row = -1 if found is None else found
        if not 0 <= row < tensors[model].shape[0]:
            what = said.token if said.token is not None else f"the id {said.token_id}"
            raise UserError(f"tokenizer: tokens: {token}: {said.model} has no row for {what}")
        return ((model, row),)

    def _table(self, model: int, tensor: Tensor, missing: Mapping[int, Any]) -> _Table:
        own = self.rows_of(model).copy()
        own[own >= tensor.shape[0]] = -1
        others = {}
        for index, (forced, rows) in missing.items():
            if forced or own[index] < 0:
                own[index] = -1
                others[index] = rows
        highest = max(self.vocabulary.tokens.values(), default=-1) + 1
        return _Table(own, others, highest)


def _as_tensor(
    name: str, model: int, tensors: Mapping[int, Tensor], table: _Table, dtype: np.dtype
) -> Tensor:
    """The tensor that reads its rows from others."""
    has = table.own >= 0
    mine = table_of_rows(tensors[model], table.own[has])
    before = np.concatenate([[0], np.cumsum(has)])

    def rows(start: int, stop: int) -> np.ndarray:
        result = np.zeros((stop - start, *mine.shape[1:]), dtype)
        found = mine.read_rows(int(before[start]), int(before[stop]))
        result[has[start:stop]] = found.astype(dtype)
        for index in np.flatnonzero(~has[start:stop]).tolist():
            if of := table.others.get(start + index):
                result[index] = _mean(tensors, of, dtype)
        return result

    @functools.cache
    def mean() -> np.ndarray:
        total = np.zeros(mine.shape[1:], np.float64)
        for start in range(0, table.filled, _BLOCK):
            total += rows(start, min(start + _BLOCK, table.filled)).astype(np.float64).sum(axis=0)
        return (total / max(1, table.filled)).astype(np.float32).astype(dtype)

    def read_rows(start: int, stop: int) -> np.ndarray:
        result = rows(start, stop)
        if stop > table.filled:
            result[max(0, table.filled - start) :] = mean()
        return result

    shape = (len(table.own), *mine.shape[1:])
    return dataclasses.replace(
        mine, name=name, dtype=dtype, shape=shape, read_rows=read_rows, file=None, offset=0
    )


def _mean(tensors: Mapping[int, Tensor], rows: Sequence[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
    """Of some rows, rounded after every step as mergekit does."""
    found = [tensors[model].read_rows(row, row + 1)[0].astype(dtype) for model, row in rows]
    if len(found) == 1:
        return found[0]
    total = found[0]
    for one in found[1:]:
        total = (total.astype(np.float32) + one.astype(np.float32)).astype(dtype)
    return (total.astype(np.float32) / np.float32(len(found))).astype(dtype)
