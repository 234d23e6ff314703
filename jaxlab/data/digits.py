"""Questions about handwritten digits, in text and in pictures: what skill injection is shown with.

The pictures are scikit-learn's 1797 real scans of 8x8 pixels. A mixture says which skills are asked about
pictures and which about text, so the base, the vision-language model and every expert are configs of this one
source.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.digits_words import (
    BOS,
    CONTEXT,
    CONTEXT_IDS,
    IMAGE,
    IMAGE_ID,
    PAD_ID,
    PLACES,
    SKILLS,
    VOCABULARY,
    digits_tokenizer,
    rows,
)
from jaxlab.data.rows import take_rows
from jaxlab.errors import ConfigError, UserError

HELD_OUT = 320
"""Pictures, and texts, in each of the splits validation and test."""
SPLITS = ("train", "validation", "test")
TASKS = tuple(f"{kind}_{skill}" for kind in ("text", "image") for skill in SKILLS)
"""What a mixture is made of: image_french asks in French about a picture."""


@dataclass(frozen=True)
class DigitsConfig:
    """Questions about handwritten digits, in text and in pictures."""

    kind: Literal["digits"] = "digits"
    mixture: dict[str, float] = field(default_factory=lambda: {"text_words": 1.0})
    """Shares of the tasks, in any unit: text_ or image_, then words, figures, roman, french, format
    or arithmetic."""
    agreeing: int = 2
    """Fewest of the four words of a text's context that name the digit meant; the others name one digit
    each."""
    shift: int = 1
    """Training pictures are moved by up to so many pixels."""
    noise: float = 0.05
    """Standard deviation of noise on training pictures, whose pixels are in [0, 1]."""

    def __post_init__(self) -> None:
        for task, share in self.mixture.items():
            if task not in TASKS:
                close = get_close_matches(task, TASKS, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(TASKS)}"
                raise ConfigError(f"no task {task!r}; {hint}", key="mixture")
            if not 0 <= share < float("inf"):
                raise ConfigError(f"{task} must be finite and not negative, is {share}", key="mixture")
        if not sum(self.mixture.values()):
            raise ConfigError("nothing to ask: give at least one task a positive share", key="mixture")
        if not 2 <= self.agreeing <= PLACES:
            raise ConfigError(f"must be from 2 to {PLACES}, is {self.agreeing}", key="agreeing")
        if self.shift < 0:
            raise ConfigError(f"must not be negative, is {self.shift}", key="shift")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"must be finite and not negative, is {self.noise}", key="noise")

    @property
    def has_images(self) -> bool:
        return any(share > 0 and task.startswith("image_") for task, share in self.mixture.items())


class Example(NamedTuple):
    """A question in words."""

    prompt: str
    expected: str
    answer: str


@functools.cache
def load_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures float32[N, 8, 8] in [0, 1] and their digits int64[N]; every picture is in one split.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError("handwritten digits come with scikit-learn; install the extra `demo`") from error
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    part = {
        "train": order[2 * HELD_OUT :],
        "validation": order[:HELD_OUT],
        "test": order[HELD_OUT : 2 * HELD_OUT],
    }
    return (found.images[part[split]] / 16).astype(np.float32), found.target[part[split]].astype(np.int64)


def make_batch(
    config: DigitsConfig, seed: int, step: int, batch_size: int, split: str = "train"
) -> dict[str, np.ndarray]:
    """A batch drawn from a split, a pure function of its arguments.

    tokens int32[B, T], padded at the end; loss_mask bool[B, T], True at answers; segment_ids int32[B, T],
    1 at words and 0 at padding; and, if the mixture asks about pictures, images float32[B, 1, 8, 8, 1],
    empty for texts.

    Raises:
      UserError: no such split.
    """
    rng = np.random.default_rng((seed, step, _split_number(split)))
    index = rng.integers(0, len(load_images(split)[0]), batch_size) if config.has_images else None
    return _questions(config, rng, batch_size, split, index)


def evaluation_batches(
    config: DigitsConfig, split: str, batch_size: int = HELD_OUT
) -> Iterator[dict[str, np.ndarray]]:
    """A held-out split as a whole, in order and always the same; every picture is asked about once.

    Raises:
      UserError: no such split.
    """
    rng = np.random.default_rng(_split_number(split))
    whole = _questions(config, rng, HELD_OUT, split, np.arange(HELD_OUT) if config.has_images else None)
    for start in range(0, HELD_OUT, batch_size):
        yield {name: value[start : start + batch_size] for name, value in whole.items()}


def describe(batch: dict[str, np.ndarray], likeliest: np.ndarray) -> list[Example]:
    """The rows of a batch in words, with the answers of a model.

    `likeliest` int[B, T] is the token with the highest logit at every position: the guess at the next one.
    """
    decode = digits_tokenizer().decode
    examples = []
    for tokens, targets, guesses in zip(batch["tokens"], batch["loss_mask"], likeliest, strict=True):
        start, end = np.flatnonzero(targets)[[0, -1]]
        expected, answer = tokens[start:end], guesses[start - 1 : end - 1]  # without <eos>
        prompt = decode(tokens[:start], skip_special_tokens=False)
        examples.append(Example(_shown(prompt), decode(expected), decode(answer, skip_special_tokens=False)))
    return examples


def naming_places(tokens: np.ndarray) -> np.ndarray:
    """Where the digit is first told: int[B], of each row int32[B, T] the first place of its answer whose word
    depends on the digit."""
    table = rows()
    asked = tokens.copy()
    asked[:, CONTEXT] = IMAGE_ID  # what stands there says which digit, not which question
    same = (table.tokens[None] == asked[:, None, None]).all(-1)
    question = same.any(2).argmax(1)
    depends = (table.tokens != table.tokens[:, :1]).any(1) & table.targets.any(1)
    return np.asarray(depends[question].argmax(1))


def tokenizer(config: DigitsConfig) -> Tokenizer:
    """The same for every mixture."""
    return digits_tokenizer()


def _split_number(split: str) -> int:
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of digits; there are {', '.join(SPLITS)}")
    return SPLITS.index(split)


def _questions(
    config: DigitsConfig, rng: np.random.Generator, size: int, split: str, index: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Questions in the shares of the mixture, those about pictures about the ones that `index` names."""
    tasks = [task for task, share in config.mixture.items() if share > 0]
    shares = np.array([config.mixture[task] for task in tasks])
    # Row i has the task whose interval of shares holds it; one random shift makes fractions of rows fair.
    ends = np.floor(np.cumsum(shares) / np.sum(shares) * size + rng.random())
    ends[-1] = size
    task = rng.permutation(np.searchsorted(ends, np.arange(size), side="right"))
    is_image = np.array([name.startswith("image_") for name in tasks])[task]
    digit = rng.integers(0, 10, size)
    if index is not None:
        pictures, labels = load_images(split)
        digit = np.where(is_image, labels[index], digit)

    table, skills = rows(), [name.partition("_")[2] for name in tasks]
    first = np.array([table.first[skill] for skill in skills])[task]
    questions = np.array([table.questions[skill] for skill in skills])[task]
    question = first + (rng.random(size) * questions).astype(np.int64)
    tokens = table.tokens[question, digit]
    words = _context(config, rng, digit)
    tokens[:, CONTEXT] = np.where(is_image[:, None], tokens[:, CONTEXT], words)
    batch = {
        "tokens": tokens,
        "loss_mask": table.targets[question, digit],
        "segment_ids": (tokens != PAD_ID).astype(np.int32),
    }
    if index is not None:
        images = pictures[index]
        if split == "train":
            images = _augment(config, rng, images)
        batch["images"] = np.where(is_image[:, None, None], images, np.float32(0))[:, None, :, :, None]
    return batch


