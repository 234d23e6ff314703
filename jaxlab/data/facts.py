"""Facts as lines that may stand in any text: a key and its value, both words.

    # The amber harp holds birch.

Keys are the colours and things of `jaxlab.data.needle`, in its splits: every word is trained on, the keys of
validation and test are not.
"""

from dataclasses import dataclass

import numpy as np

from jaxlab.data.needle import SPLITS
from jaxlab.data.needle_words import COLOURS, THINGS, VALUES
from jaxlab.errors import UserError

FACT = "\n# The {key} holds {value}.\n"
"""How a fact is told."""


@dataclass(frozen=True)
class Fact:
    """One fact."""

    key: str
    value: str

    def text(self, form: str = FACT) -> str:
        """The line that tells it."""
        return form.format(key=self.key, value=self.value)

    def question(self, form: str = FACT) -> tuple[str, str]:
        """The line up to its value, and the value with the space before it: what a model goes on with."""
        before = form[: form.index("{value}")].format(key=self.key)
        asked = before.rstrip(" ")
        return asked, before[len(asked) :] + self.value


def split_keys(split: str) -> list[str]:
    """The keys of a split.

    Raises:
      UserError: no such split.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of facts; there are {', '.join(SPLITS)}")
    return [
        f"{colour} {thing}"
        for c, colour in enumerate(COLOURS)
        for t, thing in enumerate(THINGS)
        if (c + t) % 5 in SPLITS[split]
    ]


MOST = min(len(VALUES), len(COLOURS) * len(THINGS) // 5)
"""Facts with different keys and values that every split has."""


def draw_facts(rng: np.random.Generator, count: int, split: str = "train") -> list[Fact]:
    """`count` facts, at most MOST, with different keys and different values."""
    keys = split_keys(split)
    chosen, values = (rng.choice(len(words), count, replace=False) for words in (keys, VALUES))
    return [Fact(keys[k], VALUES[v]) for k, v in zip(chosen, values, strict=True)]
