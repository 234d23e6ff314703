"""One config for every source of batches, and the one place that turns it into a source."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.digits import DigitsConfig, DigitsSource
from jaxlab.data.episodes import EpisodesConfig, EpisodesSource
from jaxlab.data.text import TextConfig, TextSource

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained or evaluated on."""

    kind: Literal["text", "digits", "episodes"] = "text"
    """text: bytes of files; digits: questions about handwritten digits; episodes: in-context learning."""
    text: TextConfig = TextConfig()
    """Used where kind is text."""
    digits: DigitsConfig = DigitsConfig()
    """Used where kind is digits."""
    episodes: EpisodesConfig = EpisodesConfig()
    """Used where kind is episodes."""


class Source(Protocol):
    """Batches as `jaxlab.models.forward` takes them, with loss_mask bool[B, T]: True where a token is a target."""

    identity: str
    """Changes when the data changes."""

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        """The training batch of a step; a pure function of its arguments."""
        ...

    def held_out_batches(self, batch_size: int, count: int, split: str = "validation") -> Iterator[dict]:
        """At most `count` batches of a held-out split, always the same ones."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """None: tokens are bytes."""
        ...


def make_source(config: DataConfig) -> Source:
    if config.kind == "text":
        return TextSource(config.text)
    if config.kind == "digits":
        return DigitsSource(config.digits)
    return EpisodesSource(config.episodes)
