"""No float field of any task takes a NaN or an infinity, and no seed what no generator takes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxlab import config as configs
from jaxlab.config import ABSENT, KIND, fields_of, groups, kind_of, members
from jaxlab.errors import ConfigError
from jaxlab.tasks import TASKS

SOME = {int: 2, float: 1.0, str: "x", bool: True}


def filled(group: type, kind: str | None) -> dict[str, Any]:
    """What a group cannot do without."""
    needed = {f.key: f.type for f in fields_of(group).values() if f.default is ABSENT and not f.others}
    made = {key: SOME[members(type_)[0]] for key, type_ in needed.items() if members(type_)[0] in SOME}
    return made if kind is None else {**made, KIND: kind}


def bad_trees(
    cls: type, value: float, wanted: Callable[[Any], bool], whole: dict[str, Any], here: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """`whole` with `value` at each wanted field at or below `here`, a node of it for `cls`, in turn."""
    for field in fields_of(cls).values():
        if field.others:
            continue
        before = here.get(field.key, ABSENT)
        if wanted(field):
            here[field.key] = value
            yield whole
        for group in groups(field.type):
            here[field.key] = filled(group, kind_of(group))
            yield from bad_trees(group, value, wanted, whole, here[field.key])
        here.pop(field.key, None)
        if before is not ABSENT:
            here[field.key] = before


@pytest.mark.parametrize("task", [task.name for task in TASKS])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_every_float_field_is_finite(task: str, value: float) -> None:
    schema = TASKS.find(task).schema()
    tree = filled(schema, None)
    tried = 0
    for bad in bad_trees(schema, value, lambda field: float in members(field.type), tree, tree):
        with pytest.raises(ConfigError, match="must be a finite number"):
            configs.build(schema, bad)
        tried += 1
    assert tried >= {"train": 40, "evaluate": 5, "generate": 4, "icl": 3, "merge-search": 1}.get(task, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_every_seed_has_bounds(seed: int) -> None:
    tried = []
    for task in TASKS:
        schema = TASKS.find(task.name).schema()
        tree = filled(schema, None)
        for bad in bad_trees(schema, seed, lambda field: field.name == "seed", tree, tree):
            with pytest.raises(ConfigError, match=f"seed: must be from 0 to 4294967295, is {seed}"):
                configs.build(schema, bad)
            tried.append(task.name)
    assert {"train", "generate", "merge-search"} <= set(tried)
