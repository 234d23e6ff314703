"""Attention timed by length: what is timed is attention, and how times become results."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from jaxlab.errors import ConfigError
from jaxlab.evaluation import AttentionSpeedConfig, attention_speed, attention_speed_memory
from jaxlab.tasks import execute, main
from kernels_pallas.nsa import nsa_attention

SMALL = AttentionSpeedConfig(
    lengths=(40, 72),
    num_heads=2,
    head_dim=4,
    block_len=8,
    stride=4,
    block_size=8,
    num_blocks=4,
    window=8,
    rounds=3,
)


def plain(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Another attention in NSA's place, of the same operands: compiling NSA takes most of the time."""
    other = lambda q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates: plain(q, k_win, v_win)
    monkeypatch.setattr(attention_speed, "nsa_of", lambda config: other)


def test_what_is_timed_as_nsa_is_nsa(monkeypatch):
    operands = attention_speed._draw(SMALL, 24, "float32", dense=False)
    sizes = {
        name: getattr(SMALL, name) for name in ("block_len", "stride", "block_size", "num_blocks", "window")
    }
    shape = jax.eval_shape(lambda *given: nsa_attention(*given, **sizes)[0], *operands[:-1])
    assert shape.shape == operands[-1].shape
    calls = []
    noted = lambda *given, **named: (calls.append((given, named)), ("out", "branches"))[1]
    monkeypatch.setattr(attention_speed, "nsa_attention", noted)
    assert attention_speed.nsa_of(SMALL)(*operands[:-1]) == "out"
    ((given, named),) = calls
    assert named == sizes
    assert all(x is y for x, y in zip(given, operands[:-1], strict=True))


@pytest.mark.parametrize("length", [24, 72])  # one stretch of queries, and three of which one is not whole
def test_dense_candidates_are_causal_attention(length, monkeypatch):
    monkeypatch.setattr(attention_speed, "STRETCH", 32)
    operands = attention_speed._draw(SMALL, length, "float32", dense=True)
    expected = jax.jit(attention_speed._both(plain))(*operands)
    for attention in attention_speed.dense_candidates("cpu", "float32").values():
        got = jax.jit(attention_speed._both(attention))(*operands)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_cudnn_is_a_candidate_where_it_runs():
    names = lambda *given: list(attention_speed.dense_candidates(*given))
    assert names("gpu", "bfloat16")[0] == "cudnn"
    assert "cudnn" not in names("gpu", "float32") + names("cpu", "bfloat16") + names("tpu", "bfloat16")


def test_results(tmp_path, monkeypatch, quickly_compiled):
    clock = itertools.count()
    names = list(attention_speed.dense_candidates("cpu", "float32"))
    kinds = dict.fromkeys(names, plain)
    monkeypatch.setattr(attention_speed, "dense_candidates", lambda *_: kinds)
    monkeypatch.setattr(attention_speed, "_sample", lambda *_: (1.0 + next(clock), 0.5))
    done = execute("attention-speed", SMALL, outputs=tmp_path)
    results = json.loads((done.path / "results.json").read_text())
    assert results["dtype"] == "float32"
    assert {(row["attention"], row["length"], row["part"]) for row in results["rows"]} == {
        (kind, length, part)
        for kind in ("nsa", "dense")
        for length in (40, 72)
        for part in ("forward", "forward_backward")
    }
    for row in results["rows"]:
        assert row["seconds"] == row["samples"][1]  # the median of three that rise
        assert np.diff(row["samples"]).tolist() == [4.0, 4.0]  # four programs, in turn
        assert row["processor_seconds"] == 0.5
        assert row["temporary_bytes"] > 0
    assert results["dense"] in names
    assert {row["name"] for row in results["dense_tried"]} == set(names)


def test_the_fastest_dense_attention_is_taken(monkeypatch, quickly_compiled):
    slow = lambda attention: lambda *operands: attention(*operands)
    kinds = {"slow": slow(plain), "fast": plain}
    monkeypatch.setattr(attention_speed, "dense_candidates", lambda *_: kinds)
    given = iter([{"slow": [(1.0, 2.0)]}, {"fast": [(3.0, 1.0)]}])  # by processor time on a CPU
    rows = {(kind, part): [(1.0, 1.0)] for kind in ("nsa", "dense") for part in attention_speed.PARTS}
    monkeypatch.setattr(attention_speed, "_in_turn", lambda calls, rounds: next(given, rows))
    one = dataclasses.replace(SMALL, lengths=(40,))
    assert attention_speed.measure_attention_speed(one)["dense"] == "fast"


def test_check_compiles_for_shapes_alone(monkeypatch, quickly_compiled):
    monkeypatch.setattr(attention_speed, "_draw", None)
    one = dataclasses.replace(SMALL, lengths=(40,))
    assert min(attention_speed_memory(one)["40"].values()) > 0


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--lengths", "8"], "lengths"),
        (["--num-kv-heads", "3"], "num_kv_heads"),
        (["--rounds", "0"], "rounds"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(words, key, capsys, tmp_path):
    file = tmp_path / "speed.yaml"
    file.write_text("lengths: [2048]\n")
    assert main(["attention-speed", str(file), *words, "--check"]) == 2
    assert key in capsys.readouterr().err
    with pytest.raises(ConfigError):
        dataclasses.replace(SMALL, num_heads=0)
