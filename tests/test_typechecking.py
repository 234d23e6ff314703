"""What the suite relies on in every test: a call that breaks an annotation raises."""

import importlib

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from tests.typechecking import check_types

MODULE = """
import dataclasses
from jaxtyping import Float
import numpy as np

Row = Float[np.ndarray, " N"]

@dataclasses.dataclass
class Named:
    name: str

@dataclasses.dataclass
class Rows:
    x: Row
    y: Row

def plain(number: int) -> str:
    return number if number > 9 else str(number)

def same(x: Row, y: Row | None) -> Float[np.ndarray, "N 2"]:
    return np.zeros((3, 2))

def listed(rows: list["Row"]) -> int:
    return len(rows)
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "annotated_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch, check_types(["annotated_module"]):
        patch.syspath_prepend(folder)
        return importlib.import_module("annotated_module")


def test_what_keeps_its_annotations_passes(module):
    assert module.plain(3) == "3"
    assert module.same(np.zeros(3), None).shape == (3, 2)
    assert module.Named("a").name == "a"
    assert module.Rows(np.zeros(3), np.ones(3)).y.sum() == 3
    assert module.listed([np.zeros(3), np.ones(3)]) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.plain("3"),
        lambda m: m.plain(10),  # what it returns
        lambda m: m.same(np.zeros(3), np.zeros(4)),
        lambda m: m.same(np.zeros(4), None),  # what it returns
        lambda m: m.Named(3),
        lambda m: m.Rows(np.zeros(3), np.zeros(4)),
        lambda m: m.Rows(np.zeros((3, 1)), np.zeros(3)),
        lambda m: m.listed([np.zeros((2, 2))]),
    ],
)
def test_what_breaks_them_raises(module, call):
    with pytest.raises(TypeCheckError):
        call(module)
