"""Facts as lines that may stand in any text: a key and its value, both words.

    # The amber harp holds birch.

Keys are the colours and things of `jaxlab.data.needle`, in its splits: every word is trained on, the keys of
validation and test are not.
"""

import numpy as np

from jaxlab.data.needle import SPLITS
from jaxlab.data.needle_words import COLOURS, THINGS, VALUES
from jaxlab.errors import UserError

Fact = tuple[str, str]
"""Key and value."""
FACT = "\n# The {key} holds {value}.\n"
QUESTION, ANSWER = FACT.split(" {value}")[0], " {value}"
"""The line up to its value, and the value."""


def draw_facts(rng: np.random.Generator, count: int, split: str = "train") -> list[Fact]:
    """`count` facts with different keys and different values.

    Raises:
      UserError: no such split, or it has not so many.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of facts; there are {', '.join(SPLITS)}")
    keys = [
        f"{colour} {thing}"
        for c, colour in enumerate(COLOURS)
        for t, thing in enumerate(THINGS)
        if (c + t) % 5 in SPLITS[split]
    ]
    if not 0 <= count <= min(len(keys), len(VALUES)):
        raise UserError(f"{count} facts: from 0 to {min(len(keys), len(VALUES))} have different values")
    chosen, values = (rng.choice(len(words), count, replace=False) for words in (keys, VALUES))
    return [(keys[k], VALUES[v]) for k, v in zip(chosen, values, strict=True)]


def fact_text(fact: Fact) -> str:
    """The line that tells a fact."""
    key, value = fact
    return FACT.format(key=key, value=value)
