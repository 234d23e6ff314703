"""Episodes of in-context learning: items of several words, each followed by the label word of its class.

In an episode each class is a topic, named by a nonsense word drawn anew, so that only the demonstrations
tell what label words mean. An item mixes words of its topic with fillers and at times a word of another
topic: no single word gives the class, and since a label word says nothing of its class by itself, it has to
collect it from the item before. Training sequences hold as many demonstrations as fit, and every label that
could be known is a target. The task grows by curriculum, without which nothing is learned:

    one word per topic, items of one word -> all words of a topic -> longer items -> `:` before the label
    -> words of other topics
"""

import dataclasses
import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.episode_words import (
    ANSWER_ID,
    FILLER_IDS,
    LABEL_IDS,
    TOPIC_IDS,
    WORDS,
    WORDS_PER_TOPIC,
    episode_tokenizer,
)
from jaxlab.data.rows import take_rows
from jaxlab.errors import ConfigError, UserError

SPLITS = {"train": (2, 3, 4), "validation": (1,), "test": (0,)}
"""Items whose topic words have these sums of numbers, modulo 5, belong to the split."""

LONGEST = 1 << 24
"""Tokens in a sequence at most: one is built before anything else, to see whether it fits."""


class TokenClass(enum.IntEnum):
    """Token classes of held-out prompts: w, p and q of the paper."""

    ANSWER = -1
    """Nothing reads it."""
    ORDINARY = 0
    LABEL = 1
    LAST = 2


@dataclass(frozen=True)
class EpisodesConfig:
    """In-context learning episodes and their curriculum."""

    kind: Literal["episodes"] = "episodes"
    sequence_length: int = 40
    """Tokens in a training sequence (T); held-out prompts are as long as they need."""
    min_classes: int = 2
    """Fewest classes in a training episode."""
    max_classes: int = 4
    """Most classes in a training episode."""
    all_words_from: int = 500
    """Training step from which items use every word of a topic, not one word only."""
    longer_from: tuple[int, ...] = (600, 650, 700, 950, 1000)
    """Training steps from which the longest item has one word more; it starts at one."""
    answer_from: int = 800
    """Training step from which `:` stands between item and label."""
    mixed_from: int = 900
    """Training step from which items hold a word of another topic of the episode with probability `mixed`."""
    topic_fraction: float = 0.5
    """Least fraction of an item's words that are of its topic."""
    mixed: float = 0.5
    """Probability that an item of two topic words or more holds a word of another topic."""
    classes: int = 4
    """Classes in a held-out prompt (C)."""
    shots: int = 1
    """Demonstrations per class in a held-out prompt."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_classes <= self.max_classes <= len(TOPIC_IDS):
            raise ConfigError(
                f"2 <= min_classes <= max_classes <= {len(TOPIC_IDS)} must hold", key="min_classes"
            )
        if not 2 <= self.classes <= len(TOPIC_IDS):
            raise ConfigError(f"must be from 2 to {len(TOPIC_IDS)}, is {self.classes}", key="classes")
        if self.shots < 1:
            raise ConfigError(f"must be at least 1, is {self.shots}", key="shots")
        for name in ("topic_fraction", "mixed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"must be in [0, 1], is {getattr(self, name)}", key=name)
        if list(self.longer_from) != sorted(self.longer_from):
            raise ConfigError(f"steps must not decrease: {self.longer_from}", key="longer_from")
        for name in ("sequence_length", "prompt_length"):
            if getattr(self, name) > LONGEST:
                key = "shots" if name == "prompt_length" else name
                raise ConfigError(f"{getattr(self, name)} tokens, {LONGEST} are the most", key=key)
        if self.sequence_length < 2 * (self.item_length + 2):
            raise ConfigError(
                f"{self.sequence_length} tokens do not hold two demonstrations of {self.item_length + 2}",
                key="sequence_length",
            )

    @property
    def item_length(self) -> int:
        """Words in the longest item, once the curriculum is over."""
        return 1 + len(self.longer_from)

    @property
    def prompt_length(self) -> int:
        """Tokens of a held-out prompt, the answer included."""
        return (self.classes * self.shots + 1) * (self.item_length + 2)


class Stage(NamedTuple):
    """What the task is like at a step."""

    words: int
    shortest: int
    longest: int
    answer: bool
    mixed: float


def stage_at(config: EpisodesConfig, step: int) -> Stage:
    """The curriculum's stage at a training step."""
    return Stage(
        words=WORDS_PER_TOPIC if step >= config.all_words_from else 1,
        shortest=1,
        longest=1 + sum(step >= start for start in config.longer_from),
        answer=step >= config.answer_from,
        mixed=config.mixed if step >= config.mixed_from else 0.0,
    )


