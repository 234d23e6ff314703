"""Many-shot curves: flows and accuracy by the number of demonstrations, on the same queries."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import ConfigError
from jaxlab.icl.analyses.answers import Answers, accuracy, single_class
from jaxlab.icl.analyses.base import Analysis, Records, Study, deviation, finite_prompts, mean
from jaxlab.icl.analyses.flow_shares import FlowShares
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.saliency import flow_shares, flows


@dataclass(frozen=True)
class ManyShot(Analysis[tuple[int, Prompts]]):
    """S_wp, S_pq and S_ww by layer after other numbers of demonstrations of each class."""

    shots: tuple[int, ...] = (1, 2, 4, 8)
    """Demonstrations of each class."""
    batches: int = 1
    """Batches of each seed whose flows are looked at."""

    name: ClassVar[str] = "many_shot"
    needs_demonstrations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.shots or any(n < 1 for n in self.shots) or len(set(self.shots)) < len(self.shots):
            raise ConfigError(f"needs numbers of at least 1, each once, is {list(self.shots)}", key="shots")
        if self.batches < 1:
            raise ConfigError(f"must be at least 1, is {self.batches}", key="batches")

    def check(self, study: Study) -> None:
        for seed in study.seeds:
            self.chunks(study, seed)

    def chunks(self, study: Study, seed: int) -> Sequence[tuple[int, Prompts]]:
        count = self.batches * study.batch_size
        sources = [(shots, study.source.with_shots(shots)) for shots in self.shots]
        return [
            (shots, chunk)
            for shots, source in sources
            for chunk in source.batches(seed, min(study.examples, count), study.batch_size)
        ]

    def memory(self, study: Study) -> int:
        """That of the flows of the longest prompts."""
        largest = study.source.with_shots(max(self.shots))
        return FlowShares().memory(dataclasses.replace(study, source=largest))

    def measure(self, study: Study, chunk: tuple[int, Prompts], rng: np.random.Generator) -> Records:
        shots, prompts = chunk
        roles, real = study.source.with_shots(shots).roles, prompts.real
        sums, counts = flows(
            study.params,
            prompts.batch,
            study.config,
            prompts.classes,
            prompts.targets,
            num_classes=roles.classes,
            not_finite="mark",
        )
        means, _ = flow_shares(np.asarray(sums), np.asarray(counts), roles)
        answers = Answers().measure(study, prompts, rng)
        return {
            "means": np.stack([means[name] for name in roles.shared], axis=1)[real],
            "predicted": answers["predicted"][real],
            "label": prompts.labels[real],
            "tokens": prompts.lengths[real],
            "shots": np.full(int(real.sum()), shots),
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        table = []
        finite, left_out = finite_prompts(records, "means")
        for shots in self.shots:
            chosen = [
                {name: values[seed["shots"] == shots] for name, values in seed.items()}
                for seed in finite.values()
            ]
            means = np.stack([one["means"].mean(0) for one in chosen])
            share = means / np.maximum(means.sum(1, keepdims=True), np.finfo(np.float64).tiny)
            by_seed = np.array([accuracy(one["predicted"], one["label"]) for one in chosen])
            predicted = np.concatenate([one["predicted"] for one in chosen])
            names = study.source.roles.shared
            table.append(
                {
                    "shots": shots,
                    "tokens": float(np.mean([one["tokens"].mean() for one in chosen])),
                    "accuracy": mean(by_seed),
                    "accuracy_std": deviation(by_seed),
                    "single_class": single_class(predicted, study.source.label_names),
                    "share": {name: share[:, at].mean(0) for at, name in enumerate(names)},
                    "mean": {name: means[:, at].mean(0) for at, name in enumerate(names)},
                }
            )
        return {"table": table, "prompts": len(predicted), "left_out": left_out}
