"""Counting by hand: keys that are read, floating-point operations, seconds."""

import dataclasses
import time

import jax
import pytest

from jaxlab.costs.flops import attended_tokens, peak_flops, train_flops_per_token
from jaxlab.models import H2O, ExactBlocks, ExactTokens, InfLLM, Quest
from jaxlab.training.speed import Stopwatch
from tests.models.tiny import NSA, make_config


def test_attended_tokens_by_counting():
    assert attended_tokens(make_config(), 5) == (1 + 2 + 3 + 4 + 5) / 5
    assert attended_tokens(make_config("sliding"), 5) == (1 + 2 + 3 + 3 + 3) / 5
    total = 0
    for t in range(20):
        own = t // NSA.block_size
        blocks = [own, *range(own)][: NSA.num_blocks]  # any choice that holds the query's own
        total += sum(1 for s in range(t + 1) if s // NSA.block_size in blocks)
        total += sum(1 for start in range(0, 20, NSA.stride) if start + NSA.block_len - 1 <= t)
        total += min(t + 1, NSA.window)
    assert attended_tokens(make_config("nsa"), 20) == pytest.approx(total / 20)
    two = dataclasses.replace(NSA, branches=("window", "compression"))
    window = sum(min(t + 1, NSA.window) for t in range(20))
    blocks = sum(max(0, (t + 1 - NSA.block_len) // NSA.stride + 1) for t in range(20))
    assert attended_tokens(make_config("nsa", attention=two), 20) == pytest.approx((window + blocks) / 20)


def test_flops_by_hand():
    layer = 12 * 4 * 4 + 12 * 2 * 4 + 12 * 2 * 6 + 4 * 6 * 12 + 3 * 12 * 8 + 2 * 12
    expected = 6 * (2 * layer + 13 * 12 + 2 * 4 * (4 + 6) * 3.0)
    assert train_flops_per_token(make_config(), 5) == expected
    # Compression runs once per block and key/value head: two heads over a stride of two is once a token.
    nsa = make_config("nsa", attention_bias=False)
    compress = sum(4 * d + 4 * d * 4 + 4 + 4 * d + d for d in (4, 6))
    nsa_layer = layer + 2 * (12 * 2 * 4 + 12 * 2 * 6) + 12 * 4 * 3 + 4 * 3 + compress
    expected = 6 * (2 * nsa_layer + 13 * 12 + 2 * 4 * (4 + 6) * attended_tokens(nsa, 20))
    assert train_flops_per_token(nsa, 20) == pytest.approx(expected)
    # A mean has no parameters, and an indexer of 3 heads of 5 for each of two groups scores every token.
    mean = make_config("nsa", attention_bias=False, attention=dataclasses.replace(NSA, compress_kind="mean"))
    expected -= 6 * 2 * compress
    assert train_flops_per_token(mean, 20) == pytest.approx(expected)
    sizes = {"selector": "indexer", "selector_dim": 5, "selector_heads": 3}
    indexed = make_config(
        "nsa", attention_bias=False, attention=dataclasses.replace(NSA, compress_kind="mean", **sizes)
    )
    expected += 6 * 2 * (12 * 6 * 5 + 12 * 5 + 12 * 6 + 6 * 5 * 21 / 2)
    assert train_flops_per_token(indexed, 20) == pytest.approx(expected)


def test_peak_is_measured_on_a_cpu():
    flops, source = peak_flops(jax.devices()[:1])
    assert 1e8 < flops < 1e14
    assert "measured float32 matmul" in source


def test_stopwatch_measures_whole_stretches_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    assert watch.read() is None
    for _ in range(4):
        now[0] += 0.5
        watch.step()
    assert watch.read() == 0.5
    watch.step()
    now[0] += 100.0  # an evaluation
    watch.restart()
    assert watch.read() is None


@pytest.mark.parametrize("method", [ExactTokens, ExactBlocks, Quest, InfLLM, H2O])
def test_sparsity_at_inference_reads_its_budget(method):
    sparsity = method(block_size=4, num_blocks=3)
    # Of tokens exactly 12 once there are as many; of blocks two whole ones and the query's own, not yet full.
    of_blocks = [t + 1 if t < 12 else 8 + t % 4 + 1 for t in range(18)]
    of_tokens = [min(t + 1, 12) for t in range(18)]
    expected = of_tokens if method in (ExactTokens, H2O) else of_blocks
    assert attended_tokens(make_config(sparsity=sparsity), 18) == pytest.approx(sum(expected) / 18)