def _context(config: DigitsConfig, rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Words int32[B, PLACES], most of which name the digit; the others name other digits, all different."""
    size = len(digit)
    agreeing = rng.integers(config.agreeing, PLACES + 1, size)
    others = (digit[:, None] + 1 + np.argsort(rng.random((size, 9)), axis=1)[:, :PLACES]) % 10
    named = np.where(np.arange(PLACES)[None] < agreeing[:, None], digit[:, None], others)
    return CONTEXT_IDS[rng.integers(0, len(CONTEXT_IDS), named.shape), rng.permuted(named, axis=1)]


def _augment(config: DigitsConfig, rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Pictures moved, a little lighter or darker, and noisy."""
    size, side, shift = len(images), images.shape[1], config.shift
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift)))
    # Each axis stays in place for more than a third of the pictures: held-out ones are centred.
    start = np.where(rng.random((size, 2)) < 0.4, shift, rng.integers(0, 2 * shift + 1, (size, 2)))
    row, column = (start[:, axis, None] + np.arange(side)[None] for axis in (0, 1))
    moved = padded[np.arange(size)[:, None, None], row[:, :, None], column[:, None, :]]
    light = 1 + 2 * config.noise * rng.standard_normal((size, 1, 1))
    noisy = moved * light + config.noise * rng.standard_normal(moved.shape)
    return np.clip(noisy, 0, 1).astype(np.float32)


def _shown(prompt: str) -> str:
    """A prompt for reading: without the mark of its start, and with one placeholder for a picture."""
    return prompt.removeprefix(f"{BOS} ").replace(" ".join([IMAGE] * PLACES), IMAGE)


class DigitsSource:
    """Training batches drawn from a mixture; held-out splits as wholes."""

    source_names: tuple[str, ...] = ()

    def __init__(self, config: DigitsConfig) -> None:
        self.config = config
        digest = hashlib.sha256(repr((config, tuple(VOCABULARY))).encode())
        digest.update(rows().tokens.tobytes())
        if config.has_images:
            for split in SPLITS:
                digest.update(load_images(split)[0].tobytes())
        self.identity = digest.hexdigest()

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        return take_rows(make_batch(self.config, seed, step, batch_size), rows)

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """At most `count` batches of a held-out split; the last one of the split may be smaller."""
        for _, batch in zip(range(count), evaluation_batches(self.config, split, batch_size), strict=False):
            yield take_rows(batch, rows)

    def held_out_rows(self, batch_size: int, split: str) -> int:
        return min(batch_size, HELD_OUT)

    def tokenizer(self) -> Tokenizer:
        return tokenizer(self.config)

    @property
    def largest_token(self) -> int:
        return int(self.tokenizer().get_vocab_size()) - 1
