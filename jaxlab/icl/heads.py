"""Which heads carry label flow, and what they are otherwise known for: function-vector and induction scores.

Sources: Todd et al. 2023, "Function Vectors in Large Language Models" (arXiv 2310.15213), section 2: the
indirect effect of a head on prompts whose labels are shuffled. Yin and Steinhardt 2025, "Which Attention
Heads Matter for In-Context Learning?" (arXiv 2502.14010): both scores side by side. Olsson et al. 2022 (arXiv
2209.11895): induction heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.icl.compression import read_context
from jaxlab.models import Batch, ModelConfig, Params, Patch, activations, forward

HEADS_AT_ONCE = 8
"""Heads whose tokens go through the model together; each has a copy of a layer's cache meanwhile."""


def repeated_tokens(
    rng: np.random.Generator, config: ModelConfig, rows: int = 8, half: int = 24
) -> Int[np.ndarray, "B T"]:
    """Random tokens, twice one after the other: what follows can be copied from the first half alone."""
    once = rng.integers(0, config.vocab_size, (rows, half))
    return np.concatenate([once, once], axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
def induction_scores(
    params: Params, tokens: Int[Array | np.ndarray, "B T"], config: ModelConfig
) -> Float[Array, "L H"]:
    """The mean attention, in the second half of repeated tokens, to the token after the same one's first
    occurrence."""
    half = tokens.shape[1] // 2
    pattern = activations(params, {"tokens": tokens}, config, "attention_pattern")["attention_pattern"]
    rows = jnp.arange(half, 2 * half - 1)
    return jnp.mean(pattern[..., rows, rows - half + 1].astype(jnp.float32), axis=(1, 3))


@functools.partial(jax.jit, static_argnames="config")
def head_outputs(
    params: Params, batch: Batch, config: ModelConfig, positions: Int[Array | np.ndarray, " B"]
) -> Float[Array, "B L H D"]:
    """Outputs of the heads at `positions`, before the output projection."""
    found = activations(params, batch, config, "head_output")["head_output"]
    at = jnp.asarray(positions)[None, :, None, None, None]
    return jnp.take_along_axis(found, at, axis=2)[:, :, 0].swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="config")
def patched_logits(
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    config: ModelConfig,
    positions: Int[Array | np.ndarray, " B"],
    means: Float[Array | np.ndarray, "L H D"],
    chosen: Int[Array | np.ndarray, "E 2"],
) -> Float[Array, "E B V"]:
    """Logits at `positions` where one head's output there is its mean: for each of E (layer, head).

    What comes before a token does not change with it: it is read once, and for each head the one token.
    """
    last = jnp.take_along_axis(jnp.asarray(tokens), jnp.asarray(positions)[:, None], axis=1)
    cache = read_context(params, tokens, positions, config)

    def one(which: Array) -> Array:
        layer, head = which[0], which[1]
        value = means[layer, head][None, None, None]
        patch = Patch("head_output", layers=layer, value=value, heads=head)
        return forward(params, {"tokens": last}, config, patches=(patch,), cache=cache).logits[:, 0]

    return jax.lax.map(one, jnp.asarray(chosen), batch_size=HEADS_AT_ONCE)


def shuffled_labels(
    rng: np.random.Generator,
    tokens: Int[np.ndarray, "B T"],
    label_words: Int[np.ndarray, "B T"],
    label_tokens: Int[np.ndarray, "B C"],
) -> Int[np.ndarray, "B T"]:
    """Prompts whose demonstrations have other label words: in each row those of the demonstrations are
    changed to a random permutation of the labels without a fixed label, so that they teach nothing right.

    Label words of one token each: what is written is the first token of a label.
    """
    changed = tokens.copy()
    labels = label_tokens.shape[1]
    for row in range(len(tokens)):
        turn = rng.permutation(labels)
        shift = np.empty(labels, np.int64)
        shift[turn] = np.roll(turn, 1)
        at = np.flatnonzero(label_words[row] >= 0)
        changed[row, at] = label_tokens[row, shift[label_words[row, at]]]
    return changed


def indirect_effects(
    plain: Float[Array | np.ndarray, "B V"],
    patched: Float[Array | np.ndarray, "E B V"],
    targets: Int[np.ndarray, " B"],
) -> Float[np.ndarray, " E"]:
    """The mean rise of the right token's probability over the vocabulary (equation 4 of 2310.15213), over the
    prompts whose logits are finite; NaN where none is."""
    probability = lambda x: np.exp(x - np.logaddexp.reduce(x, axis=-1, keepdims=True))
    there = np.isfinite(plain).all(-1) & np.isfinite(patched).all((0, 2))
    if not there.any():
        return np.full(len(patched), np.nan)
    plain, patched, targets = plain[there], patched[:, there], targets[there]
    before = np.take_along_axis(probability(plain), targets[:, None], axis=1)[:, 0]
    index = np.broadcast_to(targets[None, :, None], (*patched.shape[:2], 1))
    return (np.take_along_axis(probability(patched), index, axis=2)[..., 0] - before).mean(1)
