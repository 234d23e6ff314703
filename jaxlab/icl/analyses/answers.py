"""What the model answers: accuracy, confusion, and whether it gives more than one answer at all."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.icl.analyses.base import PromptAnalysis, Records, Study, deviation, mean
from jaxlab.icl.blocking import label_predictions
from jaxlab.icl.compression import continued_logits, read_shared
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.saliency import target_logits
from jaxlab.models import Batch, ModelConfig, Params


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, batch: Batch, positions: Array, config: ModelConfig) -> Float[Array, "B V"]:
    return target_logits(params, batch, config, positions)


@jax.jit
def label_logits(
    logits: Float[Array, "B V"], label_tokens: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Float[Array, " B"], Int[Array, " B"]]:
    """Logits of the label words at q; the log of the sum over the vocabulary, which is NaN if one is; and the
    likeliest word."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, label_tokens, axis=1)
    return chosen, jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)


@dataclass(frozen=True)
class Answers(PromptAnalysis):
    """The answers with all demonstrations. Every run has it: others set against it what they find.

    Without label words an answer is right where the likeliest word is its first token.
    """

    name: ClassVar[str] = "answers"
    needs_label_words: ClassVar[bool] = False
    needs_demonstrations: ClassVar[bool] = False

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        positions, label = (x if x.ndim == 1 else x[:, 0] for x in (chunk.positions, chunk.labels))
        found = label_logits(_answer_logits(study, chunk, positions), chunk.label_tokens)
        logits, total = np.asarray(found[0], np.float32), np.asarray(found[1], np.float32)
        if study.source.label_names:
            broken = np.isnan(total)[:, None]
            predicted = label_predictions(np.where(broken, np.nan, logits), _indices(chunk))
        else:
            right = np.asarray(found[2]) == chunk.label_tokens[np.arange(len(label)), label]
            predicted = np.where(np.isnan(total), -1, np.where(right, label, chunk.label_tokens.shape[1]))
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            mass = np.exp(np.logaddexp.reduce(logits, axis=1) - total)
        return {
            "label_logits": logits,
            "label_mass": mass,
            "likeliest": np.asarray(found[2], np.int32),
            "predicted": predicted.astype(np.int32),
            "label": label,
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        names = study.source.label_names
        of_seed = [accuracy(seed["predicted"], seed["label"]) for seed in records.values()]
        predicted = np.concatenate([seed["predicted"] for seed in records.values()])
        label = np.concatenate([seed["label"] for seed in records.values()])
        given = predicted >= 0
        mass = np.concatenate([seed["label_mass"] for seed in records.values()])
        return {
            "accuracy": float(mean(np.array(of_seed))),
            "accuracy_std": deviation(np.array(of_seed)),
            "accuracy_by_seed": of_seed,
            "label_words": list(names),
            "confusion": _confusion(label[given], predicted[given], len(names)) if names else None,
            "no_prediction": int((~given).sum()),
            "label_mass": float(np.nanmean(mass)) if np.isfinite(mass).any() else None,
            "single_class": single_class(predicted, names),
        }


def _answer_logits(study: Study, chunk: Prompts, positions: np.ndarray) -> Float[Array, "B V"]:
    """At `positions`; demonstrations that all prompts have in common are read once."""
    shared = None
    if set(chunk.batch) == {"tokens"}:
        shared = read_shared(
            study.params, chunk.batch["tokens"], chunk.starts, np.asarray(positions), study.config
        )
    if shared is None:
        return _logits(study.params, chunk.batch, positions, study.config)
    return continued_logits(study.params, *shared, study.config)


def _confusion(label: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """How often each label, a row, was answered by each."""
    found = np.zeros((count, count), np.int64)
    np.add.at(found, (label, predicted), 1)
    return found


def accuracy(predicted: np.ndarray, label: np.ndarray) -> float:
    """The share of right answers among those given: an answer over NaN is none. NaN where none is given."""
    given = predicted >= 0
    return float(np.mean(predicted[given] == label[given])) if given.any() else float("nan")


def single_class(predicted: np.ndarray, names: tuple[str, ...]) -> str | None:
    """The one label that is ever predicted, if it is one: then accuracy, label loyalty and AUCROC say nothing
    of the model."""
    found = np.unique(predicted[predicted >= 0])
    return names[int(found[0])] if len(found) == 1 and names else None


def _indices(prompts: Prompts) -> np.ndarray:
    return np.broadcast_to(np.arange(prompts.label_tokens.shape[1]), prompts.label_tokens.shape)
