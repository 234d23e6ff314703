"""Flows of the families are those of transformers' eager attention in float64 (tests/golden/flows)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlab import load_model
from jaxlab.checkpoints import describe_model
from jaxlab.icl import Prompts, flows
from jaxlab.icl.inputs import prepared
from jaxlab.models import prepare_batch
from tests.checkpoints import folders

GOLDEN = Path(__file__).parents[1] / "golden" / "flows"
DEFAULT = ("gemma2", "paligemma", "qwen2_vl", "gpt_oss", "deepseek_v3")
"""Softcap and windows, a prefix that sees itself whole, what is worked out of the sizes of images, sinks,
latents."""
LENGTH = 13
TOLERANCE = {"labels": 1e-5, "vocabulary": 2e-5, "heads": 1e-5}
"""Of the largest flow of a layer."""
UNSTEADY = ("deepseek_v3",)
"""Half an ulp in the parameters moves these flows by up to 1e-5: machine code without optimizations (see
tests/conftest.py), which adds in another order, is not near enough on every processor. They run in a process
of their own that has them."""
ROOT = Path(__file__).parents[2]


def _inputs():
    spec = importlib.util.spec_from_file_location("flow_inputs", GOLDEN / "case_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cases():
    with np.load(GOLDEN / "flows.npz") as file:
        names = sorted({name.partition(".")[0] for name in file.files})
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


pytestmark = pytest.mark.usefixtures("quick")


def batch_of(case):
    golden = folders.golden(case)
    if "pixel_values" not in golden:
        return {"tokens": golden["tokens"][:, :LENGTH].astype(np.int32)}
    skipped = ("tokens", "logits", "prompt", "greedy")
    more = {key: x for key, x in golden.items() if key not in skipped and "." not in key}
    return {"tokens": golden["tokens"], "images": more.pop("pixel_values"), **more}


def off(found, expected):
    """The largest difference of each layer, over the layer's largest flow."""
    found, expected = (np.moveaxis(np.asarray(x, np.float64), 1, 0) for x in (found, expected))
    axes = tuple(range(1, found.ndim))
    return np.abs(found - expected).max(axes) / np.abs(expected).max(axes)


@pytest.mark.parametrize("case", _cases())
def test_flows_are_those_of_transformers_in_float64(tmp_path, case):
    if case not in UNSTEADY:
        check_flows(tmp_path, case)
        return
    words = f"check_flows(Path({str(tmp_path)!r}), {case!r})"
    code = f"from pathlib import Path; from tests.icl.test_flows_golden import check_flows; {words}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_flows(tmp_path, case):
    config, params, _ = load_model(folders.make(tmp_path / case, case))
    given, batch = _inputs(), batch_of(case)
    size, length = batch["tokens"].shape
    targets = {
        "positions": np.full(size, length - 1),
        "label_tokens": given.LABEL_TOKENS,
        "labels": given.labels_of(size),
    }
    with np.load(GOLDEN / "flows.npz") as file:
        expected = {kind: file[f"{case}.{kind}"] for kind in TOLERANCE}
    run = lambda **more: flows(params, batch, config, given.classes_of(size, length), targets, **more)[0]
    kinds = {"labels": {}, "heads": {"per_head": True, "signed": True}, "vocabulary": {"loss": "vocabulary"}}
    for kind, options in kinds.items():
        if kind == "labels" or case not in DEFAULT:
            assert off(run(**options), expected[kind]).max() < TOLERANCE[kind], kind


PREPARED = ("qwen3_vl", "gemma3", "idefics3", "mistral3")


@pytest.mark.parametrize(
    "case", ["qwen2_5_vl", *(pytest.param(case, marks=pytest.mark.slow) for case in PREPARED)]
)
def test_a_batch_that_is_prepared_is_read(tmp_path, case):
    config = describe_model(folders.make(tmp_path / case, case)).config
    batch = prepare_batch(batch_of(case), config)
    assert set(batch) == set(prepared(batch, config, "flows"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["paligemma", "gemma3", "qwen2_vl", "qwen2_5_vl"])
def test_padding_of_prompts_with_images_changes_no_flow(tmp_path, case):
    """Prefixes and images that see themselves whole, positions that are worked out of sizes of images."""
    config, params, _ = load_model(folders.make(tmp_path / case, case))
    batch = {name: np.asarray(x) for name, x in prepare_batch(batch_of(case), config).items()}
    size, length = batch["tokens"].shape
    nothing = np.full((size, length), -1, np.int32)
    prompts = Prompts(
        batch=batch,
        classes=np.asarray(_inputs().classes_of(size, length)),
        positions=np.full(size, length - 1, np.int32),
        label_tokens=np.tile(np.asarray(_inputs().LABEL_TOKENS, np.int32), (size, 1)),
        labels=np.asarray(_inputs().labels_of(size)),
        parts=np.zeros((size, length), np.int32),
        label_words=nothing,
        demonstrations=nothing,
        rows=np.arange(size, dtype=np.int32),
    )
    padded = prompts.padded(length + 5)
    assert padded.batch["tokens"].shape == padded.parts.shape == (size, length + 5)
    run = lambda one: flows(params, one.batch, config, one.classes, one.targets)
    for found, expected in zip(run(padded), run(prompts), strict=True):
        assert off(found, expected).max() < 1e-5
