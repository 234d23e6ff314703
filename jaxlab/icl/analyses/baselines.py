"""Accuracy with other numbers of demonstrations, none among them (the baselines of Wang et al. 2023, table
1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import ConfigError
from jaxlab.icl.analyses.answers import Answers, accuracy, single_class
from jaxlab.icl.analyses.base import Analysis, Records, Study, deviation, mean
from jaxlab.icl.prompts import Prompts


@dataclass(frozen=True)
class Baselines(Analysis[tuple[int, Prompts]]):
    """The same queries after 0, 1, 5 ... demonstrations of each class."""

    shots: tuple[int, ...] = (0, 1, 5)
    """Demonstrations of each class; 0: without learning in context."""

    name: ClassVar[str] = "baselines"
    needs_demonstrations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.shots or any(n < 0 for n in self.shots) or len(set(self.shots)) < len(self.shots):
            raise ConfigError(f"needs numbers of at least 0, each once, is {list(self.shots)}", key="shots")

    def check(self, study: Study) -> None:
        for seed in study.seeds:
            self.chunks(study, seed)

    def chunks(self, study: Study, seed: int) -> Sequence[tuple[int, Prompts]]:
        sources = [(shots, study.source.with_shots(shots)) for shots in self.shots]
        return [
            (shots, chunk)
            for shots, source in sources
            for chunk in source.batches(seed, study.examples, study.batch_size)
        ]

    def measure(self, study: Study, chunk: tuple[int, Prompts], rng: np.random.Generator) -> Records:
        shots, prompts = chunk
        found = Answers().measure(study, prompts, rng)
        kept = {name: found[name][prompts.real] for name in ("predicted", "label")}
        return {**kept, "shots": np.full(int(prompts.real.sum()), shots), "row": prompts.rows[prompts.real]}

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        table = []
        for shots in self.shots:
            chosen = [
                {name: values[seed["shots"] == shots] for name, values in seed.items()}
                for seed in records.values()
            ]
            by_seed = [accuracy(one["predicted"], one["label"]) for one in chosen]
            predicted = np.concatenate([one["predicted"] for one in chosen])
            table.append(
                {
                    "shots": shots,
                    "accuracy": float(mean(np.array(by_seed))),
                    "accuracy_std": deviation(np.array(by_seed)),
                    "accuracy_by_seed": by_seed,
                    "no_prediction": int((predicted < 0).sum()),
                    "single_class": single_class(predicted, study.source.label_names),
                }
            )
        return {"table": table}
