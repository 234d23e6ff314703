"""A document in tokens, what makes it, and what became of the rows that made none."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.documents.readers import Row


class Document(NamedTuple):
    """The tokens of a text or a conversation."""

    tokens: np.ndarray
    """int64[T]"""
    key: int
    """Of its content: 64 bits."""
    targets: np.ndarray | None = None
    """bool[T]: what is learnt; None: all."""


@dataclass
class Counts:
    """What became of the rows that were read."""

    rows: int = 0
    null: int = 0
    """Rows with nothing in the column."""
    empty: int = 0
    """Texts without a letter but blanks."""
    bad: int = 0
    first_bad: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    """Conversations, by reason."""

    def note_bad(self, problem: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or problem

    def describe(self) -> str:
        """What made no document, in a few words; nothing if all did."""
        words = {"without a value": self.null, "empty": self.empty, "bad": self.bad, **self.dropped}
        text = ", ".join(f"{number} {what}" for what, number in words.items() if number)
        first = f" (the first: {self.first_bad})" if self.bad else ""
        return f"of {self.rows} rows passed by: {text}{first}" if text else ""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Counts":
        return cls(**{**told, "dropped": Counter(told["dropped"])})

    def add(self, other: "Counts") -> None:
        for name in ("rows", "null", "empty", "bad"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_bad = self.first_bad or other.first_bad
        self.dropped += other.dropped


@runtime_checkable
class Encoder(Protocol):
    """Makes documents of rows. What it does follows from `identity` alone."""

    identity: str
    largest: int
    """No token is above it."""

    def encode(self, rows: Sequence[tuple[str, Row]], counts: Counts) -> list[Document]:
        """The documents of rows, each with where it stands; those that make none are counted.

        Raises:
          UserError: the tokenizer or the template fails.
        """
        ...


def content_key(text: str) -> int:
    """64 bits of a text's content: equal texts are on one side of a split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def words_digest(tokenizer: Tokenizer | None) -> str:
    return "bytes" if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values(), default=0)
