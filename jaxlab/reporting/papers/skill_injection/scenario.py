"""What the searches of one expert say: one run, or one for each of several seeds."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxlab.reporting.folders import RunFolder, at
from jaxlab.reporting.formats import Number, mean
from jaxlab.reporting.papers.skill_injection.rules import Transfer

KINDS = {
    "M1": ("format", "instruction"),
    "M2": ("french", "spanish", "german", "language", "cross"),
    "M3": ("arithmetic", "math"),
}
"""Which claim a scenario speaks about, by words in the names of its data set and its expert."""

NAMES = {
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_linear": "DARE",
    "dare_ties": "DARE + TIES",
    "slerp": "SLERP",
}

SKILLS = {"M1": "instruction following", "M2": "cross-lingual", "M3": "mathematical reasoning"}

_EXPERTS = frozenset(word for words in KINDS.values() for word in words)


def scenarios_of(searches: Sequence[RunFolder]) -> list["Scenario"]:
    """The scenarios of some searches, in order: runs of one config with experts of one name are its seeds."""
    groups: dict[tuple[str, str], list[RunFolder]] = {}
    for run in searches:
        groups.setdefault((run.label, scenario_name(run)), []).append(run)
    found = [Scenario(runs) for runs in groups.values()]
    for one in found:  # those of one name are told apart by their configs
        if sum(other.expert == one.expert for other in found) > 1:
            one.name = f"{one.expert}, {one.run.label}"
    return found


class Scenario:
    """One scenario as this part reads it: which data set is the target, which show what the sources can do.

    The target is the first data set on images by which points were chosen; the donor's own skill is measured
    on the data set of text whose name shares most words with the target's, the receiver's own on the data
    sets that it was to keep, else on those on images that are no expert's. Of several seeds all numbers are
    means.
    """

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        self.runs, self.run = list(runs), runs[0]
        run = self.run
        self.operators: dict[str, Any] = run.get("operators") or {}
        measured = list(run.get("unmerged", "vlm", "test") or {})
        texts = list(run.get("unmerged", "expert", "test") or {})
        images = [name for name in measured if name not in texts]
        chosen = [name for name in run.get("chosen_by") or [] if name in images]
        self.target: str | None = next(iter(chosen or images or measured), None)
        wanted = _words(self.target or "")
        self.donor_set = max(texts, key=lambda name: len(wanted & _words(name)), default=None)
        self.own_sets = run.get("kept_by") or [
            name for name in images if name != self.target and not _words(name) & _EXPERTS
        ]
        self.expert = self.name = scenario_name(run)

    def points(self) -> list[dict[str, Any]]:
        """Every point of every seed."""
        return [
            point
            for run in self.runs
            for operator in (run.get("operators") or {}).values()
            for point in operator.get("points", [])
        ]

    def tried(self) -> list[Number]:
        """The target's score on the validation split at every setting."""
        return [v for p in self.points() if (v := at(p, "validation", str(self.target))) is not None]

    @property
    def best(self) -> tuple[str, dict[str, Any]] | None:
        """The entry and the point with the highest score on the validation split, of the first seed; the
        first of equals."""
        return best_of(self.run)

    def alone(self) -> Number | None:
        """Of the VLM without injection."""
        return self._mean(lambda run: run.get("unmerged", "vlm", "test", str(self.target)))

    def donor(self) -> Number | None:
        """Of the expert on its own modality."""
        return self._mean(lambda run: run.get("unmerged", "expert", "test", str(self.donor_set)))

    def own(self, measured: Any) -> float | None:
        """The mean over the receiver's own data sets in a dict of measures."""
        values = [v for name in self.own_sets if (v := at(measured, name)) is not None]
        return mean(values)

    def kept(self, operator: str) -> Number | None:
        """The receiver's own skill at an entry's chosen point."""
        return self._mean(lambda run: self.own(run.get("operators", operator, "best", "test")))

    def each_reached(self, operator: str) -> list[Number]:
        """The target's score on the test split at an entry's chosen point, by seed."""
        found = [run.get("operators", operator, "best", "test", str(self.target)) for run in self.runs]
        return [value for value in found if value is not None]

    def reached(self, operator: str) -> Number | None:
        """Their mean."""
        values = self.each_reached(operator)
        return mean(values) if len(values) == len(self.runs) else None

    def transfer(self) -> Transfer | None:
        """What the rules of claims M1 to M3 look at."""
        tested = lambda run: None if (best := best_of(run)) is None else best[1].get("test")
        values = (
            self.alone(),
            self._mean(lambda run: at(tested(run), str(self.target))),
            self.donor(),
            self._mean(lambda run: self.own(run.get("unmerged", "vlm", "test"))),
            self._mean(lambda run: self.own(tested(run))),
        )
        return None if any(v is None for v in values) else Transfer(self.name, *values)  # type: ignore[arg-type]

    def speaks_about(self, claim: str) -> bool:
        """Whether a claim is about this kind of skill."""
        return bool(_words(f"{self.name} {self.run.label} {self.target}") & set(KINDS[claim]))

    def _mean(self, of_run: Callable[[RunFolder], Number | None]) -> Number | None:
        """None where a seed has none."""
        values = [value for run in self.runs if (value := of_run(run)) is not None]
        return mean(values) if len(values) == len(self.runs) else None


def best_of(run: RunFolder) -> tuple[str, dict[str, Any]] | None:
    """The entry of a search whose chosen point has the highest score on the validation split."""
    ranked = [(name, o["best"]) for name, o in (run.get("operators") or {}).items() if o.get("best")]
    return max(ranked, key=lambda pair: pair[1].get("score", 0.0), default=None)


def scenario_name(run: RunFolder) -> str:
    """The expert's label without the words that every expert shares."""
    parts = [
        part for part in re.split(r"[/\\]", str(run.setting("expert") or "")) if part not in ("", "model")
    ]
    label = re.sub(r"(-[0-9a-f]{8})$|\.ya?ml$", "", parts[-1]) if parts else run.label
    return re.sub(r"^(digits_)?(expert_)?", "", label).replace("_", " ")


def operator_name(name: str) -> str:
    """An entry's name as people read it."""
    return NAMES.get(name, name.replace("_", " "))


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower())) - {""}
