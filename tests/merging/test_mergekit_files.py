"""Files of mergekit give the tensors that mergekit 0.1.5 writes (tests/golden/mergekit_files/make.py says how
those were made).
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxlab.checkpoints import open_folder
from jaxlab.tasks import main

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit_files"
WANTED = json.loads((GOLDEN / "golden.json").read_text())
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

EQUAL_THRESHOLDS = {"09": 0.02, "37": 0.03, "44": 0.01}
"""Of these cases a share of the elements may be anything: several values of a task vector are as large as that
at the threshold, since 16 bits hold few numbers, and mergekit's sort picks any of them."""
FAST = ("03", "04", "10", "18", "34", "35", "36", "42")
"""The others take long to compile."""


def models_module():
    spec = importlib.util.spec_from_file_location("mergekit_models", GOLDEN / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    """A folder with all models."""
    place = tmp_path_factory.mktemp("mergekit")
    models_module().write(place)
    return place


def values_of(wanted, name):
    with np.load(GOLDEN / "golden.npz") as file:
        return file[name].view(NUMPY[wanted["dtype"]]) if name in file else None


def by_words(tensors, vocabulary):
    """As make.py has the tables of new vocabularies."""
    order = [vocabulary[word] for word in sorted(vocabulary)]
    found = {}
    for name, value in tensors.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rest = [i for i in range(len(value)) if i not in set(order)]
            value = value[[*order, *rest]]
        found[name] = np.ascontiguousarray(value)
    return found


def ordered(values):
    """Numbers as whole ones that count the floats between them."""
    bits = values.view({2: np.int16, 4: np.int32}[values.dtype.itemsize]).astype(np.int64)
    return np.where(bits < 0, -(bits & ((1 << (8 * values.dtype.itemsize - 1)) - 1)), bits)


def merge(case, out):
    return main(["merge", str(GOLDEN / "cases" / f"{case}.yaml"), "--out", str(out), "--verify"])


def merged(out, wanted):
    tensors = {name: tensor.read() for name, tensor in open_folder(out).items()}
    if "tokens" not in wanted:
        return tensors
    vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(True)
    assert sorted(vocabulary) == wanted["tokens"]
    return by_words(tensors, vocabulary)


@pytest.mark.parametrize(
    "case", [c if c[:2] in FAST else pytest.param(c, marks=pytest.mark.slow) for c in WANTED]
)
def test_gives_the_tensors_of_mergekit(desk, tmp_path, monkeypatch, case):
    monkeypatch.chdir(desk)
    wanted, out = WANTED[case], tmp_path / "out"
    assert merge(case, out) == 0
    found = merged(out, wanted)
    shapes = {name: list(value.shape) for name, value in found.items()}
    assert shapes == {name: shape for name, (shape, _) in wanted["tensors"].items()}
    assert {value.dtype for value in found.values()} == {NUMPY[wanted["dtype"]]}
    config = json.loads((out / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == wanted["layers"]
    assert config["vocab_size"] == wanted["rows"]
    wrong = elements = 0
    for name, (_, digest) in wanted["tensors"].items():
        mine = found[name]
        if hashlib.sha256(mine.tobytes()).hexdigest()[:16] == digest:
            elements += mine.size
            continue
        theirs = values_of(wanted, f"{case}/{name}")
        assert theirs is not None, f"{name} has other bytes"
        if mine.dtype == np.float32:  # sums in another order, or fused with a product
            apart = np.abs(mine - theirs) > 4e-6
        else:  # one rounding
            apart = np.abs(ordered(mine) - ordered(theirs)) > 1
        wrong += np.count_nonzero(apart)
        elements += mine.size
    assert wrong <= EQUAL_THRESHOLDS.get(case[:2], 0) * elements
