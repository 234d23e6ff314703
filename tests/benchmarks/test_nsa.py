"""The benchmark's own arithmetic and its parts at tiny sizes; what it times is tested elsewhere."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nsa
import numpy as np
import pytest
from nsa_parts import alternating, layers, report, subjects, timing

from kernels_pallas.nsa import nsa_attention, window_attention
from kernels_pallas.nsa.specs.arg_specs import ArgSpec

TINY = ArgSpec(
    64,
    "tiny",
    heads=4,
    kv_heads=2,
    key_dim=8,
    value_dim=4,
    block_len=8,
    stride=4,
    block_size=8,
    num_blocks=4,
    window=16,
    dtype="float32",
)


def test_the_crossing_is_between_the_lengths_where_the_ratio_passes_one():
    # From 2 to 1/2 over a factor of four in tokens: halfway in the logarithm.
    assert report.crossing([4096, 1024], [0.5, 2.0]) == pytest.approx(2048)
    assert report.crossing([1, 2, 4, 8], [2.0, 0.5, 4.0, 0.25]) == pytest.approx(4 * 2**0.5)  # the last one
    assert report.crossing([1024, 2048], [0.9, 0.5]) == 0.0
    assert report.crossing([1024, 2048], [2.0, 1.0]) is None
    assert report.crossing([], []) is None


def test_crossovers_take_the_fastest_dense_peer_and_each_overlap():
    def row(name, length, seconds, overlap=None):
        about = {"spec": "s", "part": "forward", "overlap": overlap}
        return {**about, "name": name, "length": length, "median_s": seconds}

    rows = [
        row("dense, a", 1024, 1.0),
        row("dense, b", 1024, 4.0),
        row("dense, b", 4096, 16.0),
        row("nsa [xla]", 1024, 2.0, 0.0),
        row("nsa [xla]", 4096, 8.0, 0.0),
        row("nsa [xla]", 1024, 0.5, 1.0),
        row("nsa [xla]", 4096, 2.0, 1.0),
        {"spec": "s", "part": "forward", "length": 1024, "name": "dense, c", "reason": "not here"},
    ]
    random, same = report.crossovers(rows)
    assert random["tokens"] == pytest.approx(2048)
    assert random["speedups"] == {1024: 0.5, 4096: 2.0}
    assert same["tokens"] == 0.0
    assert "not here" in report.table(rows)


def test_the_longest_and_shortest_come_first_and_then_the_widest_gap():
    assert nsa.by_importance((1024, 2048, 4096, 8192, 65536)) == [65536, 1024, 8192, 2048, 4096]
    assert nsa.by_importance((7,)) == [7]
    assert nsa.by_importance(()) == []


def test_every_kind_has_a_turn_before_the_rest_of_the_lengths(monkeypatch):
    monkeypatch.setattr(
        nsa.jax, "default_backend", lambda: "gpu"
    )  # elsewhere torch is in the attention's turn
    arguments = nsa.Arguments(
        Path("x.json"),
        ("xla",),
        lengths=(1024, 2048, 8192, 65536),
        forward_lengths=(131072,),
        heads=4,
        kv_heads=1,
        dtype="float32",
        specs=("paper",),
        decode_lengths=(1024,),
        torch_python=Path("python"),
    )
    order = [(job.kind, job.length) for job in nsa.jobs(arguments)]
    assert order[:8] == [
        ("attention", 65536),
        ("attention", 1024),
        ("attention", 8192),
        ("forward", 131072),
        ("decode", 1024),
        ("torch", 65536),
        ("torch", 1024),
        ("torch", 8192),
    ]
    assert order[8:11] == [("layers", 65536), ("attention", 2048), ("torch", 2048)]
    assert sorted(order[11:]) == sorted(
        [("layers", n) for n in (1024, 2048, 8192)] + [("branches", n) for n in (1024, 2048, 8192, 65536)]
    )
    few = nsa.jobs(dataclasses.replace(arguments, kinds=("decode", "torch")))
    assert {job.kind for job in few} == {"decode", "torch"}


def test_what_does_not_fit_is_dropped_and_told(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(nsa.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        def run(left):
            now[0] += seconds
            return [{"left": left}]

        return run

    schedule = nsa.Schedule(100, 0.0)
    assert schedule(nsa.Job("attention", 4096, takes(30))) == [{"left": 100}]
    assert schedule(nsa.Job("attention", 1024, takes(10)))  # at most 30
    assert schedule(nsa.Job("attention", 2048, takes(40)))  # at most 30 by the one of 4096
    assert not schedule(nsa.Job("attention", 8192, takes(1)))  # four times 30
    assert schedule.dropped == [
        {"job": "attention", "spec": "", "length": 8192, "estimate_s": 120.0, "left_s": 20.0}
    ]
    assert schedule(nsa.Job("layers", 1024, takes(1)))  # 0.8 of the shortest of the attention


@pytest.fixture(scope="module")
def measured():
    """Rows, and the programs that they were measured with."""
    arguments = nsa.Arguments(
        Path("x.json"), implementations=("xla",), overlaps=(0.0, 1.0), samples=2, seconds=0.01, threads=2
    )
    missing = timing.Subject("dense, missing", lambda q: jnp.reshape(q, (-1, 7)), ("q",))
    table = [subjects.nsa(TINY, "xla"), *subjects.peers(TINY, 4096)[:1], missing]
    built, build = {}, timing.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "build", lambda *args: built.update(build(*args)) or built)
        return nsa.timed(arguments, TINY, table, subjects.draw(TINY)), built


def test_every_part_is_timed_at_every_overlap_and_failures_have_reasons(measured):
    rows, _ = measured
    timed = [(row["name"], row["overlap"], row["part"]) for row in rows if "median_s" in row]
    own = [("nsa [xla]", overlap, part) for overlap in (0.0, 1.0) for part in timing.PARTS]
    assert timed == own + [("dense, all scores kept", None, part) for part in timing.PARTS]
    assert all(len(row["samples_s"]) >= 1 and row["median_s"] > 0 for row in rows if "median_s" in row)
    (failed,) = [row for row in rows if "reason" in row]
    assert failed["name"] == "dense, missing"
    json.dumps(rows)


def test_the_choice_is_in_what_is_timed(measured):
    """Though given blocks are read in place of those that are chosen."""
    _, built = measured
    data = subjects.draw(TINY) | subjects.given(TINY, 0.5)
    subject = subjects.nsa(TINY, "xla")
    moving, fixed = timing.operands(subject, data)
    _, branches = nsa_attention(*moving, **TINY.sizes)
    for chosen in (
        built[subject.name]["forward"].call(*moving, *fixed)[1],
        built[subject.name]["saving"].call(moving, fixed)[2],
    ):
        np.testing.assert_array_equal(chosen, branches.indices)


@pytest.mark.slow
def test_backward_from_residuals_gives_the_gradients_of_one_program(measured):
    _, built = measured
    for subject in (subjects.nsa(TINY, "xla"), subjects.peers(TINY, 4096)[0]):
        data = subjects.draw(TINY) | subjects.given(TINY, 0.5)
        moving, fixed = timing.operands(subject, data)
        out, pull, _ = built[subject.name]["saving"].call(moving, fixed)
        expected_out, expected = jax.jit(timing.gradients(subject))(moving, fixed, data["d_out"])
        found = built[subject.name]["backward"].call(pull, data["d_out"])
        for x, y in zip((out, *found), (expected_out, *expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_dense_peer_is_the_attention_of_a_long_window():
    data = subjects.draw(TINY)
    args = [data[name] for name in subjects.DENSE]
    expected = window_attention(*args, window=TINY.length)
    np.testing.assert_allclose(subjects.kept_scores(*args), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_of_each_kind_runs():
    table, data = layers.layers(TINY, "xla")
    for subject in table:
        moving, fixed = timing.operands(subject, data)
        out, _ = jax.eval_shape(subject.function, *moving, *fixed)
        assert out.shape == (1, TINY.length, layers.WIDTH)


def test_samples_are_taken_in_turn():
    calls = []

    def sample(who, seconds):
        def run():
            calls.append(who)
            return alternating.Taken(seconds)

        return run

    walls = lambda found: [taken.seconds for taken in found]

    own, theirs = alternating.alternate(sample("a", 1.0), sample("b", 2.0), samples=5, seconds=9.5)
    assert (walls(own), walls(theirs)) == ([1.0] * 3, [2.0] * 3)  # and the first of each, which warms up
    assert calls == ["a", "b"] * 4
    own, theirs = alternating.alternate(sample("a", 20.0), sample("b", 90.0), samples=5, seconds=1.0)
    assert (walls(own), walls(theirs)) == (
        [20.0],
        [90.0],
    )  # the first ones count: minutes are not spent on warming up
    own, theirs = alternating.alternate(sample("a", 2.0), sample("b", 20.0), samples=5, seconds=1.0)
    assert walls(own) == [2.0]
    assert set(walls(theirs)) == {20.0}


def test_torch_answers_sample_by_sample(tmp_path, monkeypatch):
    """With a script in its place that says what nsa_torch.py says."""
    script = tmp_path / "nsa_torch.py"
    script.write_text(
        "import json, sys\n"
        "print(json.dumps({'name': 'dense, fake', 'torch_threads': 2}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'seconds': {'forward': 2.0, 'both': 5.0}[line.strip()]}), flush=True)\n"
    )
    monkeypatch.setattr(alternating, "__file__", str(tmp_path / "nsa_parts" / "alternating.py"))
    arguments = nsa.Arguments(Path("x.json"), ("xla",), torch_python=Path(sys.executable), samples=1)
    own, theirs = nsa.beside_torch(arguments, TINY, ("forward",))
    assert (own["name"], own["part"]) == ("nsa [xla]", "forward")
    assert own["first_call_s"] > own["median_s"] > 0
    assert own["median_cpu_s"] > 0
    assert "median_cpu_s" not in theirs  # the fake does not say it
    assert (theirs["name"], theirs["median_s"], theirs["torch_threads"]) == ("dense, fake", 2.0, 2)


def test_a_torch_that_is_not_there_gives_a_row_with_its_reason():
    for python, reason in (
        (sys.executable, "No module named 'torch'"),
        ("nowhere/python", "FileNotFoundError"),
    ):
        arguments = nsa.Arguments(Path("x.json"), torch_python=Path(python))
        for (row,) in (
            nsa.torch_rows(arguments, TINY, 60.0),
            nsa.beside_torch(arguments, TINY, ("forward",)),
        ):
            assert reason in row["reason"]
            assert row["name"] == "torch"
