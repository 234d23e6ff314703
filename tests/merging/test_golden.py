"""Mode mergekit against outputs of mergekit 0.1.5 (tests/golden/merging/make.py says how they were made)."""

import itertools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxlab.merging import merge_tensors

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}


def read_golden(name):
    raw = (Path(__file__).parents[1] / "golden" / "merging" / name).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    cases = json.loads(header.pop("__metadata__")["cases"])
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, cases


TENSORS, CASES = read_golden("mergekit.safetensors")
ALL_TENSORS, ALL_CASES = read_golden("mergekit_all.safetensors")
MERGEKIT = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "sce",
    "ram",
    "ramplus_tl",
    "model_stock",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "nearswap",
    "arcee_fusion",
    "passthrough",
]


def ours(name, mode="mergekit"):
    case = CASES[name]
    tensors = [TENSORS[i] for i in case["inputs"]]
    base, tensors = (tensors[0], tensors[1:]) if case["has_base"] else (None, tensors)
    parameters = dict(case["parameters"])
    if case["method"] == "task_arithmetic":
        parameters.pop("density", None)
    if case["masks"]:
        parameters["mask"] = [TENSORS[f"{name}/mask{i}"] for i in range(case["masks"])]
    if case["method"].startswith("dare") and not case["masks"]:  # density 1: nothing is drawn
        parameters["mask"] = [np.ones_like(x, dtype=bool) for x in tensors]
    return merge_tensors(case["method"], tensors, base=base, mode=mode, **parameters)


def steps_apart(a, b):
    """How many numbers of the dtype lie between a and b, where they differ."""
    kind = np.int32 if a.dtype.itemsize == 4 else np.int16
    bits = [np.asarray(x).view(kind).astype(np.int64) for x in (a, b)]
    ordered = [np.where(x < 0, np.int64(np.iinfo(kind).min) - x, x) for x in bits]
    return np.abs(ordered[0] - ordered[1])


def at_threshold(name):
    """Elements whose trimming is a matter of taste: as large as one on the other side of the threshold.

    mergekit sorts unstably there; ours keeps those of lowest index.
    """
    case = CASES[name]
    base, *models = (TENSORS[i] for i in case["inputs"])
    tied = np.zeros(base.shape, bool)
    for model, density in enumerate(np.broadcast_to(case["parameters"].get("density", 1.0), len(models))):
        size = np.abs(models[model] - base).astype(np.float32)
        kept = max(int(density * size.size), 1)
        ordered = np.sort(size.reshape(-1))[::-1]
        if kept < size.size and ordered[kept - 1] == ordered[kept]:
            tied |= size == ordered[kept]
    return tied


def families():
    """The cases by what is the same but for normalize, rescale and t: fewer tests, as many comparisons."""
    result = {}
    for name, case in CASES.items():
        result.setdefault((case["method"], name.split(".")[1]), []).append(name)
    return result


FAMILIES = families()


@pytest.mark.parametrize("family", FAMILIES, ids=".".join)
def test_mergekit_mode_reproduces_mergekit(family):
    method, dtype = family
    for name in FAMILIES[family]:
        want, got = TENSORS[f"{name}/output"], np.asarray(ours(name))
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        parameters = CASES[name]["parameters"]
        if dtype == "float32" and (
            method in ("linear", "slerp") or {"normalize", "rescale"} & set(parameters)
        ):
            # Sums over weights and elements in another order, fused multiply-adds in linear, another sine.
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=5e-7, err_msg=name)
        elif method in ("linear", "slerp"):  # the same, rounded to 16 bits
            apart = steps_apart(got, want)
            assert apart.max() <= 1, name
            assert np.mean(apart != 0) < 0.02, name
        else:
            free = at_threshold(name) if method == "ties" else np.zeros(want.shape, bool)
            assert np.mean(free) < 0.1
            np.testing.assert_array_equal(got[~free], want[~free], err_msg=name)


def test_modes_differ_where_they_are_said_to():
    """Otherwise the comparison above would say nothing about the quirks."""
    for name in (
        "task_arithmetic.bfloat16.False",
        "ties.bfloat16.negative",
        "dare_linear.float32.False.0.5.True",
    ):
        assert np.any(np.asarray(ours(name, "paper")) != TENSORS[f"{name}/output"]), name


