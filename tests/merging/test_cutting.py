"""Where tensors are cut in a stream: the same as by sorting, whatever the sample says, whatever is equal."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints.tensor_folder import Planned, open_folder, write_folder
from jaxlab.merging import MergePlan, Merging, PlannedTensor, TensorSource, cutting, merge_tensors, selection
from jaxlab.merging.numerics import Cut
from jaxlab.merging.selection import LAST, Found, Tally, bracket, cut_of, first_index, select
from tests.merging.test_engine import run_plan

KINDS = ("normal", "few values", "zeros", "one value", "nan")


def bits_of(kind, size, seed=0):
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    if kind == "few values":
        x = np.round(x * 4)
    elif kind == "zeros":
        x[np.random.default_rng(1).random(size) < 0.6] = 0.0
    elif kind == "one value":
        x[:] = 0.5
    elif kind == "nan":
        x[::7], x[1::50] = np.nan, np.inf
    return (x.view(np.uint32) & 0x7FFFFFFF), x


def kept(bits, wanted):
    """Which elements are the largest, of equal ones the first: by sorting."""
    order = np.lexsort((np.arange(len(bits)), -bits.astype(np.int64)))
    mask = np.zeros(len(bits), bool)
    mask[order[:wanted]] = True
    return mask


def mask_of(bits, cut):
    index = np.arange(len(bits))
    before = int(cut.before[0]) + (int(cut.before[1]) << 32)
    return (bits > cut.threshold) | ((bits == cut.threshold) & (index < before))


def streamed(bits, wanted, brackets, chunk=100):
    """As `cuts_of` does, over chunks of an array; how many passes it took."""
    passes = []

    def tally(brackets):
        passes.append(brackets)
        tallies = [Tally(*own) for own in brackets]
        for start in range(0, len(bits), chunk):
            part = bits[start : start + chunk]
            for own in tallies:
                own.add(part, (part >= own.low).astype(np.uint8) + (part > own.high))
        return tallies

    histogram = lambda scores: [np.bincount(bits >> 15, minlength=1 << 16) for _ in scores]
    found, tallies = select(brackets, wanted, [0] * len(wanted), tally, histogram)
    read = lambda start, count: bits[start : start + count]
    cuts = [
        selection.NOTHING if one is None else Cut.at(one.threshold, first_index(one, own, read))
        for one, own in zip(found, tallies, strict=True)
    ]
    return cuts, len(passes)


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_are_those_of_a_sort(kind):
    bits, _ = bits_of(kind, 2000)
    for wanted in (0, 1, 2, 399, 1000, 1999, 2000):
        want = kept(bits, wanted)
        np.testing.assert_array_equal(mask_of(bits, cut_of(bits, wanted)), want)
        sample = bits[::4].reshape(10, -1)
        for start in (
            bracket(sample, wanted / 2000),
            (0, LAST),
            (5, 6),
            (LAST, LAST),
        ):  # the last two mislead
            cuts, passes = streamed(bits, [wanted], [start])
            np.testing.assert_array_equal(mask_of(bits, cuts[0]), want, err_msg=f"{wanted} {start}")
            assert passes <= 2


def test_what_a_bracket_holds_is_bounded(monkeypatch):
    """More than may be held: a finer bracket, not a wrong cut; joined tallies, too."""
    bits, _ = bits_of("normal", 2000)
    monkeypatch.setattr(selection, "HELD", 60)
    cuts, passes = streamed(bits, [800], [(0, LAST)])
    assert passes == 2
    np.testing.assert_array_equal(mask_of(bits, cuts[0]), kept(bits, 800))
    whole = Tally(0, LAST)
    for start in range(0, 2000, 20):
        own = Tally(0, LAST)
        own.add(bits[start : start + 20], np.ones(20, np.uint8))
        whole.join(own)
    assert whole.find(800) is None
    assert len(whole.lengths) == 100


def test_a_bracket_is_narrow_and_right_where_runs_differ():
    """Rows of a matrix are not alike: neighbours tell by how much."""
    rng = np.random.default_rng(0)
    scale = np.linspace(0.5, 2.0, 512)[:, None]
    x = (rng.standard_normal((512, 512)) * scale).astype(np.float32)
    bits = x.view(np.uint32) & 0x7FFFFFFF
    low, high = bracket(bits[::16], 0.3)
    inside = np.mean((bits >= low) & (bits <= high))
    assert inside < 0.15
    assert low <= np.sort(bits, axis=None)[int(0.7 * bits.size)] <= high


def test_elements_beyond_32_bits():
    """Indices and counts of tensors of more than 2^32 elements, without one."""
    start = (1 << 33) + 5
    x = jnp.array([1.0, 2.0, 1.0, 0.5, 1.0], jnp.float32)
    bits = int(np.float32(1.0).view(np.uint32))
    offset = jnp.array([start & 0xFFFFFFFF, start >> 32], jnp.uint32)
    mask = np.asarray(Cut.at(bits, start + 4).keeps(x, offset))
    assert mask.tolist() == [True, True, True, False, False]
    # Across the border of the lower word, where its index begins again at 0.
    border = (1 << 32) - 2
    offset = jnp.array([border & 0xFFFFFFFF, border >> 32], jnp.uint32)
    assert np.asarray(Cut.at(bits, border + 3).keeps(x, offset)).tolist() == [True, True, True, False, False]
    assert np.asarray(Cut.at(bits, 2).keeps(x, offset)).tolist() == [False, True, False, False, False]
    # A pass over many chunks: the counts are Python's, the index that of the chunk and the place in it.
    tally, length = Tally(10, 20), 1 << 30
    tally.above, tally.lengths = 3 << 31, [length] * 8
    tally._edges, tally._inside = [(0, 2)] * 8, [(np.array([15, 12], np.uint32), None)] * 8
    found = tally.find((3 << 31) + 16 + 6)
    assert found == Found(15, 6, 8)
    read = lambda start, count: np.concatenate([np.zeros(9, np.uint32), np.full(1, 15, np.uint32)])
    assert first_index(found, tally, read) == 5 * length + 10


OPERATORS = [
    ("ties", {"density": (0.5, 0.2)}),
    ("breadcrumbs", {"density": 0.4, "gamma": (0.1, 0.0)}),
    ("breadcrumbs_ties", {"density": 0.95, "gamma": 0.2}),
    ("ties_global", {"density": 0.3}),
    ("ties", {"density": (0.5, 0.0), "rescale": True}),
    ("trust_region", {"quantile": 0.7}),
]


@pytest.mark.parametrize("mode", ["paper", "mergekit"])
@pytest.mark.parametrize(("operator", "parameters"), OPERATORS, ids=lambda x: x if isinstance(x, str) else "")
def test_in_chunks_as_whole(tmp_path, monkeypatch, operator, parameters, mode):
    """A tensor with thousands of equal elements, in a stream and in memory: the same bits."""
    monkeypatch.setattr(cutting, "_RUN", 32)
    monkeypatch.setattr(cutting, "_RUNS", 16)
    monkeypatch.setattr(cutting, "CHUNK", 512)
    rng, names, shape = np.random.default_rng(0), ("base", "one", "two"), (60, 50)
    base = rng.standard_normal(shape).astype(np.float32)
    tensors = {"base": base} | {n: base + 0.1 * np.round(rng.standard_normal(shape), 1) for n in names[1:]}
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors.items()}
    for name, x in tensors.items():
        planned = [Planned("w", x.dtype, x.shape, lambda x=x: x)]
        write_folder(tmp_path / name, planned, config={"model_type": "none"})
    step = Merging(
        operator,
        mode,
        (TensorSource(1, "w"), TensorSource(2, "w")),
        TensorSource(0, "w"),
        weights=(0.9, 0.4),
        parameters=tuple(sorted(parameters.items())),
    )
    plan = MergePlan((PlannedTensor("w", "bfloat16", shape, (), "", "", merging=step),))
    inputs = [open_folder(tmp_path / name).tensors for name in names]
    got = run_plan(plan, inputs, tmp_path / "out", chunk=1024)["w"]
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in parameters.items()}
    models = [tensors[n] for n in names[1:]]
    want = merge_tensors(operator, models, base=tensors["base"], mode=mode, weight=[0.9, 0.4], **given)
    np.testing.assert_array_equal(got, np.asarray(want))
