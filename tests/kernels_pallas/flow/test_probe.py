"""What a probe reads and changes beyond the plain flows: heads, signs, softcaps, images that see themselves
whole, factors on weights. Against dense attention with explicit multipliers and autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flow import Probe, flow_attention, read_weights

BATCH, TOKENS, HEADS, KV_HEADS, CLASSES, WINDOW, CAP = 2, 21, 4, 2, 3, 6, 1.5


def draw(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda h, d: jnp.asarray(rng.normal(size=(BATCH, TOKENS, h, d)), jnp.float32)
    classes = jnp.asarray(rng.integers(-1, CLASSES, (BATCH, TOKENS)), jnp.int32)
    together = jnp.asarray(np.repeat([[0, 1, 1, 1, 0, 2, 2]], BATCH, 0).repeat(3, 1), jnp.int32)
    return normal(HEADS, 8), normal(KV_HEADS, 8), normal(KV_HEADS, 6), normal(HEADS, 6), classes, together


def mask_of(together=None, window=None, in_window=False):
    behind = np.arange(TOKENS)[:, None] - np.arange(TOKENS)[None]
    mask = np.broadcast_to(behind >= 0, (BATCH, TOKENS, TOKENS))
    if window is not None and not in_window:
        mask = mask & (behind < window)
    if together is not None:
        together = np.asarray(together)
        mask = mask | ((together[:, :, None] == together[:, None]) & (together > 0)[:, :, None])
    return mask & (behind < window) if window is not None and in_window else mask


def dense(q, k, v, ones, mask, cap=None):
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8.0).astype(np.float32)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights * ones, v)


@jax.jit
def autodiff(q, k, v, cotangent, mask):
    """Output, and cotangents of q, k, v and explicit ones, of softcapped attention."""
    ones = jnp.ones((BATCH, HEADS, TOKENS, TOKENS), jnp.float32)
    out, pull = jax.vjp(lambda *x: dense(*x, mask, CAP), q, k, v, ones)
    return out, pull(cotangent)


def one_hot(classes):
    return np.eye(CLASSES)[np.asarray(classes)] * (np.asarray(classes) >= 0)[..., None]


def by_class(flow, classes):
    """[B, H, T, T] -> [B, H, K, K] over the edges j < i."""
    hot = one_hot(classes)
    return np.einsum("bhij,bix,bjy->bhxy", flow * np.tri(TOKENS, k=-1), hot, hot)


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("images", "window", "in_window", "rows"),
    [
        (True, None, False, 11),
        (True, WINDOW, True, 5),
        (True, WINDOW, False, None),
        (False, WINDOW, False, 5),
    ],
)
def test_softcaps_and_images_that_see_themselves_whole(images, window, in_window, rows):
    q, k, v, cotangent, classes, together = draw()
    together = together if images else None
    mask = mask_of(together, window, in_window)
    expected, (*d_inputs, per_head) = autodiff(q, k, v, cotangent, mask)

    def attend(q, k, v, taps):
        probe = Probe(**taps, classes=classes)
        more = {"window": window, "together": together, "together_in_window": in_window, "softcap": CAP}
        return flow_attention(q, k, v, probe, rows=rows, **more)

    pair = jnp.zeros((BATCH, CLASSES, CLASSES), jnp.float32)
    taps = {"class_tap": pair, "count_tap": pair, "map_tap": jnp.zeros((BATCH, TOKENS, TOKENS))}

    @jax.jit
    def both(*inputs):
        out, pull = jax.vjp(attend, *inputs)
        return out, pull(cotangent)

    out, (*found, tapped) = both(q, k, v, taps)
    close(out, expected)
    for x, y in zip(found, d_inputs, strict=True):
        close(x, y)
    signed = np.asarray(per_head).sum(1)
    close(tapped["map_tap"], signed)
    close(tapped["class_tap"], by_class(np.abs(signed)[:, None], classes)[:, 0], 1e-4)
    np.testing.assert_array_equal(tapped["count_tap"], by_class(mask[:, None] * 1.0, classes)[:, 0])


def test_reductions_heads_and_signs():
    """Every reduction from one P: of heads together or apart, absolute or not."""
    q, k, v, cotangent, classes, _ = draw(1)
    ones = jnp.ones((BATCH, HEADS, TOKENS, TOKENS), jnp.float32)
    per_head = jax.grad(lambda x: jnp.sum(dense(q, k, v, x, mask_of()) * cotangent))(ones)
    per_head = np.asarray(per_head)
    signed, absolute = by_class(per_head, classes), by_class(np.abs(per_head), classes)
    of_sum = by_class(np.abs(np.asarray(per_head).sum(1, keepdims=True)), classes)[:, 0]
    expected = {
        ("abs_of_sum", False, False): of_sum,
        ("sum_of_abs", False, False): absolute.sum(1),
        ("mean_abs", False, False): absolute.mean(1),
        ("abs_of_sum", True, False): signed.sum(1),
        ("mean_abs", True, False): signed.mean(1),
        ("abs_of_sum", False, True): absolute,
        ("abs_of_sum", True, True): signed,
    }
    shapes = {False: (BATCH, CLASSES, CLASSES), True: (BATCH, HEADS, CLASSES, CLASSES)}
    for (reduction, sign, heads), sums in expected.items():
        rows = 11 if sign != heads else None  # one of each is added up over tiles
        tapped = lambda tap, r=reduction, s=sign, rows=rows: jnp.sum(
            flow_attention(q, k, v, Probe(class_tap=tap, classes=classes, reduction=r, signed=s), rows=rows)
            * cotangent
        )
        close(jax.jit(jax.grad(tapped))(jnp.zeros(shapes[heads], jnp.float32)), sums, 1e-4)
    with pytest.raises(ValueError, match="reduction must be one of abs_of_sum, sum_of_abs, mean_abs, not"):
        Probe(reduction="abs_of_sums")


def test_factors_are_those_of_dense_attention_and_have_its_gradient():
    q, k, v, cotangent, classes, _ = draw(2)
    rng = np.random.default_rng(3)
    factors = jnp.asarray(rng.uniform(0.2, 3.0, (BATCH, HEADS, CLASSES, CLASSES)), jnp.float32)
    hot, mask = one_hot(classes).astype(np.float32), mask_of()
    classed = np.einsum("bix,bjy->bij", hot, hot) * np.tri(TOKENS, k=-1)

    def multiplied(q, k, v, factors):
        each = jnp.einsum("bhxy,bix,bjy->bhij", factors, hot, hot)
        return dense(q, k, v, jnp.where(classed[:, None] > 0, each, 1.0), mask)

    attend = lambda q, k, v, f: flow_attention(q, k, v, Probe(factors=f, classes=classes), rows=5)

    @functools.partial(jax.jit, static_argnums=0)
    def both_of(function, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangent)

    expected, pulled_dense = both_of(multiplied, q, k, v, factors)
    out, pulled = both_of(attend, q, k, v, factors)
    close(out, expected)
    for found, wanted in zip(pulled, pulled_dense, strict=True):
        close(found, wanted, 1e-4)
    several = jnp.stack([factors, jnp.ones_like(factors)])
    both = jax.jit(jax.vmap(attend, (None, None, None, 0)))(q, k, v, several)
    close(both[0], expected)
    close(both[1], jax.jit(flow_attention)(q, k, v, Probe()), 1e-6)


def test_weights_of_one_query():
    q, k, _, _, _, _ = draw(4)
    sinks = jnp.asarray([0.3, -1.0, 2.0, 0.0], jnp.float32)
    read_from, read_at = jnp.asarray([20, 7], jnp.int32), jnp.asarray([[3, 19, -1], [7, 2, 9]], jnp.int32)
    seen = jnp.asarray(mask_of(window=9)[np.arange(BATCH), read_from])
    found = read_weights(q, k, read_from, read_at, seen, softcap=CAP, sinks=sinks)
    shared = np.repeat(np.asarray(k), HEADS // KV_HEADS, 2)
    for b in range(BATCH):
        for h in range(HEADS):
            scores = np.asarray(q)[b, int(read_from[b]), h] @ shared[b, :, h].T / np.sqrt(8.0)
            scores = np.where(seen[b], CAP * np.tanh(scores / CAP), -np.inf)
            weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(sinks[h]))
            expected = [weights[n] if n >= 0 else 0.0 for n in np.asarray(read_at)[b]]
            close(found[b, h], expected, 1e-6)
    assert found[0, 0, 0] == 0.0  # outside of the window
