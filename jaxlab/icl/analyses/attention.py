"""Attention to label words: how well it predicts the model's own answer, by layer (Wang et al. 2023, section
2.3 and figure 5; claim I5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.icl.analyses.answers import single_class
from jaxlab.icl.analyses.base import PromptAnalysis, Records, Study, deviation, mean
from jaxlab.icl.blocking import label_predictions
from jaxlab.icl.cutting import check_one_softmax
from jaxlab.icl.label_attention import accumulated, attention_at, attention_by_label, aucroc, label_places
from jaxlab.icl.prompts import Prompts


@dataclass(frozen=True)
class Attention(PromptAnalysis):
    """AUCROC_l and R_l of the attention from the last token to the label words."""

    name: ClassVar[str] = "attention"

    def check(self, study: Study) -> None:
        check_one_softmax(study.config, "attention: weights are read")

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        places = label_places(chunk.label_words, chunk.demonstrations)
        logits, weights = attention_at(study.params, chunk.batch, study.config, chunk.positions, places.at)
        scores = attention_by_label(np.asarray(weights), places, chunk.label_tokens.shape[1])
        predicted = label_predictions(np.asarray(logits, np.float32), chunk.label_tokens)
        demonstrations = (places.share.sum(1) / scores.shape[2]).astype(np.float32)
        return {
            "scores": scores.astype(np.float32),
            "predicted": predicted.astype(np.int32),
            "shots": demonstrations,
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        by_seed = np.stack(
            [
                aucroc(
                    seed["scores"],
                    seed["predicted"],
                    study.mode,
                    one_demonstration=bool((seed["shots"] == 1).all()),
                )
                for seed in records.values()
            ]
        )
        defined = ~np.isnan(by_seed).any(1)
        predicted = np.concatenate([seed["predicted"] for seed in records.values()])
        found: dict[str, Any] = {
            "aucroc_by_seed": by_seed,
            "seeds_defined": int(defined.sum()),
            "undefined": [] if defined.any() else ["aucroc"],
            "single_class": single_class(predicted, study.source.label_names),
            "mean_attention": mean(np.stack([_mean_scores(seed["scores"]) for seed in records.values()])),
        }
        if defined.any():
            shown = by_seed[defined]
            found |= {
                "aucroc": shown.mean(0),
                "aucroc_std": deviation(shown),
                "r": accumulated(shown.mean(0)),
            }
        return found


def _mean_scores(scores: np.ndarray) -> np.ndarray:
    """[L], over the prompts without NaN and all labels."""
    there = ~np.isnan(scores).any((1, 2))
    return np.asarray(scores[there].mean((0, 2)) if there.any() else np.full(scores.shape[1], np.nan))