def make_batch(
    config: EpisodesConfig, seed: int, step: int, batch_size: int, split: str = "train"
) -> dict[str, np.ndarray]:
    """The batch of a step, a pure function of its arguments.

    train: tokens int32[B, T] and loss_mask bool[B, T], True at labels whose class had a demonstration before.

    validation, test: prompts of `shots` demonstrations per class in random order and a query; tokens end in
    the true answer, the one target. Beside them, for the analyses: classes int32[B, T] (0 ordinary, 1 label
    words     of demonstrations, 2 the last position of the prompt, -1 the answer), positions int32[B] (that
    last position),     label_tokens int32[B, C], labels int32[B] (index of the answer in label_tokens).

    The splits share words but no item of two topic words or more: see SPLITS.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of episodes; there are {', '.join(SPLITS)}")
    rng = np.random.default_rng((seed, step, list(SPLITS).index(split)))
    if split == "train":
        return _training_batch(config, rng, stage_at(config, step), batch_size)
    return _prompts(config, rng, batch_size, SPLITS[split])


def _training_batch(
    config: EpisodesConfig, rng: np.random.Generator, stage: Stage, batch_size: int
) -> dict[str, np.ndarray]:
    demonstrations = config.sequence_length // (stage.shortest + 1 + stage.answer) + 1
    counts = rng.integers(config.min_classes, config.max_classes + 1, (batch_size, 1))
    topics, names = _meanings(rng, batch_size, config.max_classes)
    classes = (rng.random((batch_size, demonstrations)) * counts).astype(np.int64)
    tokens, is_label = _demonstrations(config, rng, stage, classes, counts, topics, names, SPLITS["train"])
    # A label is a target where its class was seen before; otherwise it could only be guessed.
    same = classes[:, :, None] == classes[:, None, :]
    seen = np.any(same & np.tril(np.ones(same.shape[1:], bool), -1)[None], axis=2)
    target = is_label & seen[:, :, None]
    # Items differ in length: drop the empty places, keeping the order.
    flat = tokens.reshape(batch_size, -1)
    order = np.argsort(flat < 0, axis=1, kind="stable")[:, : config.sequence_length]
    return {
        "tokens": np.take_along_axis(flat, order, 1).astype(np.int32),
        "loss_mask": np.take_along_axis(target.reshape(batch_size, -1), order, 1),
    }


def _prompts(
    config: EpisodesConfig, rng: np.random.Generator, batch_size: int, residues: tuple[int, ...]
) -> dict[str, np.ndarray]:
    stage = Stage(WORDS_PER_TOPIC, config.item_length, config.item_length, True, config.mixed)
    counts = np.full((batch_size, 1), config.classes)
    topics, names = _meanings(rng, batch_size, config.classes)
    shown = np.tile(np.repeat(np.arange(config.classes), config.shots), (batch_size, 1))
    asked = rng.integers(0, config.classes, (batch_size, 1))
    classes = np.concatenate([rng.permuted(shown, axis=1), asked], axis=1)
    tokens, is_label = _demonstrations(config, rng, stage, classes, counts, topics, names, residues)
    token_classes = (
        np.where(is_label, TokenClass.LABEL, TokenClass.ORDINARY).astype(np.int32).reshape(batch_size, -1)
    )
    token_classes[:, -2:] = (TokenClass.LAST, TokenClass.ANSWER)
    loss_mask = np.zeros(token_classes.shape, bool)
    loss_mask[:, -1] = True
    return {
        "tokens": tokens.reshape(batch_size, -1).astype(np.int32),
        "loss_mask": loss_mask,
        "classes": token_classes,
        "positions": np.full(batch_size, config.prompt_length - 2, np.int32),
        "label_tokens": names.astype(np.int32),
        "labels": asked[:, 0].astype(np.int32),
    }


def _meanings(rng: np.random.Generator, batch_size: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Topic numbers [B, C] and label words [B, C] of each episode's classes, all different."""
    topics = np.argsort(rng.random((batch_size, len(TOPIC_IDS))), axis=1)[:, :classes]
    names = LABEL_IDS[np.argsort(rng.random((batch_size, len(LABEL_IDS))), axis=1)[:, :classes]]
    return topics, names


