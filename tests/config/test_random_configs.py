"""Thousands of random configs: each is valid, or a ConfigError of one line; nothing else may happen."""

import inspect
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlab import config as configs
from jaxlab.config import yaml_text
from jaxlab.config.command_line import from_mapping
from jaxlab.config.schema import (
    ABSENT,
    KIND,
    fields_of,
    groups,
    inner_fields,
    is_config,
    leaves,
    members,
    variants,
)
from jaxlab.errors import ConfigError
from tests.config.examples import Attention, Cosine, Example

SOME = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
AT_LENGTH = settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])

SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text()
    | st.sampled_from(["null", "None", "~", "true", "no", "1", "1e-3", ".inf", "[1]", "--x", "#", ": "]),
    types.NoneType: st.none(),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Plain values that a field of type `kind` takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if variants(kind):
        kinds = [group_values(group, {KIND: st.just(word)}) for word, group in variants(kind).items()]
        alone = [word for word, group in variants(kind).items() if required(group) == set()]
        none = [st.none()] if types.NoneType in members(kind) else []
        return st.one_of(*kinds, st.sampled_from(alone), *none)
    if len(members(kind)) > 1:
        return st.one_of([values_of(member) for member in members(kind)])
    if kind is Attention:  # the one class here whose fields depend on each other
        groups = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(
            lambda pair: {"num_heads": pair[0] * pair[1], "num_kv_heads": pair[1]}
        )
        return st.builds(
            lambda a, b: a | b, groups, st.fixed_dictionaries({"kind": st.sampled_from(["full", "nsa"])})
        )
    if is_config(kind):
        return group_values(kind, {})
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments)).map(list)
    if origin is dict:
        return st.dictionaries(SCALARS[str], values_of(arguments[1]), max_size=3)
    return SCALARS[kind]


def required(group: type) -> set[str]:
    return {key for key, field in fields_of(group).items() if field.default is ABSENT}


def group_values(group: type, given: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    fields = {key: values_of(field.type) for key, field in fields_of(group).items()}
    if group is Cosine:
        fields["cycles"] = st.integers(min_value=1)
    needed = {key: fields.pop(key) for key in required(group)}
    return st.fixed_dictionaries(needed | given, optional={k: v for k, v in fields.items() if k not in given})


TREES = values_of(Example)
JUNK = st.recursive(
    st.one_of(*SCALARS.values()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random") / "x.yaml"


def load_or_one_line(path: Path, words: Sequence[str] = ()) -> None:
    message = ""
    try:
        config = configs.load(Example, path, words)
    except ConfigError as error:
        message = str(error)
    if message:
        assert len(message.splitlines()) == 1
        assert message.isprintable()
        assert message.startswith((str(path), "command line: "))
    else:
        assert configs.build(Example, configs.to_dict(config)) == config


@SOME
@given(tree=TREES)
def test_valid_configs_survive_the_round_trip(tree: dict[str, Any], path: Path) -> None:
    config = configs.build(Example, tree)
    path.write_text(configs.dump(config), encoding="utf-8")
    assert configs.load(Example, path) == config


@SOME
@given(tree=TREES)
def test_valid_configs_survive_the_command_line(tree: dict[str, Any]) -> None:
    config = configs.build(Example, tree)
    words = from_mapping(Example, configs.to_dict(config))
    assert configs.load(Example, None, words) == config


def single_values(kind: Any, tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config's tree by dotted key, groups taken apart."""
    result = {}
    for key, value in tree.items():
        inside = inner_fields(kind)[key].type
        if groups(inside) and isinstance(value, dict):
            result |= single_values(inside, value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


@SOME
@given(below=TREES, tree=TREES, data=st.data())
def test_words_in_any_order_make_any_config_of_another(
    below: dict[str, Any], tree: dict[str, Any], data: st.DataObject, path: Path
) -> None:
    below.pop("weights", None)  # mappings without a class are joined
    path.write_text(configs.dump(configs.build(Example, below)), encoding="utf-8")
    config = configs.build(Example, tree)
    values = single_values(Example, configs.to_dict(config))
    order = data.draw(st.permutations(list(values)))
    words = from_mapping(Example, {key: values[key] for key in order})
    assert configs.load(Example, path, words) == config


@SOME
@given(tree=TREES, data=st.data())
def test_mutated_configs_are_answered(tree: dict[str, Any], data: st.DataObject, path: Path) -> None:
    model = tree.setdefault("model", {})
    groups = [tree, model, model.setdefault("attention", {})]
    for _ in range(data.draw(st.integers(1, 3))):
        group = data.draw(st.sampled_from(groups))
        key = data.draw(st.sampled_from(sorted(group)) if group else st.text(max_size=3))
        match data.draw(st.sampled_from(["replace", "rename", "remove"])):
            case "replace":
                group[key] = data.draw(JUNK)
            case "rename":
                group[key + data.draw(st.text(min_size=1, max_size=2))] = group.pop(key, None)
            case "remove":
                group.pop(key, None)
    path.write_text(yaml_text.dump(tree), encoding="utf-8")
    load_or_one_line(path)


@MANY
@given(tree=JUNK)
def test_junk_values_are_answered(tree: Any, path: Path) -> None:
    path.write_text(yaml_text.dump(tree), encoding="utf-8")
    load_or_one_line(path)


@MANY
@given(raw=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_junk_files_are_answered(raw: bytes, path: Path) -> None:
    path.write_bytes(raw)
    load_or_one_line(path)


@SOME
@given(tree=TREES, data=st.data())
def test_damaged_files_are_answered(tree: dict[str, Any], data: st.DataObject, path: Path) -> None:
    text = configs.dump(configs.build(Example, tree))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = min(len(text), start + data.draw(st.integers(0, 8)))
        text = (
            text[:start]
            + data.draw(st.text(alphabet=":-[]{}#&*!|>'\"%@` \n\t,?ab0.~", max_size=4))
            + text[stop:]
        )
    path.write_text(text, encoding="utf-8")
    load_or_one_line(path)


@MANY
@given(
    words=st.lists(
        st.sampled_from(
            [f"--{key}" for key in leaves(Example)] + ["--model", "--weights.x", "--", "--=", "-1", "["]
        )
        | st.text(max_size=6)
        | JUNK.map(yaml_text.dump_line),
        max_size=6,
    )
)
def test_junk_words_are_answered(words: list[str], path: Path) -> None:
    path.write_text("steps: 1\n", encoding="utf-8")
    load_or_one_line(path, words)


TESTS = [(name, test) for name, test in globals().items() if name.startswith("test_")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "test"), TESTS)
def test_at_length(name: str, test: Any, path: Path) -> None:
    """Each of the above with thirty times as many examples."""
    again = AT_LENGTH(given(**test.hypothesis._given_kwargs)(test.hypothesis.inner_test))
    again(**({"path": path} if "path" in inspect.signature(again).parameters else {}))
