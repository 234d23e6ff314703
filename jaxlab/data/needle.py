"""Needles in filler: key-value facts somewhere in a long text, and questions for them at its end.

    ... the old clock waits near a door . note red anchor birch . the small ...  recall red anchor birch

The filler is sentences of words drawn at random. A fact, `note COLOUR THING VALUE .`, takes the place of five
of its words; a key is a colour and a thing, so that the splits can hold different keys although every word is
trained on. A question, `recall COLOUR THING VALUE`, asks for one of the facts; its value, one token, is the
target, and nothing but the fact tells it. The other facts distract: their keys and values differ.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.needle_words import (
    COLOUR_IDS,
    FILLER_IDS,
    NOTE_ID,
    RECALL_ID,
    STOP_ID,
    THING_IDS,
    VALUE_IDS,
    WORDS,
    needle_tokenizer,
)
from jaxlab.data.rows import take_rows
from jaxlab.errors import ConfigError, UserError

SPLITS = {"train": (2, 3, 4), "validation": (1,), "test": (0,)}
"""Keys whose numbers of colour and thing have these sums, modulo 5, belong to the split."""
LONGEST = 1 << 24
"""Tokens in a sequence at most: one is built before anything else, to see whether it fits."""
FACT, QUESTION = 5, 4
"""Tokens of a fact and of a question, the answer included."""


@dataclass(frozen=True)
class NeedleConfig:
    """Facts in long filler: how deep they lie, and how many distract from the one that is asked for."""

    kind: Literal["needle"] = "needle"
    sequence_length: int = 512
    """Tokens in a sequence (T), the answer included."""
    needles: int = 4
    """Facts in a sequence, at most so many in training; those that are not asked for distract."""
    min_needles: int = 1
    """Fewest facts in a training sequence; how many is drawn anew for each. Few are learned first."""
    questions: int = 8
    """Questions at the end of a training sequence, each for any of its facts; held-out sequences ask one."""
    min_depth: float = 0.0
    """Depth of the first place where facts of training sequences may stand: 0 is the start of the text."""
    max_depth: float = 1.0
    """Depth of the last such place: 1 is just before the questions. Held-out facts stand at every depth."""
    depths: int = 10
    """Depths, evenly spaced from 0 to 1, at which the fact of held-out sequences stands, in turn."""
    filler_targets: float = 0.0
    """Share of the other tokens of training sequences that are targets too: language modelling at a small
    weight."""

    def __post_init__(self) -> None:
        keys = len(COLOUR_IDS) * len(THING_IDS) // 5
        if not 1 <= self.needles <= min(keys, len(VALUE_IDS)):
            raise ConfigError(
                f"must be from 1 to {min(keys, len(VALUE_IDS))}, is {self.needles}", key="needles"
            )
        if not 1 <= self.min_needles <= self.needles:
            raise ConfigError(f"must be from 1 to needles {self.needles}", key="min_needles")
        if self.questions < 1:
            raise ConfigError(f"must be at least 1, is {self.questions}", key="questions")
        if not 0 <= self.min_depth <= self.max_depth <= 1:
            raise ConfigError("0 <= min_depth <= max_depth <= 1 must hold", key="min_depth")
        if self.depths < 1:
            raise ConfigError(f"must be at least 1, is {self.depths}", key="depths")
        if not 0 <= self.filler_targets <= 1:
            raise ConfigError(f"must be in [0, 1], is {self.filler_targets}", key="filler_targets")
        if self.sequence_length > LONGEST:
            raise ConfigError(f"must be at most {LONGEST}, is {self.sequence_length}", key="sequence_length")
        first, last = _places(self, self.questions)
        if last - first < self.needles:
            raise ConfigError(
                f"{self.sequence_length} tokens have {max(0, last - first)} places for a fact between the "
                f"depths, {self.needles} are needed; raise it or take fewer needles",
                key="sequence_length",
            )


def _slots(config: NeedleConfig, questions: int) -> int:
    """Places of FACT tokens each before the questions."""
    return (config.sequence_length - questions * QUESTION) // FACT


def _places(config: NeedleConfig, questions: int) -> tuple[int, int]:
    """First place within the depths of training, and the one after the last."""
    last = _slots(config, questions) - 1
    return round(config.min_depth * last), round(config.max_depth * last) + 1


def make_batch(
    config: NeedleConfig, seed: int, step: int, batch_size: int, split: str = "train"
) -> dict[str, np.ndarray]:
    """The batch of a step, a pure function of its arguments: tokens int32[B, T], loss_mask bool[B, T].

    train: `questions` times one of the facts is asked for, and every answer is a target.

    validation, test: the last token is the answer and the one target; row r of step s asks for a fact at
    depth number (s * B + r) % depths. needle_positions int32[B] is where the value of that fact stands,
    needle_depths int32[B] the number of its depth.

    Raises:
      UserError: no such split.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of needles; there are {', '.join(SPLITS)}")
    rng = np.random.default_rng((seed, step, list(SPLITS).index(split)))
    rows, training = np.arange(batch_size), split == "train"
    questions = config.questions if training else 1
    places, depth = _drawn_places(config, rng, rows + step * batch_size, training)
    keys = _keys(SPLITS[split])
    drawn = keys[np.argsort(rng.random((batch_size, len(keys))), axis=1)[:, : config.needles]]
    values = VALUE_IDS[np.argsort(rng.random((batch_size, len(VALUE_IDS))), axis=1)[:, : config.needles]]

    tokens = _filler(rng, batch_size, config.sequence_length)
    shape = (batch_size, config.needles, 1)
    facts = np.concatenate(
        [np.full(shape, NOTE_ID), drawn, values[..., None], np.full(shape, STOP_ID)], axis=2
    )
    # Text that does not fill the last place stands before the first one.
    spare = config.sequence_length - questions * QUESTION - _slots(config, questions) * FACT
    starts = spare + places * FACT
    counts = np.full((batch_size, 1), config.needles)
    which = np.zeros((batch_size, questions), np.int64)  # the fact whose depth is known is the first one
    if training:
        counts = rng.integers(config.min_needles, config.needles + 1, counts.shape)
        which = (rng.random(which.shape) * counts).astype(np.int64)
    at = (rows[:, None, None], starts[..., None] + np.arange(FACT))
    there = np.arange(config.needles) < counts
    tokens[at] = np.where(there[..., None], facts, tokens[at])
    asked = np.take_along_axis(facts, which[..., None], axis=1)
    asked[..., 0] = RECALL_ID
    tokens[:, -questions * QUESTION :] = asked[..., :QUESTION].reshape(batch_size, -1)

    loss_mask = np.zeros(tokens.shape, bool)
    loss_mask[:, -1 : -questions * QUESTION : -QUESTION] = True
    batch = {"tokens": tokens.astype(np.int32), "loss_mask": loss_mask}
    if training:
        if config.filler_targets:
            loss_mask[:, 1:] |= rng.random(loss_mask[:, 1:].shape) < config.filler_targets
        return batch
    where = (starts[:, 0] + FACT - 2).astype(np.int32)
    return {**batch, "needle_positions": where, "needle_depths": depth.astype(np.int32)}


