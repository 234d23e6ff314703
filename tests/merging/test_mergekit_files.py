"""Files of mergekit give the tensors that mergekit 0.1.5 writes (tests/golden/mergekit_files/make.py says how
those were made).
"""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from jaxlab.checkpoints import open_folder
from jaxlab.tasks import main
from tests.merging.mergekit_desk import GOLDEN
from tests.merging.mergekit_desk import case as file_of

WANTED = json.loads((GOLDEN / "golden.json").read_text())
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

EQUAL_THRESHOLDS = {"09": 0.02, "37": 0.03, "44": 0.01}
"""Of these cases a share of the elements may be anything: 16 bits hold few numbers, so several values of a
task vector are as large as the one at the threshold, and mergekit's sort picks any of them."""
FAST = ("03", "04", "10", "18", "34", "35", "42", "51")
"""The others take long to compile."""


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


def merged(out, wanted):
    tensors = {name: tensor.read() for name, tensor in open_folder(out).items()}
    if "tokens" not in wanted:
        return tensors
    vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(True)
    assert sorted(vocabulary) == wanted["tokens"]
    return by_words(tensors, vocabulary)


@pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")
@pytest.mark.parametrize(
    "case", [c if c[:2] in FAST else pytest.param(c, marks=pytest.mark.slow) for c in WANTED]
)
def test_gives_the_tensors_of_mergekit(at_desk, tmp_path, case):
    wanted, out = WANTED[case], tmp_path / "out"
    assert main(["merge", str(file_of(case)), "--out", str(out), "--verify"]) == 0
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")
@pytest.mark.parametrize("number", ["05", "13"])
def test_random_methods_keep_the_share_that_they_say(at_desk, tmp_path, number):
    """mergekit's masks are not ours, but of the elements that one model alone changes as many survive."""
    text = file_of(number).read_text()
    tree = yaml.safe_load(text)
    method, one = tree["merge_method"], tree["models"][1]
    assert one["model"].endswith(("/a", "/b"))
    density, place = one["parameters"]["density"], one["model"].rpartition("/")[0]
    alone = {**tree, "models": [{**one, "parameters": {**one["parameters"], "weight": 1.0}}]}
    alone = {key: value for key, value in alone.items() if key != "tokenizer"}
    alone["parameters"] = {"rescale": False}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(alone))
    assert main(["merge", str(tmp_path / "one.yaml"), "--out", str(tmp_path / "out")]) == 0
    base, model, found = (open_folder(p) for p in (f"{place}/base", one["model"], tmp_path / "out"))
    kept = elements = 0
    for name in found:
        origin, own, merged = (folder[name].read() for folder in (base, model, found))
        changed = own != origin
        same = merged == origin
        np.testing.assert_allclose(
            merged[~same].astype(np.float32), own[~same].astype(np.float32), atol=0.03, err_msg=name
        )
        kept += np.count_nonzero(~same & changed)
        elements += np.count_nonzero(changed)
    spread = 4 * np.sqrt(density * (1 - density) / elements)
    assert abs(kept / elements - density) < spread, (method, kept / elements)
