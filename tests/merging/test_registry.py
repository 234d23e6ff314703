"""An operator is declared by its signature: what the machinery reads there, and what it refuses."""

import re
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.merging import (
    AFTERWARDS,
    OPERATORS,
    Method,
    afterwards,
    inject,
    merge_tensors,
    operator,
    operator_named,
)
from jaxlab.merging.operators.declarations import Bounds, InMergekit, NotInjected, PerModel, Scalar
from jaxlab.models import ModelConfig, abstract_params
from tests.docs.scripts import load

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
    merged = merge_tensors("median", [X, Y], base=BASE, weight=[1, 0.5], **{"lambda": 2.0})
    assert np.asarray(merged).tolist() == [1 + 2 * 1, 1 - 2 * 0.5, 1 + 2 * 0.75]  # 1 1 | -2 1 | 3 -1.5
    config = ModelConfig(vocab_size=5, width=4, num_layers=1, num_heads=1, mlp_width=4)
    fill = lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), abstract_params(config))
    vlm, expert, base = fill(3.0), fill(2.0), fill(1.0)
    injected, _ = inject(vlm, expert, base, operator="median", lambda_v=0.25, lambda_e=1.0)
    assert set(np.asarray(injected["layers"]["mlp"]["up"]).ravel().tolist()) == {1.75}  # of 0.5 and 1


def test_the_list_of_the_docs_is_what_the_declarations_say():
    page = load("operators").page()
    assert DOCS.with_name("operators.md").read_text() == page, "run python docs/operators.py"
    rows = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert rows == [*OPERATORS, *AFTERWARDS]
    for name in rows:
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        entry = operator_named(name)
        assert entry.source in line
        for parameter in entry.parameters:
            assert f"`{parameter}` " in line
        if not isinstance(entry.injection, NotInjected):
            cell = line.split(" | ")[-1]
            fixed = re.search(r"fixed: ([^;|]*)", cell)
            closed = set(entry.parameters) & {"lambda", "normalize"}
            assert set(re.findall(r"`(\w+)`", fixed[1] if fixed else "")) == closed, name
            for parameter in entry.for_injection.parameters.values():
                assert (f"must be given: `{parameter.name}`" in cell) == parameter.asked, name
        formula = next(line for line in page.splitlines() if line.startswith(f"- `{name}`:"))
        assert len(formula) > 40


def test_scopes_say_what_may_be_streamed():
    element = {name for name, entry in OPERATORS.items() if entry.scope("paper") == "element"}
    assert {"linear", "task_arithmetic", "dare_linear", "dare_ties", "magmax", "tall"} <= element
    assert not element & {"ties", "slerp", "tsv_m", "emr", "karcher", "sce", "ties_global", "widen"}
    assert OPERATORS["dare_linear"].scope("mergekit") == "tensor"  # the L1 norm
    assert operator_named("task_arithmetic+lines").scope("paper") == "element"
    assert operator_named("ties+lines").scope("paper") == "cut"
    assert operator_named("ties+lines+svc").scope("paper") == "matrix"
    assert operator_named("svc").name == "svc"
    assert {name: e.base for name, e in OPERATORS.items() if e.of_models} == {
        "linear": "unused",
        "passthrough": "unused",
        "karcher": "unused",
        "slerp": "optional",
        "nuslerp": "optional",
        "multislerp": "optional",
        "model_stock": "required",
        "nearswap": "required",
        "arcee_fusion": "required",
        "widen": "required",
    }


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
    def whole(task_vectors, weights): ...

    for function, error in ((vectors, TypeError), (ties, ValueError)):
        with pytest.raises(error):
            operator("nobody")(function)
    with pytest.raises(TypeError, match="belong together"):
        operator("nobody", scope="model")(whole)
    with pytest.raises(ValueError, match="two operators named ties"):
        afterwards("nobody")(ties)
    assert "whole" not in table


def test_an_operator_without_weights_is_injected_by_scaling(table):
    @operator("nobody")
    def first(task_vectors):
        return task_vectors[0] + jnp.abs(task_vectors[1])

    config = ModelConfig(vocab_size=5, width=4, num_layers=1, num_heads=1, mlp_width=4)
    fill = lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), abstract_params(config))
    injected, _ = inject(fill(3.0), fill(0.0), fill(1.0), operator="first", lambda_v=0.25, lambda_e=0.5)
    assert set(np.asarray(injected["layers"]["mlp"]["up"]).ravel().tolist()) == {1 + 0.5 + 0.5}
    with pytest.raises(UserError, match="has none"):
        Method.of("first", density=0.5)


def test_what_the_docs_say_of_injections_is_so(table):
    """Linear is task arithmetic; slerp's t is what its row says."""
    config = ModelConfig(vocab_size=5, width=4, num_layers=1, num_heads=1, mlp_width=4)
    trio = [
        jax.tree.map(lambda x, s=s: jax.random.normal(jax.random.key(s), x.shape), abstract_params(config))
        for s in range(3)
    ]
    results = {}
    for name in ("linear", "task_arithmetic", "slerp"):
        found, _ = inject(*trio, operator=name, lambda_v=0.25, lambda_e=0.75)
        results[name] = found["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(results["linear"], results["task_arithmetic"])
    vlm, expert, base = (one["layers"]["mlp"]["up"][0] for one in trio)
    want = base + merge_tensors("slerp", [vlm - base, expert - base], t=0.75)
    np.testing.assert_allclose(results["slerp"][0], want, rtol=1e-5, atol=1e-6)