def _drawn_places(
    config: NeedleConfig, rng: np.random.Generator, numbers: np.ndarray, training: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Places [B, needles], all different in a row, and for held-out rows the depth's number of the first."""
    slots = _slots(config, config.questions if training else 1)
    order = np.argsort(rng.random((len(numbers), slots)), axis=1)
    depth = numbers % config.depths
    if training:
        first, last = _places(config, config.questions)
        inside = (order >= first) & (order < last)
        kept = np.argsort(~inside, axis=1, kind="stable")[:, : config.needles]
        return np.take_along_axis(order, kept, 1), depth
    own = np.rint(depth / max(config.depths - 1, 1) * (slots - 1)).astype(np.int64)
    others = np.argsort(order == own[:, None], axis=1, kind="stable")[:, : config.needles - 1]
    return np.concatenate([own[:, None], np.take_along_axis(order, others, 1)], axis=1), depth


def _keys(residues: tuple[int, ...]) -> np.ndarray:
    """[keys, 2]: the colours and things of a split."""
    colour, thing = np.divmod(np.arange(len(COLOUR_IDS) * len(THING_IDS)), len(THING_IDS))
    mine = np.isin((colour + thing) % 5, residues)
    return np.stack([COLOUR_IDS[colour[mine]], THING_IDS[thing[mine]]], axis=1)


def _filler(rng: np.random.Generator, batch_size: int, length: int) -> np.ndarray:
    """[B, T] of sentences, cut at the start anywhere."""
    kind = (rng.integers(0, len(FILLER_IDS), (batch_size, 1)) + np.arange(length)) % len(FILLER_IDS)
    return FILLER_IDS[kind, rng.integers(0, FILLER_IDS.shape[1], kind.shape)].astype(np.int64)


class NeedleSource:
    """Training sequences with several questions; held-out ones with one, at every depth in turn."""

    source_names: tuple[str, ...] = ()

    def __init__(self, config: NeedleConfig):
        self.config = config
        self.identity = hashlib.sha256(repr((dataclasses.astuple(config), WORDS)).encode()).hexdigest()

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        return take_rows(make_batch(self.config, seed, step, batch_size), rows)

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """`count` batches, always the same ones."""
        for step in range(count):
            yield take_rows(make_batch(self.config, 0, step, batch_size, split), rows)

    def held_out_rows(self, batch_size: int, split: str) -> int:
        return batch_size

    def tokenizer(self) -> Tokenizer:
        return needle_tokenizer()

    @property
    def largest_token(self) -> int:
        return int(self.tokenizer().get_vocab_size()) - 1
