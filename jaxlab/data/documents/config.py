"""What data there is, and how it becomes rows."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from jaxlab.errors import ConfigError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSet:
    """One data set of a mixture."""

    path: str
    """A file, a folder, a pattern such as data/**/*.parquet, a folder that Hugging Face's `datasets` saved;
    `stdlib`: the source files of Python's standard library; a hub id where format is dataset."""
    weight: float = 1.0
    """Its share of the rows, in any unit."""
    name: str | None = None
    """What metrics call it; by default the last part of the path."""
    format: Literal["auto", "text", "jsonl", "parquet", "dataset"] = "auto"
    """auto: by the names of the files. .gz and .zst of text and JSON Lines are read as they are."""
    content: Literal["text", "chat"] = "text"
    """chat: conversations, of which only what the assistant says is learnt."""
    column: str | None = None
    """Where the text or the conversation stands; by default text, and messages or conversations."""
    separator: str | None = None
    """What ends a document inside a file of plain text; by default a file is one document."""
    split: str = "train"
    """Of a set in several: one that `datasets` reads, or files named by splits, as data/train-*.parquet."""
    subset: str = ""
    """Of a set of the hub in several, such as wikitext-2-raw-v1; with format dataset."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("which file or folder?", key="path")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"must be positive and finite, is {self.weight}", key="weight")
        if self.separator == "":
            raise ConfigError("must not be empty; leave it out: a file is one document", key="separator")
        if self.separator is not None and self.format not in ("auto", "text"):
            raise ConfigError(f"is for plain text, and format is {self.format}", key="separator")
        if self.subset and self.format != "dataset":
            raise ConfigError(f"is for format dataset, and format is {self.format}", key="subset")
        if self.content == "chat" and self.format == "text":
            raise ConfigError("conversations are rows of jsonl, parquet or dataset, not text", key="format")

    @property
    def title(self) -> str:
        return self.name or PurePath(self.path).name or self.path


@dataclass(frozen=True)
class DocumentsConfig:
    """Documents and conversations from files, in weighted shares, packed into rows (docs/data.md)."""

    kind: Literal["documents"] = "documents"
    sources: tuple[DataSet, ...] = ()
    """The data sets to train on."""
    validation: tuple[DataSet, ...] = ()
    """Data sets of the validation split, instead of documents held out of the sources."""
    test: tuple[DataSet, ...] = ()
    """Data sets of the test split, likewise."""
    held_out: float = 0.01
    """Share of the documents of the sources that is held out, by their content: half of it for each of the
    splits that has no data sets of its own."""
    tokenizer: str | None = None
    """A model whose tokenizer, and chat template, is used; none: tokens are bytes."""
    end_of_text: str | None = None
    """The token after each text; by default the model's eos_token. Bytes: the byte 0."""
    chat_template: str | None = None
    """A file in Jinja to take instead of the model's own."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of the assistant are learnt."""
    sequence_length: int = 1024
    """Tokens in a row (T)."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """best_fit: documents stay whole where a row holds them, and rows are filled well; concatenate: one
    after the other, cut wherever a row ends."""
    attend_across: bool = False
    """concatenate: tokens see the documents before theirs in the row, and learn to begin the next one; as is
    usual in pretraining. Otherwise each document is read alone."""
    overlong: Literal["drop", "truncate", "refuse"] = "drop"
    """What happens to conversations longer than a row. Texts are split over rows."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens to rows that are damaged or lack the column. Empty ones are always passed by."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("which data? give at least one {path: ...}", key="sources")
        for split in ("sources", "validation", "test"):
            twice = [t for t, n in Counter(d.title for d in getattr(self, split)).items() if n > 1]
            if twice:
                raise ConfigError(f"two data sets are called {twice[0]!r}; give them a name each", key=split)
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"must be at least 0 and below 1, is {self.held_out}", key="held_out")
        if not 2 <= self.sequence_length < 1 << 31:
            raise ConfigError("must be at least 2, and an int32", key="sequence_length")
        if self.attend_across and self.packing != "concatenate":
            raise ConfigError("is for packing: concatenate", key="attend_across")
        chats = any(d.content == "chat" for d in self.all_sets)
        if chats and self.tokenizer is None:
            raise ConfigError(
                "conversations need a model's tokenizer and chat template; name the model", key="tokenizer"
            )
        if chats and self.packing == "concatenate":
            raise ConfigError("would cut conversations; take best_fit", key="packing")
        if self.chat_template is not None and not chats:
            raise ConfigError("is for content: chat, which no data set has", key="chat_template")
        if self.end_of_text is not None and self.tokenizer is None:
            raise ConfigError("tokens are bytes, and the byte 0 ends a text", key="end_of_text")

    @property
    def all_sets(self) -> tuple[DataSet, ...]:
        return (*self.sources, *self.validation, *self.test)

    @property
    def names(self) -> tuple[str, ...]:
        """What metrics call the data sets: those to train on first."""
        return tuple(dict.fromkeys(d.title for d in self.all_sets))
