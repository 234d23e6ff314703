"""Anchor re-weighting: attention from the place of the answer to each label word, times a learned factor.

Source: Wang et al. 2023 (arXiv 2305.14160), section 3.1, appendices G and H: A^(q, p_i) = exp(beta_i) A(q,
p_i) after the softmax, nothing renormalised, one beta for each layer, head and label. The model is frozen:
its weights are not differentiated, layers are recomputed in the backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxlab.errors import UserError
from jaxlab.icl.cutting import check_one_softmax
from jaxlab.models import Batch, ModelConfig, Params, Probe, forward

LessonLoss = Literal["labels", "vocabulary"]


class Lesson(NamedTuple):
    """Training prompts of S seeds, N each; a seed's own weights are learned from its own prompts."""

    tokens: Int[Array | np.ndarray, "S N T"]
    positions: Int[Array | np.ndarray, "S N"]
    label_words: Int[Array | np.ndarray, "S N T"]
    """Of which label a token is, -1 of none."""
    label_tokens: Int[Array | np.ndarray, "S N C"]
    labels: Int[Array | np.ndarray, "S N"]


def anchor_probe(
    beta: Float[Array | np.ndarray, "B L H C"],
    positions: Int[Array | np.ndarray, " B"],
    label_words: Int[Array | np.ndarray, "B T"],
) -> Probe:
    """Factors exp(beta) on the edges from label words to `positions`, 1 on all others."""
    labels = beta.shape[-1]
    at_answer = jnp.arange(label_words.shape[1])[None] == positions[:, None]
    classes = jnp.where(at_answer, labels, label_words)
    factors = jnp.ones((*beta.shape[:3], labels + 1, labels + 1), jnp.float32)
    factors = factors.at[..., labels, :labels].set(jnp.exp(beta.astype(jnp.float32)))
    return Probe(factors=factors.swapaxes(0, 1), classes=classes.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames="config")
def reweighted_logits(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    positions: Int[Array | np.ndarray, " B"],
    label_words: Int[Array | np.ndarray, "B T"],
    beta: Float[Array | np.ndarray, "L H C"],
) -> Float[Array, "B V"]:
    """Logits at `positions` with re-weighted attention; beta of 0 leaves the model as it is."""
    positions, label_words = jnp.asarray(positions), jnp.asarray(label_words)
    each = jnp.broadcast_to(jnp.asarray(beta)[None], (len(positions), *beta.shape))
    probe = anchor_probe(each, positions, label_words)
    return forward(params, batch, config, probe=probe, logit_positions=positions[:, None]).logits[:, 0]


def learn_anchor_weights(
    params: Params,
    config: ModelConfig,
    lesson: Lesson,
    seeds: tuple[int, ...],
    *,
    epochs: int = 10,
    learning_rate: float = 0.01,
    loss: LessonLoss = "labels",
    advance: Callable[[], Any] = lambda: None,
) -> tuple[Float[np.ndarray, "S L H C"], Float[np.ndarray, "epochs S"]]:
    """Betas of each seed, by Adam from 0, one prompt a step, in an order that is drawn anew each epoch.

    The seeds are mapped over: one program makes a step of all of them, and each seed's weights are what they
    would be if it were alone.

    Args:
      seeds: of the order of the prompts, as many as the lesson has.
      loss: cross-entropy among the label tokens, or over the vocabulary.
      advance: called after each epoch.

    Returns:
      The betas, and the mean loss in each epoch.

    Raises:
      UserError: attention that takes no factors, or a loss that is no number.
    """
    check_one_softmax(config, "re-weighting: weights are multiplied")
    count, prompts = lesson.labels.shape
    shape = (count, config.num_layers, config.num_heads, lesson.label_tokens.shape[-1])
    optimizer = optax.adam(learning_rate)
    beta = jnp.zeros(shape, jnp.float32)
    state = optimizer.init(beta)
    frugal = dataclasses.replace(config, remat="layer")
    lesson = Lesson(*map(jnp.asarray, lesson))
    orders = [np.random.default_rng((seed, 3)) for seed in seeds]
    losses = []
    for _ in range(epochs):
        order = np.stack([rng.permutation(prompts) for rng in orders], axis=1)
        beta, state, found = _epoch(params, frugal, lesson, order, beta, state, learning_rate, loss)
        losses.append(np.asarray(found, np.float64).mean(0))
        if not np.isfinite(losses[-1]).all():
            raise UserError("re-weighting: the loss is no number; the model's logits hold NaN or infinity")
        advance()
    return np.asarray(beta), np.stack(losses) if losses else np.zeros((0, count))


def learning_memory(
    params: Params, config: ModelConfig, seeds: int, prompts: int, length: int, labels: int
) -> int:
    """Bytes of temporaries on one device while betas are learned, from compiling alone.

    Args:
      params: arrays, or their shapes.
      seeds: that learn at once.
      prompts: of each to learn from.
      length: of a prompt, padded.
      labels: in all.
    """
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    of_tokens, of_prompts = integers(seeds, prompts, length), integers(seeds, prompts)
    shapes: Any = (of_tokens, of_prompts, of_tokens, integers(seeds, prompts, labels), of_prompts)
    beta = jax.ShapeDtypeStruct((seeds, config.num_layers, config.num_heads, labels), jnp.float32)
    state = jax.eval_shape(optax.adam(0.01).init, beta)
    frugal = dataclasses.replace(config, remat="layer")
    order = integers(prompts, seeds)
    lowered = _epoch.lower(params, frugal, Lesson(*shapes), order, beta, state, 0.01, "labels")
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return int(memory.temp_size_in_bytes)


@functools.partial(
    jax.jit, static_argnames=("config", "learning_rate", "loss"), donate_argnames=("beta", "state")
)
def _epoch(
    params: Params,
    config: ModelConfig,
    lesson: Lesson,
    order: Int[Array | np.ndarray, "N S"],
    beta: Float[Array, "S L H C"],
    state: Any,
    learning_rate: float,
    loss: LessonLoss,
) -> tuple[Array, Any, Float[Array, "N S"]]:
    optimizer = optax.adam(learning_rate)

    def step(carry: tuple[Any, Any], chosen: Any) -> tuple[tuple[Any, Any], Array]:
        beta, state = carry
        prompts = jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), chosen], lesson)
        (_, each), slope = jax.value_and_grad(_loss, has_aux=True)(beta, params, config, prompts, loss)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax mixes weak and strong types in its bias correction
            updates, state = optimizer.update(slope, state)
            beta = optax.apply_updates(beta, updates)
        return (beta, state), each

    (learned, state), losses = jax.lax.scan(step, (beta, state), order)
    return learned, state, losses


def _loss(
    beta: Array, params: Params, config: ModelConfig, prompts: Lesson, kind: LessonLoss
) -> tuple[Array, Float[Array, " S"]]:
    """Sum over seeds, and of each. A row of the batch is one seed's prompt: rows do not mix, so the gradient
    of each seed's betas is that of its own loss, as under `jax.vmap` and without its extra axis."""
    probe = anchor_probe(beta, prompts.positions, prompts.label_words)
    batch: Batch = {"tokens": prompts.tokens}
    output = forward(params, batch, config, probe=probe, logit_positions=prompts.positions[:, None])
    logits, right = output.logits[:, 0], jnp.asarray(prompts.labels)[:, None]
    if kind == "labels":
        logits = jnp.take_along_axis(logits, prompts.label_tokens, axis=1)
    else:
        right = jnp.take_along_axis(prompts.label_tokens, right, axis=1)
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), right, axis=1)[:, 0]
    return jnp.sum(each), each
