"""Few-shot prompts as the analyses see them: which token plays which role, and where the answer is read
off."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer

from jaxlab.icl.roles import Part, Roles
from jaxlab.processing import decode


class Prompts(NamedTuple):
    """A batch of prompts. `batch` is what the model reads; the rest is what an analysis knows besides."""

    batch: dict[str, np.ndarray]
    """tokens int32[B, T], with padding on the right, which causal attention does not see; a VLM's images."""
    classes: np.ndarray
    """int32[B, T]: token classes, see Roles; -1 is outside of all edge sets, as padding is."""
    positions: np.ndarray
    """int32[B]: q, where the model gives its answer."""
    label_tokens: np.ndarray
    """int32[B, C]: the first token of each label word."""
    labels: np.ndarray
    """int32[B]: the right answer, as an index into label_tokens."""
    parts: np.ndarray
    """int32[B, T]: what each token is part of, see Part."""
    label_words: np.ndarray
    """int32[B, T]: of which label a token of Part.LABEL is, as an index into label_tokens; -1 elsewhere."""
    demonstrations: np.ndarray
    """int32[B, T]: of which demonstration a token is, in their order; as many as there are for the query's;
    -1 for what belongs to none."""
    rows: np.ndarray
    """int32[B]: which of the seed's prompts these are; -1 for those that only fill the batch up."""

    @property
    def targets(self) -> dict[str, Any]:
        """As `flows` takes them."""
        return {"positions": self.positions, "label_tokens": self.label_tokens, "labels": self.labels}

    @property
    def real(self) -> np.ndarray:
        """bool[B]: False on rows that fill the batch up, whose results are dropped."""
        return self.rows >= 0

    @property
    def lengths(self) -> np.ndarray:
        """int32[B]: tokens of each prompt, without padding."""
        return (self.parts != Part.PADDING).sum(1).astype(np.int32)

    @property
    def starts(self) -> np.ndarray:
        """int32[B]: where the query of each begins, behind its demonstrations."""
        of_query = self.demonstrations == self.demonstrations.max(axis=1, keepdims=True)
        return np.argmax(of_query, axis=1).astype(np.int32)

    def select(self, at: int) -> "Prompts":
        """The batch of one prompt, without its padding."""
        size, length = len(self.rows), int(self.lengths[at])

        def cut(array: np.ndarray, name: str = "") -> np.ndarray:
            if array.ndim == 0 or len(array) != size:  # images, which count on their own
                return array
            return array[at : at + 1, :length] if self._of_tokens(array, name) else array[at : at + 1]

        batch, *arrays = self
        return Prompts({name: cut(array, name) for name, array in batch.items()}, *map(cut, arrays))

    def _of_tokens(self, array: np.ndarray, name: str = "") -> bool:
        """Whether its second axis counts tokens."""
        of_images = name.startswith(("image", "pixel", "window"))
        return not of_images and array.ndim > 1 and array.shape[:2] == self.parts.shape

    def padded(self, length: int, token: int = 0) -> "Prompts":
        """With padding on the right, of that token; positions are as the last one, what else the model reads
        is 0."""
        more = length - self.parts.shape[1]

        def pad(array: np.ndarray, name: str = "", fill: int = -1) -> np.ndarray:
            if not self._of_tokens(array, name):
                return array
            widths = [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2)
            if name == "positions":
                return np.pad(array, widths, mode="edge")
            return np.pad(array, widths, constant_values=fill)

        fills = {"tokens": token}
        batch = {name: pad(array, name, fills.get(name, 0)) for name, array in self.batch.items()}
        of_tokens = ("classes", "parts", "label_words", "demonstrations")
        return self._replace(batch=batch, **{name: pad(getattr(self, name)) for name in of_tokens})


@runtime_checkable
class PromptSource(Protocol):
    """Where prompts come from: pure functions of the seed."""

    roles: Roles
    length: int
    """No prompt has more tokens."""
    label_names: tuple[str, ...]
    """The label words, where they are the same in all prompts; else what stands for them."""

    def count(self, examples: int) -> int:
        """How many prompts a seed has, if so many are asked for."""
        ...

    def batches(self, seed: int, examples: int, batch_size: int) -> Sequence[Prompts]:
        """At most `examples` prompts in batches, of few different shapes; always the same ones."""
        ...

    def with_shots(self, shots: int) -> "PromptSource":
        """The same queries after so many demonstrations of each class; 0: none.

        Raises:
          UserError: it cannot have so many.
        """
        ...

    def fixed(self) -> "PromptSource":
        """The same queries after one set of demonstrations a seed, in either mode."""
        ...

    def lessons(self, seed: int, per_class: int) -> Prompts:
        """Prompts to learn from: after the demonstrations of `fixed`, so many queries of each class that are
        neither demonstrations nor tested.

        Raises:
          UserError: there are not so many.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What results say of the prompts that were made so far."""
        ...


def bucket(length: int) -> int:
    """The length to which a batch is padded: few different ones, each less than 1.5 (short) or 1.15 times
    what is needed, so that few programs are compiled."""
    step = max(16, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def in_batches(lengths: Sequence[int], batch_size: int, most: int) -> Iterator[tuple[list[int], int]]:
    """(prompts, padded length) of each batch: prompts of like lengths together, none padded beyond `most`."""
    order = sorted(range(len(lengths)), key=lambda n: (lengths[n], n))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        yield chosen, min(bucket(lengths[chosen[-1]]), most)


def token_texts(tokens: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    """Each token of one sequence as text; without a tokenizer tokens are bytes."""
    if tokenizer is None:
        return [chr(token) if 32 <= token < 127 else f"\\x{token:02x}" for token in tokens.tolist()]
    return [decode([token], tokenizer, skip_special=False) for token in tokens.tolist()]
