"""Parameters as merge files write them, and what they are for one tensor."""

import pytest

from jaxlab.errors import ConfigError
from jaxlab.merging.numbers import Setting, as_kind

ATTENTION = "model.layers.0.self_attn.q_proj.weight"
MLP = "model.layers.0.mlp.up_proj.weight"


def test_one_value_is_for_every_tensor():
    assert Setting.of(0.3).at(MLP, 0.7) == 0.3
    assert Setting.of("1e-3").at(MLP) == 1e-3  # YAML 1.1 reads it as a word


def test_gradients_are_stretched_over_the_layers():
    gradient = Setting.of([0, 0.5, 0.3, 0.7, 1])
    assert [gradient.at(MLP, i / 4) for i in range(5)] == [0, 0.5, 0.3, 0.7, 1]
    assert [gradient.at(MLP, i / 8) for i in (1, 3)] == [0.25, 0.4]
    assert Setting.of([2]).at(MLP, 1.0) == 2
    assert Setting.of([]).at(MLP) is None


def test_switches_of_a_gradient_are_picked_and_whole_numbers_stay_whole():
    assert [Setting.of([True, False]).at(MLP, d, "switch") for d in (0.0, 0.5, 1.0)] == [True, True, False]
    assert Setting.of([2, 4]).at(MLP, 0.5, "count") == 3
    with pytest.raises(ConfigError, match=r"a whole number, is 2\.5"):
        Setting.of([2, 3]).at(MLP, 0.5, "count")


def test_the_first_rule_that_fits_decides():
    setting = Setting.of(
        [{"filter": "self_attn", "value": [0, 1]}, {"filter": "*", "value": 0.5}, {"value": 9}]
    )
    assert setting.at(ATTENTION, 0.25) == 0.25
    assert setting.at(MLP) == 0.5
    assert Setting.of({"filter": "mlp", "value": 1}).at(ATTENTION) is None
    patterns = Setting.of([{"pattern": "*.mlp.*", "value": 1}, {"pattern": "*", "value": 2}])
    assert (patterns.at(MLP), patterns.at(ATTENTION)) == (1, 2)
    assert list(setting.conditions()) == ["self_attn"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is nothing"),
        ({"filter": "mlp"}, "value: missing"),
        ({"filtr": "mlp", "value": 1}, "filtr: no such key"),
        ({"filter": 3, "value": 1}, "filter: must be a part of tensors' names, is 3"),
        ([1, {"value": 2}], "0: is 1, beside"),
        ([[1]], "must be a value, a list of values"),
        ([{"value": 1}, {"value": {"a": 1}}], "1.value: must be a value"),
    ],
)
def test_what_is_no_setting_is_refused(value, message):
    with pytest.raises(ConfigError) as error:
        Setting.of(value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [
        ("yes", "switch", True),
        (0, "switch", False),
        (True, "number", 1.0),
        ("1_000", "count", 1000),
        (" +.5 ", "number", 0.5),
        (3.0, "count", 3),
    ],
)
def test_values_are_read_as_what_the_parameter_is(value, kind, found):
    read = as_kind(value, kind)
    assert (read, type(read)) == (found, type(found))


@pytest.mark.parametrize(
    "value", ["nan", float("inf"), "0x10", pytest.param(10**5000, id="huge"), "", "1e", None, [1]]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match="must be a number, is "):
        as_kind(value, "number")


@pytest.mark.parametrize("value", [2, "maybe", 0.5, None])
def test_what_is_no_switch_is_refused(value):
    with pytest.raises(ConfigError, match="must be true or false, is "):
        as_kind(value, "switch")


def test_what_is_no_whole_number_is_refused():
    with pytest.raises(ConfigError, match="must be a whole number, is "):
        as_kind("2.5", "count")
