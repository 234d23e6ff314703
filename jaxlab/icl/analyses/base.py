"""What an analysis of in-context learning is, and what it works on. README.md beside this file tells how one
is added."""

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from jaxlab.errors import UserError
from jaxlab.icl.few_shot import Mode
from jaxlab.icl.prompts import Prompts, PromptSource
from jaxlab.icl.saliency import Loss
from jaxlab.models import ModelConfig, Params

Records = dict[str, np.ndarray]
"""What was measured: arrays whose first axis counts prompts."""


@dataclass(frozen=True)
class Study:
    """A model, its parameters, and the prompts that all analyses of a run look at."""

    config: ModelConfig
    params: Params
    """Arrays; for `check` and `memory` their shapes, dtypes and shardings."""
    source: PromptSource
    seeds: tuple[int, ...]
    examples: int
    """Prompts of a seed, at most."""
    batch_size: int
    mode: Mode
    tokenizer: Tokenizer | None
    """The model's; None: it reads bytes."""

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The padded lengths of its batches: each is a program of its own."""
        batches = (self.source.batches(seed, self.examples, self.batch_size) for seed in self.seeds)
        return tuple(sorted({chunk.parts.shape[1] for chunks in batches for chunk in chunks}))

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def loss(self) -> Loss:
        """What flows are of: the cross-entropy among the label words, or where there are none, over the
        vocabulary."""
        return "labels" if self.source.label_names else "vocabulary"

    @property
    def chance(self) -> float:
        """Of guessing: among the label words, or among all words where the answers are open."""
        return 1.0 / (len(self.source.label_names) or self.config.vocab_size)


class Analysis[Chunk](abc.ABC):
    """One analysis: a frozen dataclass whose fields are its options in the config.

    The run calls `chunks` for each seed, `measure` for each chunk, keeps what it returns on disk, so that a
    run that was stopped goes on behind the last chunk, and at the end `summarize`.
    """

    name: ClassVar[str]
    """Of the analysis in `analyses`, of its group in the config, and of its part of the results."""

    needs_label_words: ClassVar[bool] = True
    """Whether it says nothing of prompts without label words, as those with images are."""

    needs_demonstrations: ClassVar[bool] = True
    """Whether it looks at the demonstrations of the run's own prompts, and not of others that it makes."""

    def check(self, study: Study) -> None:  # noqa: B027
        """Checks what can be known before parameters are read.

        Raises:
          UserError: the model or the prompts do not allow this analysis.
        """

    def memory(self, study: Study) -> int:
        """Bytes of temporaries on one device, from compiling alone; 0: less than a forward pass takes."""
        return 0

    @abc.abstractmethod
    def chunks(self, study: Study, seed: int) -> Sequence[Chunk]:
        """The work of one seed in parts, each of seconds to minutes; a pure function of its arguments."""

    @abc.abstractmethod
    def measure(self, study: Study, chunk: Chunk, rng: np.random.Generator) -> Records:
        """The records of one chunk.

        Args:
          rng: of this seed and chunk alone, so that a resumed run draws the same.
        """

    def measure_after(
        self,
        study: Study,
        seed: int,
        chunk: Chunk,
        rng: np.random.Generator,
        earlier: Mapping[int, Sequence[Records]],
    ) -> Records:
        """As `measure`, which it calls; an analysis that needs what earlier chunks found has it in its place.

        Args:
          earlier: the records of each chunk of this seed and of those before it.
        """
        return self.measure(study, chunk, rng)

    @abc.abstractmethod
    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        """The part of the results, small and in JSON's types or arrays, from the records of each seed."""


class PromptAnalysis(Analysis[Prompts]):
    """An analysis that looks at the prompts of the run, batch after batch.

    `measure` returns one row for each row of the batch. Rows that only fill a batch up are dropped, and the
    records of a seed come in the order of its prompts, with `row` as their numbers.
    """

    def chunks(self, study: Study, seed: int) -> Sequence[Prompts]:
        return study.source.batches(seed, study.examples, study.batch_size)


def deviation(by_seed: np.ndarray) -> np.ndarray:
    """Standard deviation of a sample along the first axis; 0 for one seed, which has none to tell. Seeds that
    are NaN count nowhere; NaN where all are."""
    count = (~np.isnan(by_seed)).sum(0)
    if (count == len(by_seed)).all():
        spread = by_seed.std(0, ddof=1) if len(by_seed) > 1 else np.zeros_like(by_seed[0])
        return np.asarray(spread)
    off = by_seed - mean(by_seed)
    spread = np.sqrt(np.nansum(off * off, axis=0) / np.maximum(count - 1, 1))
    return np.asarray(np.where(count > 0, spread, np.nan))


def mean(values: np.ndarray) -> np.ndarray:
    """The mean along the first axis of what is not NaN; NaN where all is."""
    there = ~np.isnan(values)
    if there.all() and len(values):
        return np.asarray(values.mean(0))
    total, count = np.where(there, values, 0.0).sum(0), there.sum(0)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def finite_prompts(records: Mapping[int, Records], *names: str) -> tuple[dict[int, Records], int]:
    """The records without the prompts that have NaN or infinity in one of `names`, and how many those are.
    Every record has a row for each prompt.

    Raises:
      UserError: a seed has no prompt without.
    """
    found, left_out = {}, 0
    for seed, one in records.items():
        there = np.ones(len(one[names[0]]), bool)
        for name in names:
            there &= np.isfinite(one[name]).reshape(len(there), -1).all(1)
        if not there.any():
            raise UserError(f"the flows of all {len(there)} prompts of seed {seed} hold NaN or infinity")
        found[seed] = {name: x[there] for name, x in one.items()}
        left_out += int((~there).sum())
    return found, left_out


def over_seeds(records: Mapping[int, Records], name: str) -> np.ndarray:
    """Means over the prompts of each seed [seeds, ...]; what is NaN counts nowhere."""
    with np.errstate(invalid="ignore"):
        return np.stack([np.nanmean(seed[name].astype(np.float64), axis=0) for seed in records.values()])