def ours_of_all(name):
    """The merge of a case in the file of all methods."""
    case, tensors = ALL_CASES[name], [ALL_TENSORS[i] for i in ALL_CASES[name]["inputs"]]
    base, tensors = (tensors[0], tensors[1:]) if case["has_base"] else (None, tensors)
    masks = [ALL_TENSORS[f"{name}/mask{i}"].reshape(tensors[0].shape) for i in range(case["masks"])]
    if case["method"].startswith(("dare", "della")):  # where density is 1 nothing is drawn
        masks = masks or [np.ones(x.shape, bool) for x in tensors]
    options = {"mask": masks} if masks else {}
    merged = merge_tensors(
        case["method"], tensors, base=base, mode="mergekit", **options, **case["parameters"]
    )
    return np.asarray(merged)


def tied(name):
    """Elements of the file of all methods as large as one on the other side of a cut by magnitude."""
    case = ALL_CASES[name]
    base, *models = (ALL_TENSORS[i] for i in case["inputs"])
    free = np.zeros(base.shape, bool)
    shares = zip(
        *(
            np.broadcast_to(case["parameters"].get(key, other), len(models))
            for key, other in (("density", 1.0), ("gamma", 0.01))
        ),
        models,
        strict=True,
    )
    for density, gamma, model in shares:
        size = np.abs(model - base).astype(np.float32)
        ordered = np.sort(size.reshape(-1))[::-1]
        kept = int(density * size.size)
        if case["method"] == "ties":
            cuts = (max(kept, 1),)
        else:
            top = min(int(gamma * size.size), size.size - kept)
            cuts = (top, top + kept)
        for cut in cuts:
            if 0 < cut < size.size and ordered[cut - 1] == ordered[cut]:
                free |= (size == ordered[cut]) & (size > 0)
    return free


EXACT = {*MERGEKIT} - {"linear", "slerp", "multislerp", "model_stock", "karcher"}
"""Bit for bit in 16 bits: sums over elements aside, each operation rounds as mergekit's does."""


SLOW = pytest.mark.slow
KINDS = [
    ("matrix", "bfloat16"),
    ("vector", "float32"),
    *(
        pytest.param(shape, dtype, marks=SLOW)
        for shape, dtype in itertools.product(
            ("matrix", "vector", "one", "cube", "scalar"), ("float32", "bfloat16", "float16")
        )
        if (shape, dtype) not in (("matrix", "bfloat16"), ("vector", "float32"))
    ),
]


@pytest.mark.parametrize(("shape", "dtype"), KINDS)
@pytest.mark.parametrize("method", MERGEKIT)
def test_all_of_mergekit_over_shapes(method, shape, dtype):
    """A matrix, a vector as of norms, one element, three axes, a scalar; ours are finite where mergekit gives
    NaN.
    """
    names = [name for name in ALL_CASES if name.startswith(f"{method}.{shape}.{dtype}.")]
    if not names:  # mergekit refuses or divides by zero
        assert shape in ("one", "scalar")
        assert method.startswith(("della", "multislerp"))
    for name in names:
        want, got = ALL_TENSORS[f"{name}/output"], ours_of_all(name)
        assert got.shape == want.shape
        want = want.astype(got.dtype)  # some of mergekit's widen to float32
        assert np.isfinite(got.astype(np.float32)).all(), name
        right = ~np.isnan(want.astype(np.float32))
        if method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
            assert tied(name).mean() < 0.12
            right &= ~tied(name)
        got, want = got[right], want[right]
        if not want.size:
            continue
        if dtype != "float32" and method in EXACT:
            np.testing.assert_array_equal(got, want, err_msg=name)
            continue
        # In steps of the dtype at the tensor's largest element: sums in another order, another sine; of
        # karcher and model_stock a scalar on which all depends may be rounded to the neighbour.
        step = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
        loose = {"karcher": 8, "model_stock": 8, "multislerp": 4}.get(method, 2)
        allowed = (8 if dtype == "float32" else loose) * step * np.abs(want.astype(np.float64)).max()
        np.testing.assert_allclose(
            got.astype(np.float64), want.astype(np.float64), rtol=0, atol=allowed, err_msg=name
        )


def test_every_method_of_mergekit_has_cases():
    assert {case["method"] for case in ALL_CASES.values()} == set(MERGEKIT)