def _demonstrations(
    config: EpisodesConfig,
    rng: np.random.Generator,
    stage: Stage,
    classes: np.ndarray,
    counts: np.ndarray,
    topics: np.ndarray,
    names: np.ndarray,
    residues: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, demonstrations, places], -1 in empty places, and where labels are."""
    shape = (*classes.shape, stage.longest)
    place = np.arange(stage.longest)[None, None]
    lengths = rng.integers(stage.shortest, stage.longest + 1, classes.shape)
    of_topic = np.ceil(lengths * config.topic_fraction).astype(np.int64).clip(1)
    of_topic = np.minimum(lengths, of_topic + (rng.random(classes.shape) < 0.3))
    others = (of_topic >= 2) & (of_topic < lengths) & (rng.random(classes.shape) < stage.mixed)

    numbers = rng.integers(0, stage.words, shape)
    if stage.words == WORDS_PER_TOPIC:
        # Change the first word so that the item falls into the split; items of one topic word are in all.
        total = np.sum(numbers, axis=2, where=place < of_topic[..., None])
        wanted = rng.choice(np.array(residues), classes.shape)
        moved = (numbers[..., 0] + wanted - total) % WORDS_PER_TOPIC
        numbers[..., 0] = np.where(of_topic >= 2, moved, numbers[..., 0])
    own = TOPIC_IDS[np.take_along_axis(topics, classes, 1)[..., None], numbers]
    shift = 1 + (rng.random(classes.shape) * (counts - 1)).astype(np.int64)
    other_topic = np.take_along_axis(topics, (classes + shift) % counts, 1)
    other = TOPIC_IDS[other_topic[..., None], rng.integers(0, stage.words, shape)]
    items = np.where(place < of_topic[..., None], own, rng.choice(FILLER_IDS, shape))
    items = np.where((place == of_topic[..., None]) & others[..., None], other, items)

    # Shuffle each item; the places beyond its length stay at its end.
    order = np.argsort(rng.random(shape) + (place >= lengths[..., None]), axis=2)
    items = np.where(place < lengths[..., None], np.take_along_axis(items, order, 2), -1)
    answers = [np.full((*classes.shape, 1), ANSWER_ID)] if stage.answer else []
    tokens = np.concatenate([items, *answers, np.take_along_axis(names, classes, 1)[..., None]], axis=2)
    is_label = np.broadcast_to(np.arange(tokens.shape[2]) == tokens.shape[2] - 1, tokens.shape)
    return tokens, is_label


class EpisodesSource:
    """Training episodes along the curriculum; held-out few-shot prompts of the task at its end."""

    source_names: tuple[str, ...] = ()

    def __init__(self, config: EpisodesConfig):
        self.config = config
        self.identity = hashlib.sha256(repr((dataclasses.astuple(config), WORDS)).encode()).hexdigest()

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        return take_rows(make_batch(self.config, seed, step, batch_size), rows)

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """`count` batches of prompts, always the same ones; the answer is the one target."""
        for step in range(count):
            batch = make_batch(self.config, 0, step, batch_size, split)
            yield take_rows({"tokens": batch["tokens"], "loss_mask": batch["loss_mask"]}, rows)

    def held_out_rows(self, batch_size: int, split: str) -> int:
        return batch_size

    def tokenizer(self) -> Tokenizer:
        return episode_tokenizer()

    @property
    def largest_token(self) -> int:
        return int(self.tokenizer().get_vocab_size()) - 1
