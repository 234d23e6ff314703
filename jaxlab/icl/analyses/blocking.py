"""Blocking: label words, or as many random ones, cut off in first or last layers (Wang et al. 2023, section
2.2 and figure 4; claim I4)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.icl.analyses.answers import single_class
from jaxlab.icl.analyses.base import PromptAnalysis, Records, Study, deviation, mean
from jaxlab.icl.blocking import (
    Setting,
    blocked_logits,
    blocking_settings,
    label_predictions,
    random_words,
    word_loyalty,
)
from jaxlab.icl.cutting import Edges, check_one_softmax, cut_logits, cut_of_words
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.roles import Part

LAYERS = (5,)
MEASURES = ("accuracy", "label_loyalty", "word_loyalty")


@dataclass(frozen=True)
class Blocking(PromptAnalysis):
    """What the answers are when nothing flows to some words in some layers."""

    layers: tuple[int, ...] | None = None
    """Blocking is done in the first, and in the last, so many layers; each number is a setting of its own.
    Default: 5, as in the paper; of a model that has fewer layers, half of them."""
    edges: tuple[Edges, ...] = ("into",)
    """into: nothing flows to the words; from: nothing flows from them; to_last: nothing from them to the
    last token."""
    top_words: int = 5
    """Word loyalty compares so many of the most likely next words."""

    name: ClassVar[str] = "blocking"

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ConfigError("give the numbers of layers to block", key="layers")
        layers = self.layers or ()
        if any(n < 1 for n in layers) or len(set(layers)) < len(layers):
            raise ConfigError(f"must be at least 1, each once, are {list(layers)}", key="layers")
        if not self.edges or len(set(self.edges)) < len(self.edges):
            raise ConfigError(f"name at least one, and each once: {list(self.edges)}", key="edges")
        if self.top_words < 1:
            raise ConfigError(f"must be at least 1, is {self.top_words}", key="top_words")

    def check(self, study: Study) -> None:
        layers, words = study.config.num_layers, study.config.vocab_size
        blocked = self._layers(study)
        if self.layers is None and blocked != LAYERS:
            warnings.warn(
                f"blocking.layers: the model has {layers} layers, so {blocked[0]} in place of "
                f"{LAYERS[0]}, the default",
                UserNote,
                stacklevel=2,
            )
        if max(blocked) > layers:
            raise UserError(f"blocking.layers: the model has {layers} layers, not {max(blocked)}")
        if self.top_words > words:
            raise UserError(f"blocking.top_words: the vocabulary has {words} words, not {self.top_words}")
        if set(self.edges) != {"into"}:
            check_one_softmax(study.config, "blocking.edges: edges from words are cut")
            if study.mode == "released_code":
                raise UserError(
                    "blocking.edges: the released code blocks edges into words alone; use mode paper"
                )

    def _layers(self, study: Study) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        short = study.config.num_layers < max(LAYERS)
        return (max(1, study.config.num_layers // 2),) if short else LAYERS

    def settings(self, study: Study) -> list[tuple[Edges, Setting]]:
        """Those into words first."""
        edges = sorted(self.edges, key=lambda name: name != "into")
        return [(name, setting) for name in edges for setting in blocking_settings(self._layers(study))]

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        label_words = chunk.parts == Part.LABEL
        others = np.isin(chunk.parts, (Part.TEXT, Part.FORMAT, Part.FORERUNNER))
        others[:, 0] = False  # nothing flows to the first token anyway
        words = {"label": label_words, "random": random_words(rng, label_words, others)}
        # The first setting blocks nothing: what the others are set against, from the same program.
        nothing = Setting("label", "first", 0)
        into = [nothing, *(setting for edges, setting in self.settings(study) if edges == "into")]
        others_of = [(edges, setting) for edges, setting in self.settings(study) if edges != "into"]
        logits = self._into(study, chunk, into, words)
        if others_of:
            layers = study.config.num_layers
            made = [
                cut_of_words(words[s.words], chunk.positions, s.layer_mask(layers), edges)
                for edges, s in others_of
            ]
            classes, cut = (np.stack(x) for x in zip(*made, strict=True))
            found = cut_logits(study.params, chunk.batch, chunk.positions, classes, cut, study.config)
            logits = np.concatenate([logits, np.asarray(found)])
        predicted = label_predictions(logits, chunk.label_tokens)
        loyal = np.stack([word_loyalty(x, logits[0], self.top_words) for x in logits])
        return {"predicted": predicted.T.astype(np.int32), "word_loyalty": loyal.T, "label": chunk.labels}

    def _into(
        self, study: Study, chunk: Prompts, settings: list[Setting], words: dict[str, np.ndarray]
    ) -> np.ndarray:
        return np.asarray(
            blocked_logits(
                study.params,
                {name: jnp.asarray(value) for name, value in chunk.batch.items()},
                jnp.asarray(chunk.positions),
                jnp.asarray(np.stack([s.layer_mask(study.config.num_layers) for s in settings])),
                jnp.asarray(np.stack([words[s.words] for s in settings])),
                study.config,
                study.mode,
            )
        )

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        measures = {name: np.stack([_measure(seed, name) for seed in records.values()]) for name in MEASURES}
        plain = np.concatenate([seed["predicted"][:, 0] for seed in records.values()])
        alone = single_class(plain, study.source.label_names)
        rows = []
        for at, (edges, setting) in enumerate(self.settings(study), start=1):
            row: dict[str, Any] = {"words": setting.words, "where": setting.where, "layers": setting.layers}
            row["edges"] = edges
            for name, seeds in measures.items():
                row |= {name: mean(seeds[:, at]), f"{name}_std": deviation(seeds[:, at])}
            rows.append(row)
        return {
            "top_words": self.top_words,
            "undefined": ["accuracy", "label_loyalty"] if alone is not None else [],
            "single_class": alone,
            "accuracy": mean(measures["accuracy"][:, 0]),
            "table": rows,
        }


def _measure(seed: Records, name: str) -> np.ndarray:
    """Means over the prompts of a seed, for each setting; the first blocks nothing."""
    predicted = seed["predicted"]
    given = predicted >= 0  # what has no prediction counts nowhere
    match name:
        case "accuracy":
            return mean(np.where(given, predicted == seed["label"][:, None], np.nan))
        case "label_loyalty":
            return mean(np.where(given & given[:, :1], predicted == predicted[:, :1], np.nan))
        case _:
            return mean(seed[name])
