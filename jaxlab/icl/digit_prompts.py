"""Questions about pictures of digits (jaxlab.data.digits), in the token classes of a VLM's prompt."""

from typing import Any

import jax
import numpy as np

from jaxlab.checkpoints import OpenModel
from jaxlab.data import (
    PAD_ID,
    DigitsConfig,
    DigitsSource,
    check_all_tokens,
    check_fits,
    check_same_words,
    digits_tokenizer,
    evaluation_batches,
    naming_places,
)
from jaxlab.errors import UserError
from jaxlab.icl.image_prompts import ANSWER, IMAGE, INSTRUCTION, NAMES, SYSTEM
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.roles import Part, Roles

FIRST_WORDS = 3
"""Before the picture: <bos> picture :"""


class DigitPrompts:
    """Held-out questions, cut where the digit is told: "le" of "le sept" is read, and "sept" the target.

    Of the answer the words before the digit are given, so that models of different skills are asked for the
    same thing.
    """

    def __init__(self, config: DigitsConfig, opened: OpenModel, split: str) -> None:
        """
        Raises:
          UserError: the model has no vision or reads other words, or texts are asked about.
        """
        self.tokenizer, self.model = digits_tokenizer(), opened.config
        texts = [name for name, share in config.mixture.items() if share > 0 and name.startswith("text_")]
        if texts:
            raise UserError(
                f"data.mixture: flows from pictures need image_ tasks; leave out {', '.join(texts)}"
            )
        check_same_words(opened.tokenizer, self.tokenizer, opened.path)
        (self._whole,) = evaluation_batches(config, split)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self._whole.items()}
        check_fits(shapes, self.model)
        check_all_tokens(DigitsSource(config), self.model)
        self._places = naming_places(self._whole["tokens"])
        self.length = int(self._places.max())
        self.label_names: tuple[str, ...] = ()
        self.roles = Roles(labels=(), query=ANSWER, classes=len(NAMES), names=NAMES)

    def count(self, examples: int) -> int:
        return min(examples, len(self._places))

    def with_shots(self, shots: int) -> "DigitPrompts":
        raise UserError("data: questions about digits have no demonstrations")

    def fixed(self) -> "DigitPrompts":
        return self

    def lessons(self, seed: int, per_class: int) -> Prompts:
        raise UserError("data: questions about digits have no classes to learn")

    def facts(self) -> dict[str, Any]:
        return {}

    def batches(self, seed: int, examples: int, batch_size: int) -> list[Prompts]:
        order = np.random.default_rng((seed, 2)).permutation(len(self._places))[: self.count(examples)]
        found = []
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            rows = np.full(batch_size, -1, np.int32)
            rows[: len(some)] = np.arange(first, first + len(some))
            found.append(self._prompts(np.resize(some, batch_size), rows))
        return found

    def _prompts(self, chosen: np.ndarray, rows: np.ndarray) -> Prompts:
        places = self._places[chosen]
        column = np.arange(self.length)
        inside = column < places[:, None]
        whole = self._whole["tokens"][chosen]
        answer = (
            self._whole["loss_mask"][chosen].argmax(1) - 1
        )  # the word "answer", which the first is read off at
        tokens = np.where(inside, whole[:, : self.length], PAD_ID).astype(np.int32)
        classes = np.where(column < FIRST_WORDS, SYSTEM, INSTRUCTION)
        classes = np.where(tokens == self.model.image_token, IMAGE, classes)
        classes = np.where(column >= answer[:, None], ANSWER, classes)
        parts = np.where(classes == INSTRUCTION, Part.TEXT, Part.FORMAT)
        parts = np.where(column == places[:, None] - 1, Part.LAST, parts)
        nothing = np.full(tokens.shape, -1, np.int32)
        return Prompts(
            batch={"tokens": tokens, "images": self._whole["images"][chosen]},
            classes=np.where(inside, classes, -1).astype(np.int32),
            positions=(places - 1).astype(np.int32),
            label_tokens=whole[np.arange(len(chosen)), places][:, None].astype(np.int32),
            labels=np.zeros(len(chosen), np.int32),
            parts=np.where(inside, parts, Part.PADDING).astype(np.int32),
            label_words=nothing,
            demonstrations=nothing,
            rows=rows,
        )
