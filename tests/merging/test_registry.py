"""An operator is declared by its signature: what the machinery reads there, and what it refuses."""

import re
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.merging import OPERATORS, Method, inject, merge_tensors, operator
from jaxlab.merging.operators.registry import Bounds, InMergekit, PerModel, Scalar
from jaxlab.models import ModelConfig, abstract_params

DOCS = Path(__file__).parents[2] / "docs" / "merge_operators.md"
BASE, X, Y = jnp.array([1.0, 1.0, 1.0]), jnp.array([2.0, -1.0, 4.0]), jnp.array([3.0, 3.0, -2.0])


@pytest.fixture
def table():
    """The operators; those that a test adds are gone after it."""
    before = dict(OPERATORS)
    yield OPERATORS
    OPERATORS.clear()
    OPERATORS.update(before)


def test_the_example_of_the_docs_is_an_operator_everywhere(table):
    exec(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0], {})
    merged = merge_tensors("magmax", [X, Y], base=BASE, weight=[1, 0.75], **{"lambda": 2.0})
    assert np.asarray(merged).tolist() == [1 + 2 * 1.5, 1 - 2 * 2, 1 + 2 * 3]  # 1 1.5 | -2 1.5 | 3 -2.25
    config = ModelConfig(vocab_size=5, width=4, num_layers=1, num_heads=1, mlp_width=4)
    fill = lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), abstract_params(config))
    vlm, expert, base = fill(3.0), fill(2.0), fill(1.0)
    injected, _ = inject(vlm, expert, base, operator="magmax", lambda_v=0.25, lambda_e=1.0)
    assert set(np.asarray(injected["layers"]["mlp"]["up"]).ravel().tolist()) == {2.0}  # 1 + max(0.5, 1)


def test_the_table_of_the_docs_lists_every_operator_with_its_parameters():
    listed = {}
    for row in re.findall(r"^\| (`.*`) \| (.*) \| (.*) \|$", DOCS.read_text(), re.MULTILINE):
        for name in re.findall(r"`(\w+)`", row[0]):
            listed[name] = row[1:]
    assert {name for name in listed if name in OPERATORS} == set(OPERATORS)
    for name, entry in OPERATORS.items():
        source, parameters = listed[name]
        assert entry.source.startswith(source)
        assert sorted(parameters.removesuffix(", instead of weight").split(", ")) == sorted(entry.parameters)


def test_parameters_are_read_from_both_stages(table):
    def scale(task_vectors, *, gain: Annotated[float, PerModel(), Bounds(0.0, 2.0)] = 1.0):
        return [x * g for x, g in zip(task_vectors, gain, strict=True)]

    @operator("nobody", prepare=scale)
    def scaled(vectors, weights, *, lambda_: Scalar, square: Annotated[bool, InMergekit(True)] = False, mode):
        total = sum(x * w for x, w in zip(vectors, weights, strict=True)) * lambda_
        return total * total if square else total

    entry = table["scaled"]
    assert list(entry.parameters) == ["gain", "lambda", "square"]
    merge = lambda **options: np.asarray(merge_tensors("scaled", [X, Y], base=BASE, **options)).tolist()
    assert merge(gain=[1, 0], **{"lambda": 2.0}) == [3, -3, 7]
    assert merge(gain=[1, 0], mode="mergekit", **{"lambda": 2.0}) == [1 + 4, 1 + 16, 1 + 36]
    for options, message in (
        ({}, "scaled needs the parameter lambda"),
        ({"lambda": 1.0, "gain": 3.0}, "gain must be between 0 and 2, is 3.0"),
        ({"lambda": 1.0, "gain": [1.0]}, "gain has 1 values for 2 models"),
        ({"lambda": [1.0, 2.0]}, "lambda is one number"),
        ({"lambda": 1.0, "statistics": {}}, "scaled takes no statistics"),
    ):
        with pytest.raises(UserError, match=message):
            merge(**options)
    assert Method.of("scaled", gain=0.5).parameters == (("gain", 0.5),)
    with pytest.raises(UserError, match="lambda: scaled has none"):  # an injection's is 1
        Method.of("scaled", gain=0.5, **{"lambda": 0.5})


def test_declarations_that_say_too_little_are_refused(table):
    def vectors(vectors, weights): ...
    def ties(task_vectors, weights): ...
    def unweighted(models): ...

    for function, error in ((vectors, TypeError), (ties, ValueError), (unweighted, TypeError)):
        with pytest.raises(error):
            operator("nobody")(function)
    assert "unweighted" not in table
