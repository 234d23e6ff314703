"""Error diagnosis: confusion told from the keys of label words, beside the real one (Wang et al. 2023,
section 3.3 and figure 6; claim I8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import ConfigError, UserError
from jaxlab.icl.analyses.answers import Answers
from jaxlab.icl.analyses.base import Analysis, Records, Study, deviation
from jaxlab.icl.cutting import check_one_softmax
from jaxlab.icl.diagnosis import (
    confusion_correlation,
    key_features,
    keys_by_label,
    predicted_confusion,
    queries_and_keys,
    real_confusion,
)
from jaxlab.icl.label_attention import label_places
from jaxlab.icl.prompts import Prompts

MOST_BYTES = 1 << 28
"""Of queries and keys that are read at once; more layers are read in turn."""


@dataclass(frozen=True)
class Diagnosis(Analysis[Prompts]):
    """Distances between the keys of label words along what varies most in the queries."""

    directions: int = 10
    """Principal directions of the queries."""
    layers: tuple[int, ...] = ()
    """Layers that are looked at, counted from 1; by default all."""
    layer: int = 0
    """The one whose confusion is shown; by default the one at two thirds of the depth, as in the released
    code."""

    name: ClassVar[str] = "diagnosis"

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ConfigError(f"must be at least 1, is {self.directions}", key="directions")
        if len(set(self.layers)) < len(self.layers) or any(n < 1 for n in self.layers):
            raise ConfigError(f"are counted from 1, each once, are {list(self.layers)}", key="layers")
        if self.layer < 0:
            raise ConfigError(f"is counted from 1, is {self.layer}", key="layer")

    def check(self, study: Study) -> None:
        check_one_softmax(study.config, "diagnosis: queries meet keys")
        layers = study.config.num_layers
        if any(n > layers for n in (*self.layers, self.layer)):
            raise UserError(
                f"diagnosis: the model has {layers} layers, not {max((*self.layers, self.layer))}"
            )
        if (shown := self._shown(study)) not in self._layers(study):
            told = "" if self.layer else ", the one at two thirds of the depth,"
            raise UserError(
                f"diagnosis.layer: {shown}{told} is none of diagnosis.layers, {list(self.layers)}; name one "
                "of them"
            )

    def chunks(self, study: Study, seed: int) -> Sequence[Prompts]:
        return study.source.fixed().batches(seed, study.examples, study.batch_size)

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        places, labels = label_places(chunk.label_words, chunk.demonstrations), chunk.label_tokens.shape[1]
        config, real = study.config, chunk.real
        of_layer = 4 * chunk.parts.size * config.key_dim * (config.num_heads + config.kv_heads)
        step = max(1, MOST_BYTES // of_layer)
        layers, queries, keys = self._layers(study), [], []
        for first in range(0, len(layers), step):
            some = tuple(layer - 1 for layer in layers[first : first + step])
            q, k = queries_and_keys(study.params, chunk.batch, config, chunk.positions, places.at, some)
            queries.append(np.asarray(q)[real])
            keys.append(keys_by_label(np.asarray(k), places, labels)[real])
        answers = Answers().measure(study, chunk, rng)
        return {
            "queries": np.concatenate(queries, axis=1),
            "keys": np.concatenate(keys, axis=1).sum(0, keepdims=True),
            "count": np.array([real.sum()]),
            "label_logits": answers["label_logits"][real],
            "label": chunk.labels[real],
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        layers = self._layers(study)
        predicted, real = [], []
        for seed in records.values():
            there = np.isfinite(seed["queries"]).all((1, 2)) & ~np.isnan(seed["label_logits"]).any(1)
            if not there.any() or not np.isfinite(seed["keys"]).all():
                raise UserError("diagnosis: queries or keys hold NaN or infinity in every prompt")
            keys = seed["keys"].sum(0) / seed["count"].sum()
            features = [
                key_features(seed["queries"][there, at], keys[at], self.directions)
                for at in range(len(layers))
            ]
            predicted.append([predicted_confusion(x) for x in features])
            real.append(real_confusion(seed["label_logits"][there], seed["label"][there]))
        told, found = np.array(predicted), np.array(real)
        each = [[confusion_correlation(p, r) for p in ps] for ps, r in zip(told, found, strict=True)]
        by = {name: np.array([[x[name] for x in seed] for seed in each]) for name in each[0][0]}
        at = layers.index(self._shown(study))
        pearson = by["pearson"][:, at]
        of_means = confusion_correlation(told[:, at].mean(0), found.mean(0))
        return {
            "directions": self.directions,
            "layers": list(layers),
            "layer": self._shown(study),
            "label_words": list(study.source.label_names),
            "predicted": told[:, at].mean(0),
            "real": found.mean(0),
            "correlation": of_means,
            "correlation_by_seed": pearson,
            "correlation_std": np.nan if np.isnan(of_means["pearson"]) else deviation(pearson),
            "undefined": ["correlation"] if len(study.source.label_names) < 3 else [],
            "pearson_by_layer": by["pearson"].mean(0),
            "spearman_by_layer": by["spearman"].mean(0),
        }

    def _layers(self, study: Study) -> tuple[int, ...]:
        return self.layers or tuple(range(1, study.config.num_layers + 1))

    def _shown(self, study: Study) -> int:
        layers = study.config.num_layers
        return self.layer or min(layers, 1 + round(2 * layers / 3))
