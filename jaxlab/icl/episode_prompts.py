"""Prompts of jaxlab.data.episodes, in which each has label words of its own."""

from typing import Any

import numpy as np

from jaxlab.checkpoints import OpenModel
from jaxlab.data import (
    EpisodesConfig,
    TokenClass,
    check_same_words,
    episode_tokenizer,
    make_episodes,
)
from jaxlab.errors import UserError
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.roles import Part, TokenClasses
from jaxlab.processing import check_token_ids

LESSON_STEP = 1 << 31
"""No run has so many batches, so that no lesson is asked with `split: validation` either."""


class EpisodePrompts:
    """Held-out prompts of jaxlab.data.episodes, cut after q: what follows cannot flow to it."""

    def __init__(
        self, config: EpisodesConfig, opened: OpenModel, split: str, classes: TokenClasses | None = None
    ) -> None:
        """
        Raises:
          UserError: the model reads other words.
        """
        self.tokenizer = episode_tokenizer()
        check_same_words(opened.tokenizer, self.tokenizer, opened.path)
        self.classes = classes or TokenClasses()
        self._config, self._split, self._model = config, split, opened.config
        self.length = config.prompt_length - 1
        self.label_names = tuple(f"class {number}" for number in range(1, config.classes + 1))
        self.roles = self.classes.roles(self.label_names, config.classes * config.shots)

    def count(self, examples: int) -> int:
        return examples

    def with_shots(self, shots: int) -> "EpisodePrompts":
        if shots != self._config.shots:
            raise UserError(f"episodes have {self._config.shots} demonstrations a class, not {shots}")
        return self

    def fixed(self) -> "EpisodePrompts":
        return self  # each prompt has demonstrations of its own, whatever the mode

    def lessons(self, seed: int, per_class: int) -> Prompts:
        count = per_class * len(self.label_names)
        return self._prompts(make_episodes(self._config, seed, LESSON_STEP, count, "validation"), 0)

    def facts(self) -> dict[str, Any]:
        return {}

    def batches(self, seed: int, examples: int, batch_size: int) -> list[Prompts]:
        found = []
        for step, first in enumerate(range(0, examples, batch_size)):
            size = min(batch_size, examples - first)
            batch = make_episodes(self._config, seed, step, size, self._split)
            found.append(self._prompts(batch, first))
        return found

    def _prompts(self, batch: dict[str, np.ndarray], first: int) -> Prompts:
        tokens, kinds = (batch[name][:, : self.length] for name in ("tokens", "classes"))
        names = batch["label_tokens"]
        for what, ids in (("prompts", tokens), ("label words", names)):
            check_token_ids(ids, self._model, self.tokenizer, where=f"data: one of the {what}")
        is_label = kinds == TokenClass.LABEL.value
        parts = np.full_like(kinds, Part.TEXT)
        parts[is_label] = Part.LABEL
        parts[:, :-1][is_label[:, 1:]] = Part.FORERUNNER
        parts[kinds == TokenClass.LAST.value] = Part.LAST
        words = np.where(is_label, (tokens[..., None] == names[:, None]).argmax(-1), -1).astype(np.int32)
        shown = (np.cumsum(is_label, axis=1) - is_label).astype(np.int32)
        return Prompts(
            batch={"tokens": tokens},
            classes=self.classes.assign(self.roles, parts, words, shown),
            positions=batch["positions"],
            label_tokens=names,
            labels=batch["labels"],
            parts=parts,
            label_words=words,
            demonstrations=shown,
            rows=np.arange(first, first + len(tokens), dtype=np.int32),
        )
