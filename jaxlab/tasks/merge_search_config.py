"""What `merge-search` is told: models, operators, data, and how points are chosen."""

import re
from dataclasses import dataclass, field
from typing import Literal

from jaxlab.data import DataConfig
from jaxlab.errors import ConfigError
from jaxlab.evaluation import QuestionsConfig
from jaxlab.merging import SearchMethod, Space, Way, check_way


@dataclass(frozen=True)
class Config:
    """Search for the weights, parameters and operators with which an expert's skill shows in a VLM."""

    vlm: str = ""
    """A model folder, a run folder, or the config of a finished train run."""
    expert: str = ""
    """A language model fine-tuned from the base."""
    base: str = ""
    """The language model that both come from."""
    method: SearchMethod = "grid"
    """How points are chosen where an entry of operators does not say it."""
    operators: dict[str, Space] = field(default_factory=lambda: {"task_arithmetic": Space()})
    """What is tried: by a name, which is the operator's unless the entry names one."""
    evaluations: int = 0
    """Of every entry that is no grid; 0: as many as the grids have points."""
    equal_points: bool = True
    """Refuse entries with different numbers of evaluations: one tried more often would look better by that
    alone."""
    evaluate: dict[str, DataConfig | QuestionsConfig] = field(default_factory=dict)
    """Data sets by name: of batches exact match of the answers is measured, of questions what they say."""
    choose: tuple[str, ...] = ()
    """Names of the data sets whose mean score on the validation split is the skill to be gained; none: all of
    them."""
    choose_by: tuple[Way, ...] = ("labels",)
    """How a point is chosen: by labels; without any by the entropy of its own answers, or by how little they
    change to the neighbours on the grid. All are reported, the first one decides."""
    keep: tuple[str, ...] = ()
    """Names of the data sets whose mean score is the skill to be kept: a front of gained and kept."""
    keep_at_least: float = 0.0
    """Choose by labels among the points that keep this share of what the VLM has of `keep`."""
    profile_on: str = ""
    """The data set of the expert's skill that its information flow is measured on, for `layers: flows`; by
    default the first one without images."""
    batch_size: int = 64
    """Sequences in a batch."""
    batches: int = 8
    """At most so many batches of each split; of questions all."""
    chunk: int = 8
    """Points done in one call of the compiled program, one after the other."""
    in_forward: bool = False
    """Merge each layer where it runs: no merged copy of the layers exists, and every batch merges anew."""
    embeddings: Literal["vlm", "merge_common_rows", "merge"] = "vlm"
    """Embedding and head: the VLM's; merged where the tokenizers agree; merged as far as all have rows."""
    differences: dict[str, Literal["vlm"]] = field(default_factory=dict)
    """Settings that may differ between the models, as in a recipe: {rope.theta: vlm}."""
    mode: Literal["paper", "mergekit"] = "paper"
    """Operators as published, or as mergekit computes them."""
    seed: int = 0
    """Of random masks, and of points that are drawn."""
    save: Literal["best", "each", "none"] = "best"
    """Which models are written: the best one as model/, or that of each entry below models/. The recipe of
    each is written in any case."""
    examples: int = 6
    """Questions, of the first data set that decides, which the VLM and the best model answer for people to
    read."""

    def __post_init__(self) -> None:
        for name in ("vlm", "expert", "base", "operators", "evaluate"):
            if not getattr(self, name):
                raise ConfigError(
                    "missing; a search needs the three models, operators and evaluate", key=name
                )
        for name in ("batch_size", "batches", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in ("examples", "evaluations"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        for key in ("choose", "keep", "profile_on"):
            given = getattr(self, key)
            for name in (given,) if isinstance(given, str) else given:
                if name and name not in self.evaluate:
                    raise ConfigError(f"no data set {name!r}; there are {', '.join(self.evaluate)}", key=key)
        if not self.choose_by:
            raise ConfigError("missing; labels, entropy or neighbours", key="choose_by")
        if not 0 <= self.keep_at_least <= 1:
            raise ConfigError(f"is a share, from 0 to 1, not {self.keep_at_least}", key="keep_at_least")
        if self.keep_at_least and not self.keep:
            raise ConfigError("which skill is to be kept? name its data sets", key="keep")
        for label, space in self.entries.items():
            if not re.fullmatch(r"\w[\w.+ -]*", label):
                raise ConfigError(
                    f"{label!r} names files, too; use letters, digits, _, -, + and .", key="operators"
                )
            try:
                space.check(self.mode)
                for way in self.choose_by:
                    check_way(way, space)
            except ConfigError as error:
                raise error.inside(("operators", label)) from None
            if space.method == "gradient" and not any(self._has_answers(name) for name in self.chosen_by):
                raise ConfigError(
                    f"{label} learns on right answers, and choose names questions that rules alone judge",
                    key="choose",
                )
            if space.layers == "flows" and not any(map(self._has_answers, self.evaluate)):
                raise ConfigError(
                    f"{label} needs a data set with right answers for its flows", key="evaluate"
                )
        for name in self.chosen_by if "neighbours" in self.choose_by else ():
            data = self.evaluate[name]
            if isinstance(data, QuestionsConfig) and data.measure == "perplexity":
                raise ConfigError(f"{name} has no answers that could differ", key="choose_by")
        self._check_effort()

    def _has_answers(self, name: str) -> bool:
        data = self.evaluate[name]
        return not isinstance(data, QuestionsConfig) or data.measure != "rules"

    def _check_effort(self) -> None:
        sizes = {label: self.evaluations_of(label) for label in self.entries}
        for label, size in sizes.items():
            if not size:
                raise ConfigError(
                    f"missing: how many points does {label} try? no grid tells it", key="evaluations"
                )
        if self.equal_points and len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                f"different numbers of evaluations ({listed}); make them equal, or set equal_points to false",
                key="operators",
            )

    @property
    def entries(self) -> dict[str, Space]:
        """What is tried, by name, each with operator and method."""
        return {label: space.named(label, self.method) for label, space in self.operators.items()}

    def evaluations_of(self, label: str) -> int:
        """How many evaluations an entry has; 0: nothing tells it."""
        space = self.entries[label]
        if space.method == "grid":
            return len(space.points())
        grids = {len(s.points()) for s in self.entries.values() if s.method == "grid"}
        return self.evaluations or (grids.pop() if len(grids) == 1 else 0)

    @property
    def token_sets(self) -> dict[str, DataConfig]:
        """The data sets that are batches of tokens."""
        return {n: data for n, data in self.evaluate.items() if not isinstance(data, QuestionsConfig)}

    @property
    def question_sets(self) -> dict[str, QuestionsConfig]:
        """The others."""
        return {n: data for n, data in self.evaluate.items() if isinstance(data, QuestionsConfig)}

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """The data sets that decide."""
        return self.choose or tuple(self.evaluate)
