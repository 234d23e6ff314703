"""Blocking: label words, or as many random ones, cut off in first or last layers (Wang et al. 2023, section
2.2 and figure 4; claim I4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlab.errors import ConfigError, UserError
from jaxlab.icl.analyses.answers import single_class
from jaxlab.icl.analyses.base import PromptAnalysis, Records, Study, deviation
from jaxlab.icl.blocking import (
    Setting,
    blocked_logits,
    blocking_settings,
    label_predictions,
    random_words,
    word_loyalty,
)
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.roles import Part

MEASURES = ("accuracy", "label_loyalty", "word_loyalty")


@dataclass(frozen=True)
class Blocking(PromptAnalysis):
    """What the answers are when nothing flows to some words in some layers."""

    layers: tuple[int, ...] = (5,)
    """Blocking is done in the first, and in the last, so many layers; each number is a setting of its own."""
    top_words: int = 5
    """Word loyalty compares so many of the most likely next words."""

    name: ClassVar[str] = "blocking"

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("give the numbers of layers to block", key="layers")
        if any(n < 1 for n in self.layers):
            raise ConfigError(f"must be at least 1, are {list(self.layers)}", key="layers")
        if self.top_words < 1:
            raise ConfigError(f"must be at least 1, is {self.top_words}", key="top_words")

    def check(self, study: Study) -> None:
        layers, words = study.config.num_layers, study.config.vocab_size
        if max(self.layers) > layers:
            raise UserError(f"blocking.layers: the model has {layers} layers, not {max(self.layers)}")
        if self.top_words > words:
            raise UserError(f"blocking.top_words: the vocabulary has {words} words, not {self.top_words}")

    @property
    def settings(self) -> list[Setting]:
        return blocking_settings(self.layers)

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        label_words = chunk.parts == Part.LABEL
        others = np.isin(chunk.parts, (Part.TEXT, Part.FORMAT, Part.FORERUNNER))
        others[:, 0] = False  # nothing flows to the first token anyway
        words = {"label": label_words, "random": random_words(rng, label_words, others)}
        # The first setting blocks nothing: what the others are set against, from the same program.
        layers = [np.zeros(study.config.num_layers, bool)]
        chosen = [np.zeros_like(label_words)]
        for setting in self.settings:
            layers.append(setting.layer_mask(study.config.num_layers))
            chosen.append(words[setting.words])
        logits = np.asarray(
            blocked_logits(
                study.params,
                {name: jnp.asarray(value) for name, value in chunk.batch.items()},
                jnp.asarray(chunk.positions),
                jnp.asarray(np.stack(layers)),
                jnp.asarray(np.stack(chosen)),
                study.config,
                study.mode,
            )
        )
        predicted = label_predictions(logits, chunk.label_tokens)
        loyal = np.stack([word_loyalty(x, logits[0], self.top_words) for x in logits])
        return {"predicted": predicted.T.astype(np.int32), "word_loyalty": loyal.T, "label": chunk.labels}

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        measures = {name: np.stack([_measure(seed, name) for seed in records.values()]) for name in MEASURES}
        plain = np.concatenate([seed["predicted"][:, 0] for seed in records.values()])
        alone = single_class(plain, study.source.label_names)
        rows = []
        for at, setting in enumerate(self.settings, start=1):
            row: dict[str, Any] = {"words": setting.words, "where": setting.where, "layers": setting.layers}
            for name, seeds in measures.items():
                row |= {name: seeds[:, at].mean(), f"{name}_std": deviation(seeds[:, at])}
            rows.append(row)
        return {
            "top_words": self.top_words,
            "undefined": ["accuracy", "label_loyalty"] if alone is not None else [],
            "table": rows,
        }


def _measure(seed: Records, name: str) -> np.ndarray:
    """Means over the prompts of a seed, for each setting; the first blocks nothing."""
    predicted = seed["predicted"]
    match name:
        case "accuracy":
            return np.mean(predicted == seed["label"][:, None], axis=0)
        case "label_loyalty":
            return np.mean((predicted == predicted[:, :1]) & (predicted >= 0), axis=0)
        case _:
            return np.asarray(np.nanmean(seed[name], axis=0))
