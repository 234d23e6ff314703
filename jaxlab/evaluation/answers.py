"""Answers to prompts as they are made: in batches, until each has ended, with the text that is certain."""

import functools
import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from tokenizers import Tokenizer

from jaxlab.evaluation.likelihood import WHOLE
from jaxlab.models import Batch, ModelConfig, Params, shapes_of, stack_rows, stream
from jaxlab.processing import StopTexts, TextStream


@dataclass
class Answer:
    """One answer, as it is made."""

    index: int
    """Of its prompt."""
    sample: int
    """Which of several answers to it."""
    batch: Batch
    """The prompt, one row, not prepared."""
    budget: int
    """Most tokens."""
    ends: frozenset[int]
    """Tokens that end it."""
    stream: TextStream
    stops: StopTexts
    text: str = ""
    tokens: int = 0
    """How many were made."""
    finish_reason: Literal["stop", "length"] | None = None
    """None: it is being made."""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.batch["tokens"].shape[1])

    @functools.cached_property
    def shapes(self) -> Hashable:
        """What it shares with prompts that may be read with it."""
        return shapes_of(self.batch)

    def add(self, token: int) -> str:
        """The text that a token adds for certain; nothing once the answer has ended.

        Raises:
          UserError: the tokenizer fails on it.
        """
        if self.finish_reason is not None:
            return ""
        self.tokens += 1
        added = "" if token in self.ends else self.stops.add(self.stream.add(token))
        if token in self.ends or self.stops.found:
            self.finish_reason = "stop"
        elif self.tokens == self.budget:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            added += self.stops.end()
        self.text += added
        return added

    def as_json(self) -> str:
        """What is known of it, on one line."""
        said = {
            "index": self.index,
            "sample": self.sample,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.length,
            "new_tokens": self.tokens,
        }
        return json.dumps(said, ensure_ascii=False)


def fill_all(
    answers: Sequence[Answer],
    params: Params,
    config: ModelConfig,
    sampling: Mapping[str, Any],
    key: Key[Array, ""],
    *,
    batch_size: int,
    prefill_chunk: int | None = None,
) -> Iterator[tuple[list[Answer], Iterator[str]]]:
    """Makes answers in their order, in batches.

    Each is what it would be alone: it is drawn with `key` and the number of its sample.

    Args:
      sampling: options of `jaxlab.models.stream`.
      batch_size: most prompts that are read together: texts, or prompts whose images have one shape.

    Yields:
      The answers of a batch, and the text of the first one as it comes; they are whole when that has ended.
    """
    groups = _groups(answers, batch_size, config)
    kinds = Counter(members[0].shapes for members in groups)
    for members in groups:
        # Batches of one shape share a program.
        several = kinds[members[0].shapes] > 1
        rows, whole = (batch_size, WHOLE) if several else (len(members), 1)
        yield members, _fill(members, params, config, sampling, key, rows, whole, prefill_chunk)


def answer_texts(
    prompts: Sequence[Batch],
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    *,
    max_new_tokens: int,
    ends: frozenset[int],
    stops: Sequence[str],
    batch_size: int,
    sampling: Mapping[str, Any] | None = None,
    key: Key[Array, ""] | None = None,
) -> list[str]:
    """An answer to each prompt, made in batches of like lengths.

    Args:
      prompts: one row each, not prepared.
      tokenizer: None: tokens are bytes.
      max_new_tokens: of an answer, as far as the model's context allows.
      ends: tokens that end it.
      stops: texts before which it ends.
      sampling: options of `jaxlab.models.stream`; by default the likeliest token is taken.
    """
    answers = []
    for index, batch in enumerate(prompts):
        ids = batch["tokens"][0].tolist()
        budget = min(max_new_tokens, config.max_length - len(ids))
        stream = TextStream(tokenizer, ids)
        answers.append(Answer(index, 0, batch, budget, ends, stream, StopTexts(list(stops))))
    kinds: dict[Hashable, int] = {}
    kind = lambda answer: kinds.setdefault(answer.shapes, len(kinds))
    answers.sort(key=lambda answer: (set(answer.batch) != {"tokens"}, kind(answer), answer.length))
    key = jax.random.key(0) if key is None else key
    texts = [""] * len(answers)
    for made, pieces in fill_all(answers, params, config, sampling or {}, key, batch_size=batch_size):
        for _ in pieces:
            pass
        for answer in made:
            texts[answer.index] = answer.text
    return texts


def _groups(answers: Sequence[Answer], size: int, config: ModelConfig) -> list[list[Answer]]:
    """Answers in their order, cut into batches that the model's context takes, with images of one shape."""
    groups: list[list[Answer]] = []
    for answer in answers:
        together = [*(groups[-1] if groups else ()), answer]
        fits = max(a.length for a in together) + max(a.budget for a in together) <= config.max_length
        alike = together[0].shapes == answer.shapes
        if groups and len(together) <= size and fits and alike:
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return groups


def _fill(
    answers: Sequence[Answer],
    params: Params,
    config: ModelConfig,
    sampling: Mapping[str, Any],
    key: Key[Array, ""],
    rows: int,
    whole: int,
    prefill_chunk: int | None,
) -> Iterator[str]:
    """Makes the answers of a batch; gives the text of the first one as it comes.

    Args:
      rows: of the batch, filled up with copies of the last.
      whole: prompts are padded to a multiple of so many tokens, as far as the model's context allows.
    """
    budget = max(answer.budget for answer in answers)
    filled = [*answers, *[answers[-1]] * (rows - len(answers))]
    longest = max(answer.length for answer in answers)
    length = max(longest, min(-(-longest // whole) * whole, config.max_length - budget))
    batch = stack_rows([answer.batch for answer in filled], length, config)
    keys = jnp.stack([jax.random.fold_in(key, answer.sample) for answer in filled])
    for tokens in stream(
        params, batch, config, max_new_tokens=budget, key=keys, prefill_chunk=prefill_chunk, **sampling
    ):
        added = [answer.add(token) for answer, token in zip(answers, tokens.tolist(), strict=False)]
        yield added[0]
        if all(answer.finish_reason is not None for answer in answers):
            return
