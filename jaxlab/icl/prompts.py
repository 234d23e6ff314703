"""Few-shot prompts as the analyses see them: which token plays which role, and where the answer is read
off."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data import EpisodesConfig, EpisodesSource, TokenClass, episode_tokenizer, make_episodes
from jaxlab.processing import decode


@dataclass(frozen=True)
class Roles:
    """What the token classes mean. Static; the edge sets of the paper follow from it."""

    labels: tuple[int, ...] = (TokenClass.LABEL.value,)
    """Label words of the demonstrations (p_1 ... p_C); one class for all of them, or one each."""
    query: int = TokenClass.LAST.value
    """The last position of the prompt (q)."""
    sink: int | None = None
    """A begin-of-sequence token, which gathers attention that goes nowhere: its edges are in no set but its
    own."""
    classes: int = 3
    """Token classes in all (K)."""

    def edge_sets(self) -> dict[str, np.ndarray]:
        """bool[K, K] by name, [class of i, class of j] of the edges j -> i (section 2.1 of the paper).

        wp: from any word before it to a label word. pq: from a label word to q. ww: all other edges. sink:
        edges from and to the sink, if there is one; they are in none of the three.
        """
        row, column = np.indices((self.classes, self.classes))
        label = [np.isin(side, self.labels) for side in (row, column)]
        sets = {"wp": label[0], "pq": (row == self.query) & label[1]}
        sets["ww"] = ~sets["wp"] & ~sets["pq"]
        if self.sink is not None:
            sink = (row == self.sink) | (column == self.sink)
            sets = {name: edges & ~sink for name, edges in sets.items()} | {"sink": sink}
        return sets


class Prompts(NamedTuple):
    """A batch of prompts. `batch` is what the model reads; the rest is what an analysis knows besides."""

    batch: dict[str, np.ndarray]
    """tokens int32[B, T], and segment_ids where prompts differ in length."""
    classes: np.ndarray
    """int32[B, T]: token classes, see Roles; -1 is outside of all edge sets."""
    positions: np.ndarray
    """int32[B]: q, where the model gives its answer."""
    label_tokens: np.ndarray
    """int32[B, C]: the first token of each label word."""
    labels: np.ndarray
    """int32[B]: the right answer, as an index into label_tokens."""

    @property
    def targets(self) -> dict[str, Any]:
        """As `flows` takes them."""
        return {"positions": self.positions, "label_tokens": self.label_tokens, "labels": self.labels}


@runtime_checkable
class PromptSource(Protocol):
    """Where prompts come from: pure functions of the seed."""

    roles: Roles
    identity: str
    length: int
    num_labels: int
    tokenizer: Tokenizer
    """Whose token ids the prompts hold: a model with another one would read something else."""

    def batches(self, seed: int, examples: int, batch_size: int) -> Iterator[Prompts]:
        """`examples` prompts in batches of one size; the last one may be smaller."""
        ...


PromptsConfig = EpisodesConfig
"""The prompts that are analysed; a further source joins by `|`."""


class EpisodePrompts:
    """Held-out prompts of jaxlab.data.episodes, cut after q: what follows cannot flow to it."""

    roles = Roles()

    def __init__(self, config: EpisodesConfig, split: str):
        self._config, self._split = config, split
        self.identity = f"{EpisodesSource(config).identity} {split}"
        self.length = config.prompt_length - 1
        self.num_labels = config.classes
        self.tokenizer = episode_tokenizer()

    def batches(self, seed: int, examples: int, batch_size: int) -> Iterator[Prompts]:
        for step, first in enumerate(range(0, examples, batch_size)):
            size = min(batch_size, examples - first)
            batch = make_episodes(self._config, seed, step, size, self._split)
            yield Prompts(
                {"tokens": batch["tokens"][:, : self.length]},
                batch["classes"][:, : self.length],
                batch["positions"],
                batch["label_tokens"],
                batch["labels"],
            )


def make_prompts(config: PromptsConfig, split: str) -> PromptSource:
    return EpisodePrompts(config, split)


def token_texts(tokens: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    """Each token of one sequence as text; without a tokenizer tokens are bytes."""
    if tokenizer is None:
        return [chr(token) if 32 <= token < 127 else f"\\x{token:02x}" for token in tokens.tolist()]
    return [decode([token], tokenizer, skip_special=False) for token in tokens.tolist()]
