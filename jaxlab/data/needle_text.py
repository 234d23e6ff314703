"""Needles in any text, for any tokenizer: facts told somewhere in it, and a question at its end.

    ... self._lock = Lock()
    # The amber harp holds birch.
      def close(self): ...
    # The amber harp holds birch

The text is that of `jaxlab.data.text`, so a model reads what it was trained on; the lines that tell a fact
and ask for it have a form of one's own. `jaxlab.data.needle` has filler and a vocabulary of its own instead.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import resolve
from jaxlab.data.facts import FACT, MOST, Fact, draw_facts, split_keys
from jaxlab.data.needle import LONGEST, SPLITS
from jaxlab.data.needle_words import VALUES
from jaxlab.data.rows import take_rows
from jaxlab.data.text import FindModel, TextConfig, read_text, tokenizer_of
from jaxlab.errors import ConfigError, UserError
from jaxlab.processing import encode, encode_with_spans


@dataclass(frozen=True)
class NeedleTextConfig:
    """Facts in real text, and a question for one of them at its end."""

    kind: Literal["needle_text"] = "needle_text"
    path: str = "stdlib"
    """The text: a file, a folder of text files, or `stdlib`."""
    pattern: str = "**/*.py"
    """Which files of a folder."""
    tokenizer: str | None = None
    """A model whose tokenizer makes tokens; none: tokens are bytes."""
    sequence_length: int = 1024
    """Tokens in a sequence (T), the answer included."""
    needles: int = 1
    """Facts in a sequence; those that are not asked for distract."""
    questions: int = 8
    """Questions at the end of a training sequence, each for any of its facts; held-out sequences ask one."""
    depths: int = 10
    """Depths, evenly spaced from 0 to 1, at which the fact of held-out sequences stands, in turn."""
    fact: str = FACT
    """How a fact is told, with {key} and {value}; the question is this line up to the value."""
    holdout_every: int = 20
    """Every how many-th file, in order of names, is held out of training; of one file its end."""

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= MOST:
            raise ConfigError(f"must be from 1 to {MOST}, is {self.needles}", key="needles")
        for name in ("questions", "depths"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if not 2 <= self.sequence_length <= LONGEST:
            raise ConfigError(
                f"must be from 2 to {LONGEST}, is {self.sequence_length}", key="sequence_length"
            )
        try:
            told = self.fact.format(key="KEY", value="VALUE")
        except (LookupError, ValueError):
            told = ""
        if not 0 <= told.find("KEY") < told.find("VALUE"):
            raise ConfigError("must hold {key} and after it {value}, and no other braces", key="fact")
        _ = self.text  # which checks what the two have in common

    @property
    def text(self) -> TextConfig:
        """The text that the facts stand in."""
        return TextConfig(
            path=self.path,
            pattern=self.pattern,
            tokenizer=self.tokenizer,
            sequence_length=self.sequence_length,
            holdout_every=self.holdout_every,
        )


class NeedleTextSource:
    """Crops of text with facts in them; training sequences are targets from end to end, of held-out ones the
    answer alone."""

    source_names: tuple[str, ...] = ()

    def __init__(self, config: NeedleTextConfig, find_model: FindModel = resolve):
        """
        Raises:
          UserError: the text is not there or too short, or facts and questions leave no room for it.
        """
        self.config = config
        self._tokenizer = None if config.tokenizer is None else tokenizer_of(config.tokenizer, find_model)
        self._begin = _before_text(self._tokenizer)
        training, held_out, digest = read_text(config.text, self._tokenizer)
        half = len(held_out) // 2
        self._text = {"train": training, "validation": held_out[:half], "test": held_out[half:]}
        self.identity = hashlib.sha256(repr((dataclasses.astuple(config), digest)).encode()).hexdigest()
        for split, tokens in self._text.items():
            room = config.sequence_length - len(self._begin) - self._most_of_facts(split)
            if room < config.needles:
                raise UserError(
                    f"{config.sequence_length} tokens leave no text beside {config.needles} facts and the "
                    "questions; raise data.sequence_length, or take fewer needles or questions"
                )
            if len(tokens) <= room:
                raise UserError(
                    f"{config.path}: {len(tokens)} tokens of {split} text cannot fill a sequence of "
                    f"{config.sequence_length}; lower data.sequence_length or give more text"
                )

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        numbers = step * batch_size + np.arange(batch_size)
        numbers = numbers if rows is None else numbers[rows]
        tokens = np.stack([self._training_row(seed, int(number)) for number in numbers])
        mask = np.ones(tokens.shape, bool)
        mask[:, 0] = False
        return {"tokens": tokens, "loss_mask": mask}

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """`count` batches, always the same ones. The answer, the last tokens, is the one target; row r of
        batch s asks for a fact at depth number (s * B + r) % depths. needle_positions int32[B] is where its
        value begins in the text, needle_depths int32[B] the number of its depth."""
        for step in range(count):
            yield take_rows(self._held_out(step, batch_size, split), rows)

    def held_out_rows(self, batch_size: int, split: str) -> int:
        return batch_size

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @functools.cached_property
    def largest_token(self) -> int:
        facts = (
            Fact(key, VALUES[i % len(VALUES)])
            for i, key in enumerate(k for s in SPLITS for k in split_keys(s))
        )
        told = (self._encode(fact.text(self.config.fact)) for fact in facts)
        return max(int(tokens.max()) for tokens in (*self._text.values(), *told))

    def _held_out(self, step: int, batch_size: int, split: str) -> dict[str, np.ndarray]:
        config, length = self.config, self.config.sequence_length
        tokens, mask = np.zeros((batch_size, length), np.int32), np.zeros((batch_size, length), bool)
        positions = np.zeros(batch_size, np.int32)
        numbers = step * batch_size + np.arange(batch_size)
        for row, number in enumerate(numbers.tolist()):
            rng = np.random.default_rng((0, number, list(SPLITS).index(split)))
            facts = draw_facts(rng, config.needles, split)
            asked, answer = map(self._encode, facts[0].question(config.fact))
            places = rng.random(len(facts))
            places[0] = number % config.depths / max(config.depths - 1, 1)
            room = length - len(self._begin) - len(asked) - len(answer)
            text, starts = self._planted(rng, facts, places, split, room)
            tokens[row] = np.concatenate([self._begin, text, asked, answer])
            mask[row, length - len(answer) :] = True
            positions[row] = len(self._begin) + starts[0] + len(asked)
        depths = (numbers % config.depths).astype(np.int32)
        return {"tokens": tokens, "loss_mask": mask, "needle_positions": positions, "needle_depths": depths}

    def _training_row(self, seed: int, number: int) -> np.ndarray:
        config = self.config
        rng = np.random.default_rng((seed, number))
        facts = draw_facts(rng, config.needles)
        asked = [facts[i] for i in rng.integers(0, len(facts), config.questions)]
        questions = np.concatenate([self._encode(fact.text(config.fact)) for fact in asked])
        room = config.sequence_length - len(self._begin) - len(questions)
        text, _ = self._planted(rng, facts, rng.random(len(facts)), "train", room)
        return np.concatenate([self._begin, text, questions])

    def _planted(
        self, rng: np.random.Generator, facts: Sequence[Fact], places: np.ndarray, split: str, length: int
    ) -> tuple[np.ndarray, list[int]]:
        """`length` tokens of text with facts at places from 0 to 1, and where each fact begins."""
        told = [self._encode(fact.text(self.config.fact)) for fact in facts]
        text, room = self._text[split], length - sum(map(len, told))
        begin = int(rng.integers(0, len(text) - room + 1))
        filler = text[begin : begin + room].astype(np.int32)
        order = np.argsort(places, kind="stable")
        cuts = np.rint(places * room).astype(int)
        pieces, starts, last = list[np.ndarray](), [0] * len(facts), 0
        for i in order.tolist():
            pieces += [filler[last : cuts[i]], told[i]]
            starts[i] = sum(map(len, pieces)) - len(told[i])
            last = int(cuts[i])
        return np.concatenate([*pieces, filler[last:]]), starts

    def _most_of_facts(self, split: str) -> int:
        """Tokens that facts and questions take at most, about: words are of like lengths."""
        keys = split_keys(split)[:32]
        longest = max(
            len(self._encode(Fact(key, v).text(self.config.fact))) for key in keys for v in VALUES[:8]
        )
        questions = self.config.questions if split == "train" else 1
        return longest * (self.config.needles + questions)

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(encode(text, self._tokenizer, special=False), np.int32)


def _before_text(tokenizer: Tokenizer | None) -> np.ndarray:
    """The tokens that a tokenizer puts before a text."""
    if tokenizer is None:
        return np.zeros(0, np.int32)
    [around] = encode_with_spans(["a"], tokenizer)
    count = next((i for i, special in enumerate(around.special) if not special), len(around.ids))
    return around.ids[:count].astype(np.int32)
