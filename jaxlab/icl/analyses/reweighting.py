"""Anchor re-weighting beside plain in-context learning (Wang et al. 2023, section 3.1 and table 1; claim
I6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import ConfigError
from jaxlab.icl.analyses.answers import Answers, accuracy, single_class
from jaxlab.icl.analyses.base import Analysis, Records, Study, deviation, mean
from jaxlab.icl.blocking import label_predictions
from jaxlab.icl.cutting import check_one_softmax
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.reweighting import (
    Lesson,
    LessonLoss,
    learn_anchor_weights,
    learning_memory,
    reweighted_logits,
)


@dataclass(frozen=True)
class Reweighting(Analysis[tuple[str, int, Any]]):
    """Factors on the attention to label words, learned from a few examples, on the same queries as without
    them and as with more demonstrations."""

    shots: int = 1
    """Demonstrations of each class beside the factors."""
    baseline_shots: tuple[int, ...] = (1, 5)
    """Demonstrations of each class of the prompts that it is set against."""
    train_per_class: int = 4
    """Examples of each class to learn from."""
    epochs: int = 10
    """Passes over them, one prompt a step."""
    learning_rate: float | None = None
    """Of Adam; by default 0.01, and in mode released_code 0.1."""
    loss: LessonLoss = "labels"
    """Cross-entropy among the label words, or over the whole vocabulary."""

    name: ClassVar[str] = "reweighting"
    needs_demonstrations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("shots", "train_per_class", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        baselines = self.baseline_shots
        if any(n < 0 for n in baselines) or len(set(baselines)) < len(baselines):
            raise ConfigError(
                f"are numbers of at least 0, each once, are {list(baselines)}", key="baseline_shots"
            )
        if self.learning_rate is not None and self.learning_rate <= 0.0:
            raise ConfigError(f"must be above 0, is {self.learning_rate}", key="learning_rate")

    def check(self, study: Study) -> None:
        check_one_softmax(study.config, "reweighting: weights are multiplied")
        for seed in study.seeds:
            self._source(study, self.shots).lessons(seed, self.train_per_class)
            for shots in self.baseline_shots:
                self._source(study, shots)

    def memory(self, study: Study) -> int:
        """Of the prompts to learn from, as long as the longest of the run."""
        labels = len(study.source.label_names)
        lessons = labels * self.train_per_class
        return learning_memory(study.params, study.config, len(study.seeds), lessons, study.longest, labels)

    def chunks(self, study: Study, seed: int) -> Sequence[tuple[str, int, Any]]:
        """The first seed's first chunk learns the factors of all seeds at once."""
        found: list[tuple[str, int, Any]] = []
        if seed == study.seeds[0]:
            found.append(("learn", self.shots, None))
        for shots in self.baseline_shots:
            found += [("plain", shots, chunk) for chunk in self._batches(study, shots, seed)]
        return found + [("reweighted", self.shots, chunk) for chunk in self._batches(study, self.shots, seed)]

    def measure(self, study: Study, chunk: tuple[str, int, Any], rng: np.random.Generator) -> Records:
        raise AssertionError("what is learned is needed: measure_after")

    def measure_after(
        self,
        study: Study,
        seed: int,
        chunk: tuple[str, int, Any],
        rng: np.random.Generator,
        earlier: Mapping[int, Sequence[Records]],
    ) -> Records:
        setting, shots, prompts = chunk
        if setting == "learn":
            beta, losses = self._learn(study)
            return {**self._nothing(study), "beta": beta[None], "losses": losses[None]}
        if setting == "plain":
            predicted = Answers().measure(study, prompts, rng)["predicted"]
        else:
            beta = earlier[study.seeds[0]][0]["beta"][0, study.seeds.index(seed)]
            logits = reweighted_logits(
                study.params,
                prompts.batch,
                study.config,
                prompts.positions,
                prompts.label_words,
                beta,
                prompts.starts,
            )
            predicted = label_predictions(np.asarray(logits, np.float32), prompts.label_tokens)
        count = int(prompts.real.sum())
        return {
            **self._nothing(study),
            "predicted": predicted[prompts.real].astype(np.int32),
            "label": prompts.labels[prompts.real],
            "shots": np.full(count, shots, np.int32),
            "reweighted": np.full(count, setting == "reweighted"),
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        first = records[study.seeds[0]]
        settings = [(shots, False) for shots in self.baseline_shots] + [(self.shots, True)]
        table = []
        for shots, reweighted in settings:
            chosen = [(s["shots"] == shots) & (s["reweighted"] == reweighted) for s in records.values()]
            pairs = [
                (s["predicted"][c], s["label"][c]) for s, c in zip(records.values(), chosen, strict=True)
            ]
            by_seed = [accuracy(predicted, label) for predicted, label in pairs]
            table.append(
                {
                    "shots": shots,
                    "reweighted": reweighted,
                    "accuracy": float(mean(np.array(by_seed))),
                    "accuracy_std": deviation(np.array(by_seed)),
                    "accuracy_by_seed": by_seed,
                    "single_class": single_class(
                        np.concatenate([predicted for predicted, _ in pairs]), study.source.label_names
                    ),
                }
            )
        beta = first["beta"][0]
        return {
            "learning_rate": self._rate(study),
            "epochs": self.epochs,
            "train_per_class": self.train_per_class,
            "loss": first["losses"][0].mean(1),
            "beta_by_layer": beta.mean((0, 2, 3)),
            "beta_size_by_layer": np.abs(beta).mean((0, 2, 3)),
            "beta_by_label": beta.mean((0, 1, 2)),
            "table": table,
        }

    def _learn(self, study: Study) -> tuple[np.ndarray, np.ndarray]:
        source = self._source(study, self.shots)
        lessons = [source.lessons(seed, self.train_per_class) for seed in study.seeds]
        width = max(lesson.parts.shape[1] for lesson in lessons)

        def of_tokens(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
            pads = [((0, 0), (0, width - x.shape[1])) for x in rows]
            return np.stack([np.pad(x, p, constant_values=fill) for x, p in zip(rows, pads, strict=True)])

        lesson = Lesson(
            of_tokens([one.batch["tokens"] for one in lessons], 0),
            np.stack([one.positions for one in lessons]),
            of_tokens([one.label_words for one in lessons], -1),
            np.stack([one.label_tokens for one in lessons]),
            np.stack([one.labels for one in lessons]),
        )
        return learn_anchor_weights(
            study.params,
            study.config,
            lesson,
            study.seeds,
            epochs=self.epochs,
            learning_rate=self._rate(study),
            loss=self.loss,
        )

    def _rate(self, study: Study) -> float:
        default = 0.01 if study.mode == "paper" else 0.1
        return default if self.learning_rate is None else self.learning_rate

    def _source(self, study: Study, shots: int) -> Any:
        return study.source.fixed().with_shots(shots)

    def _batches(self, study: Study, shots: int, seed: int) -> Sequence[Prompts]:
        return self._source(study, shots).batches(seed, study.examples, study.batch_size)

    def _nothing(self, study: Study) -> Records:
        """Every record of no prompt."""
        config, seeds = study.config, len(study.seeds)
        shape = (0, seeds, config.num_layers, config.num_heads, len(study.source.label_names))
        none = np.zeros(0, np.int32)
        return {
            "predicted": none,
            "label": none,
            "shots": none,
            "reweighted": np.zeros(0, bool),
            "beta": np.zeros(shape, np.float32),
            "losses": np.zeros((0, self.epochs, seeds)),
        }
