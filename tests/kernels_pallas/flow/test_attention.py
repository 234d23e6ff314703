"""Flows and blocking of probed attention against dense attention with explicit multipliers and autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlab.models.full_attention import softmax_attention
from kernels_pallas.flow import Probe, flow_attention, nsa_flow_attention
from kernels_pallas.nsa import compressed_attention, num_compressed, select_blocks
from tests.kernels_pallas.nsa import oracle as nsa_oracle

CLASSES = 4


def draw(tokens, *, heads=4, kv_heads=2, dim=8, value_dim=6, batch=2, dtype=jnp.float32, seed=0):
    """q, k, v, the cotangent of the output, and token classes that include "none"."""
    rng = np.random.default_rng(seed)
    normal = lambda h, d: jnp.asarray(rng.normal(size=(batch, tokens, h, d)), dtype)
    q, k, v = normal(heads, dim), normal(kv_heads, dim), normal(kv_heads, value_dim)
    classes = jnp.asarray(rng.integers(-1, CLASSES, (batch, tokens)), jnp.int32)
    return q, k, v, normal(heads, value_dim), classes


def segments(batch, tokens):
    """Two sequences, then padding; where the cuts are differs between rows."""
    cuts = [(tokens // 3 + b, tokens - tokens // 5 - b) for b in range(batch)]
    return jnp.asarray([[1] * a + [2] * (b - a) + [0] * (tokens - b) for a, b in cuts], jnp.int32)


def mask_of(tokens, window=None, segment_ids=None):
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None]
    mask = (j <= i)[None] if window is None else ((j <= i) & (i - j < window))[None]
    if segment_ids is not None:
        s = np.asarray(segment_ids)
        mask = mask & (s[:, :, None] == s[:, None]) & (s != 0)[:, :, None]
    return mask


def dense(q, k, v, ones, mask, keep=None):
    """Attention whose weights are multiplied by `ones` [B, H, T, S]."""
    share = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    weights = jnp.where(jnp.any(mask, axis=-1)[:, None, :, None], weights, 0.0)
    if keep is not None:
        weights = jnp.where(keep[:, None], weights, 0.0)
    return jnp.einsum("bhts,bshd->bthd", weights * ones, v)


@jax.jit
def autodiff(q, k, v, cotangent, mask, keep=None):
    """Output, cotangents of q, k, v, and A * dL/dA of every head as the gradient of explicit ones."""
    ones = jnp.ones((q.shape[0], q.shape[2], q.shape[1], q.shape[1]), jnp.float32)
    out, pull = jax.vjp(lambda *inputs: dense(*inputs, mask, keep), q, k, v, ones)
    *inputs, per_head = pull(cotangent)
    return out, inputs, per_head


def class_sums(flow, classes):
    """Sums of a map [B, T, T] over the edges j < i by pairs of classes: plain loops."""
    sums = np.zeros((flow.shape[0], CLASSES, CLASSES))
    for b, i, j in zip(*np.nonzero(np.broadcast_to(np.tri(flow.shape[1], k=-1), flow.shape)), strict=True):
        if classes[b, i] >= 0 and classes[b, j] >= 0:
            sums[b, classes[b, i], classes[b, j]] += flow[b, i, j]
    return sums


def taps(batch, tokens):
    pair = jnp.zeros((batch, CLASSES, CLASSES), jnp.float32)
    return {"class_tap": pair, "count_tap": pair, "map_tap": jnp.zeros((batch, tokens, tokens), jnp.float32)}


def probe_gradients(q, k, v, cotangent, classes, *, reduction="abs_of_sum", blocked=None, **kwargs):
    """Cotangents of q, k, v and of the three taps."""

    @jax.jit
    def gradients(q, k, v, tap):
        probe = Probe(**tap, classes=classes, reduction=reduction, blocked=blocked)
        out, pull = jax.vjp(lambda q, k, v, probe: flow_attention(q, k, v, probe, **kwargs), q, k, v, probe)
        *inputs, d_probe = pull(cotangent)
        return out, inputs, (d_probe.class_tap, d_probe.count_tap, d_probe.map_tap)

    return gradients(q, k, v, taps(q.shape[0], q.shape[1]))


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("tokens", "rows", "window", "packed", "heads", "kv_heads", "reduction"),
    [
        (1, None, None, False, 2, 2, "abs_of_sum"),
        (2, None, None, False, 4, 1, "sum_of_abs"),
        (17, 9, None, True, 4, 2, "abs_of_sum"),
        (65, None, 1, False, 2, 2, "abs_of_sum"),
        (65, 33, 9, True, 4, 4, "sum_of_abs"),
        (130, 15, None, False, 4, 2, "abs_of_sum"),
    ],
)
def test_flows_are_those_of_autodiff(tokens, rows, window, packed, heads, kv_heads, reduction):
    q, k, v, cotangent, classes = draw(tokens, heads=heads, kv_heads=kv_heads)
    segment_ids = segments(2, tokens) if packed else None
    mask = mask_of(tokens, window, segment_ids)
    want_out, want_inputs, per_head = autodiff(q, k, v, cotangent, mask)
    signed = np.asarray(per_head).sum(1)
    flow = np.abs(signed) if reduction == "abs_of_sum" else np.abs(per_head).sum(1)

    out, inputs, (sums, counts, picture) = probe_gradients(
        q, k, v, cotangent, classes, reduction=reduction, rows=rows, window=window, segment_ids=segment_ids
    )
    close(out, want_out)
    for got, want in zip(inputs, want_inputs, strict=True):
        close(got, want)
    close(picture, signed)
    close(sums, class_sums(flow, np.asarray(classes)), 1e-4)
    np.testing.assert_array_equal(
        counts, class_sums(np.broadcast_to(mask, flow.shape).astype(np.float32), np.asarray(classes))
    )


@pytest.mark.slow  # of test_probe.py's reductions, the case that is told apart by eye
def test_absolute_value_comes_after_the_heads():
    """Two heads whose flows cancel: their sum is 0, the sum of their absolute values is not."""
    q, k, v, cotangent, classes = draw(9, heads=2, kv_heads=1, batch=1)
    q, cotangent = q.at[:, :, 1].set(q[:, :, 0]), cotangent.at[:, :, 1].set(-cotangent[:, :, 0])
    _, _, (after, _, picture) = probe_gradients(q, k, v, cotangent, classes)
    _, _, (before, _, _) = probe_gradients(q, k, v, cotangent, classes, reduction="sum_of_abs")
    assert np.max(np.asarray(after)) < 1e-6
    assert np.max(np.abs(picture)) < 1e-6
    assert np.max(np.asarray(before)) > 0.1


def test_bfloat16_inputs():
    q, k, v, cotangent, classes = draw(33, dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in (q, k, v, cotangent)]
    out, inputs, tapped = probe_gradients(q, k, v, cotangent, classes)
    want_out, want_inputs, want_tapped = probe_gradients(*exact, classes)
    assert all(x.dtype == jnp.bfloat16 for x in (out, *inputs))
    for got, want in zip((out, *inputs), (want_out, *want_inputs), strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
    for got, want in zip(tapped, want_tapped, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow  # beside the gradients of plain attention above
def test_agrees_with_jax_and_with_numeric_gradients():
    q, k, v, _, _ = draw(21, value_dim=8)
    window = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(4, 0))
    attend = jax.jit(lambda *inputs: flow_attention(*map(jnp.asarray, inputs), Probe(), window=5))
    close(attend(q, k, v), window, 1e-5)
    check_grads(attend, (q, k, v), 1, ["rev"], 0.02, 0.02)


def test_sinks_take_weight_and_have_gradients_of_their_own():
    q, k, v, _, _ = draw(21)
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.1], jnp.float32)
    mask = jnp.asarray(np.broadcast_to(mask_of(21, window=5), (2, 21, 21)))
    attend = lambda *inputs: flow_attention(*inputs[:3], Probe(), window=5, sinks=inputs[3], rows=16)
    plain = lambda *inputs: softmax_attention(*inputs[:3], mask, scale=8**-0.5, sinks=inputs[3])
    out, pull = jax.vjp(jax.jit(attend), q, k, v, sinks)
    expected, pull_plain = jax.vjp(jax.jit(plain), q, k, v, sinks)
    close(out, expected, 1e-5)
    for found, want in zip(pull(out), pull_plain(out), strict=True):
        close(found, want, 1e-4)
    assert np.abs(pull(out)[3]).min() > 0.1


def test_blocked_tokens_keep_only_their_own_weight():
    q, k, v, cotangent, classes = draw(18)
    blocked = jnp.zeros((2, 18), bool).at[0, 5].set(True).at[0, 17].set(True).at[1, 0].set(True)
    rows = np.asarray(blocked)[:, :, None]
    keep = ~(rows & np.tri(18, k=-1, dtype=bool)[None])
    want_out, want_inputs, per_head = autodiff(q, k, v, cotangent, mask_of(18), keep)
    out, inputs, (sums, counts, picture) = probe_gradients(
        q, k, v, cotangent, classes, blocked=blocked, rows=5
    )
    close(out, want_out)
    for got, want in zip(inputs, want_inputs, strict=True):
        close(got, want)
    close(picture, np.asarray(per_head).sum(1))
    close(sums, class_sums(np.abs(np.asarray(per_head).sum(1)), np.asarray(classes)), 1e-4)
    np.testing.assert_array_equal(
        counts, class_sums((mask_of(18) & keep).astype(np.float32), np.asarray(classes))
    )
    # The released code renormalises: all the weight that is left is 1, on the token itself.
    renormalised = jax.jit(flow_attention)(q, k, v, Probe(blocked=blocked, blocking="released_code"))
    close(renormalised[0, 5], jnp.repeat(v[0, 5], 2, axis=0), 1e-6)
    close(renormalised[0, :5], out[0, :5], 1e-6)


@functools.partial(jax.jit, static_argnums=(4,))
def memory_probe(q, k, v, cotangent, streamed):
    """Class sums of one layer, by the stream or by autodiff on dense attention."""
    classes = jnp.zeros(q.shape[:2], jnp.int32)
    tokens = q.shape[1]
    if streamed:
        flows = lambda tap: jnp.sum(
            cotangent * flow_attention(q, k, v, Probe(class_tap=tap, classes=classes))
        )
        return jax.grad(flows)(jnp.zeros((q.shape[0], 1, 1), jnp.float32))
    ones = jnp.ones((q.shape[0], q.shape[2], tokens, tokens), jnp.float32)
    place = jnp.arange(tokens)
    mask = (place[:, None] >= place[None, :])[None]
    per_head = jax.grad(lambda ones: jnp.sum(cotangent * dense(q, k, v, ones, mask)))(ones)
    return jnp.sum(jnp.abs(jnp.sum(per_head, axis=1)))


def test_memory_stays_far_below_a_map_per_head():
    shape = jax.ShapeDtypeStruct((1, 1024, 16, 16), jnp.float32)
    used = [
        memory_probe.lower(shape, shape, shape, shape, streamed)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for streamed in (True, False)
    ]
    assert used[0] * 4 < used[1], used


def both(function, cotangent):
    """The function, and its gradient, as one function."""

    def value_and_pulled(*inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangent)

    return value_and_pulled


def nsa_inputs(tokens, sizes, *, packed=False, batch=2, heads=4, kv_heads=2, dim=8, value_dim=6, seed=1):
    rng = np.random.default_rng(seed)
    blocks = num_compressed(tokens, sizes["block_len"], sizes["stride"], packed=packed)
    normal = lambda s, h, d: jnp.asarray(rng.normal(size=(batch, s, h, d)), jnp.float32)
    pairs = [normal(s, kv_heads, d) for s in (blocks, tokens, tokens) for d in (dim, value_dim)]
    q, cotangent = normal(tokens, heads, dim), normal(tokens, heads, value_dim)
    gates = jax.nn.sigmoid(normal(tokens, heads, 3))
    classes = jnp.asarray(rng.integers(-1, CLASSES, (batch, tokens)), jnp.int32)
    return q, pairs, gates, cotangent, classes


def dense_branch(q, k, v, mask, weight, ones):
    """One softmax with a mask per head [B, H, T, S], times the gate `weight` [B, T, H]."""
    share = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    top = jnp.max(jnp.where(mask, scores, -1e9), axis=-1, keepdims=True, initial=-1e9)
    weights = jnp.exp(jnp.where(mask, scores - top, -1e9))
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    weights = weights * weight.transpose(0, 2, 1)[..., None] * ones
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize(
    ("tokens", "packed", "nsa_edges"),
    [
        pytest.param(3, False, "token", marks=pytest.mark.slow),  # no block is whole
        (13, True, "token"),
        pytest.param(41, True, "token", marks=pytest.mark.slow),
        pytest.param(41, False, "block", marks=pytest.mark.slow),
    ],
)
def test_flows_through_native_sparse_attention(tokens, packed, nsa_edges):
    sizes = {"block_len": 4, "stride": 2, "block_size": 6, "num_blocks": 3, "window": 5}
    q, pairs, gates, cotangent, classes = nsa_inputs(tokens, sizes, packed=packed)
    segment_ids = segments(2, tokens) if packed else None
    heads, blocks = q.shape[2], pairs[0].shape[1]

    base = np.broadcast_to(mask_of(tokens, None, segment_ids), (2, tokens, tokens))[:, None]
    base = np.broadcast_to(base, (2, heads, tokens, tokens))
    recent = base & (np.arange(tokens)[:, None] - np.arange(tokens) < sizes["window"])
    spans, own_block = np.zeros((2, blocks, tokens), bool), np.zeros((2, tokens), int)
    for row in range(2):
        ids = None if segment_ids is None else segment_ids[row]
        own_block[row] = (np.arange(tokens) - nsa_oracle.text_of(tokens, ids)) // sizes["block_size"]
        for slot, start in nsa_oracle.compressed_slots(tokens, 4, 2, ids).items():
            spans[row, slot, start : start + sizes["block_len"]] = True
    covered = np.all(base[:, :, :, None] | ~spans[:, None, None], axis=-1) & spans.any(-1)[:, None, None]
    _, lse = compressed_attention(q, *pairs[:2], block_len=4, stride=2, segment_ids=segment_ids)
    indices = select_blocks(
        q,
        pairs[0],
        lse,
        block_len=4,
        stride=2,
        block_size=6,
        num_blocks=3,
        segment_ids=segment_ids,
        kv_len=tokens,
    )
    listed = (np.asarray(indices)[..., None] == own_block[:, None, None, None]).any(-2)
    chosen = base & np.repeat(listed, heads // 2, axis=1)
    masks = [covered, chosen, recent]

    def dense_nsa(q, *inputs):
        *pairs, gates, multipliers = inputs
        parts = zip(pairs[::2], pairs[1::2], masks, multipliers, range(3), strict=True)
        return sum(dense_branch(q, k, v, jnp.asarray(m), gates[..., c], one) for k, v, m, one, c in parts)

    multipliers = [jnp.ones((2, heads, tokens, m.shape[-1]), jnp.float32) for m in masks]
    want_out, (*want_inputs, maps) = jax.jit(both(dense_nsa, cotangent))(q, *pairs, gates, multipliers)
    compressed, selected, window = (np.asarray(x) for x in maps)
    spread = spans / sizes["block_len"] if nsa_edges == "token" else spans
    signed = (compressed @ spread[:, None].astype(np.float32) + selected + window).sum(1)
    edges = ((covered @ spans[:, None]) | chosen | recent).any(1)

    def run(*inputs):
        *tensors, gates, tap = inputs
        probe = Probe(**tap, classes=classes, nsa_edges=nsa_edges)
        return nsa_flow_attention(*tensors, gates, probe, segment_ids=segment_ids, rows=21, **sizes)

    out, (*d_inputs, tapped) = jax.jit(both(run, cotangent))(q, *pairs, gates, taps(2, tokens))
    close(out, want_out)
    for got, want in zip(d_inputs, want_inputs, strict=True):
        close(got, want)
    close(tapped["map_tap"], signed)
    close(tapped["class_tap"], class_sums(np.abs(signed), np.asarray(classes)), 1e-4)
    np.testing.assert_array_equal(
        tapped["count_tap"], class_sums(edges.astype(np.float32), np.asarray(classes))
    )
