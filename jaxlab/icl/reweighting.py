"""Anchor re-weighting: attention from the place of the answer to each label word, times a learned factor.

Source: Wang et al. 2023 (arXiv 2305.14160), section 3.1, appendices G and H: A^(q, p_i) = exp(beta_i) A(q,
p_i) after the softmax, nothing renormalised, one beta for each layer, head and label.

Betas change what the last token reads and nothing before it: all other tokens of a prompt are read once, and
a step of learning computes one token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxlab.errors import UserError
from jaxlab.icl.compression import read_on, read_shared
from jaxlab.icl.cutting import check_one_softmax
from jaxlab.models import Batch, Cache, ModelConfig, Params, Probe, forward, init_cache

LessonLoss = Literal["labels", "vocabulary"]


class Lesson(NamedTuple):
    """Training prompts of S seeds, N each; a seed's own weights are learned from its own prompts."""

    tokens: Int[Array | np.ndarray, "S N T"]
    positions: Int[Array | np.ndarray, "S N"]
    label_words: Int[Array | np.ndarray, "S N T"]
    """Of which label a token is, -1 of none."""
    label_tokens: Int[Array | np.ndarray, "S N C"]
    labels: Int[Array | np.ndarray, "S N"]


class Asked(NamedTuple):
    """Prompts read but for their last token: of this one alone does the answer depend on betas, since its
    query is the only one whose attention they change."""

    cache: Cache
    """Of B prompts, with room for the last token."""
    token: Int[Array, " B"]
    """The last one."""
    label_words: Int[Array, "B S"]
    """Of which label the token of a slot is, -1 of none."""


def reweighted_logits(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    positions: Int[Array | np.ndarray, " B"],
    label_words: Int[Array | np.ndarray, "B T"],
    beta: Float[Array | np.ndarray, "L H C"],
    starts: Int[np.ndarray, " B"] | None = None,
) -> Float[Array, "B V"]:
    """Logits at `positions` with re-weighted attention; beta of 0 leaves the model as it is.

    Args:
      starts: where the query of each prompt begins: what all have in common before it is read once.
    """
    each = jnp.broadcast_to(jnp.asarray(beta)[None], (len(positions), *beta.shape))
    return answer(params, ask(params, batch["tokens"], positions, label_words, config, starts), each, config)


def ask(
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, " B"],
    label_words: Int[Array | np.ndarray, "B T"],
    config: ModelConfig,
    starts: Int[np.ndarray, " B"] | None = None,
) -> Asked:
    """Reads prompts up to the token before `positions`; `starts` as in `reweighted_logits`."""
    tokens, positions, label_words = (np.asarray(x, np.int32) for x in (tokens, positions, label_words))
    found = None if starts is None else read_shared(params, tokens, starts, positions, config)
    if found is None:
        cache = read_on(params, init_cache(config, *tokens.shape), tokens, positions, config)
    else:
        cache = read_on(params, found.cache, found.query, found.last, config)
    slots = np.full((len(tokens), cache.slots), -1, np.int32)  # a token's slot is its place in the prompt
    slots[:, : label_words.shape[1]] = label_words[:, : cache.slots]
    slots = np.where(np.arange(cache.slots) < positions[:, None], slots, -1)
    last = tokens[np.arange(len(tokens)), positions]
    return Asked(cache, jnp.asarray(last), jnp.asarray(slots))


def _factors(beta: Float[Array | np.ndarray, "B L H C"]) -> Float[Array, "L B H K K"]:
    """exp(beta) on the edges from label words to the last token, whose class follows on theirs: K = C + 1."""
    labels = beta.shape[-1]
    factors = jnp.ones((*beta.shape[:3], labels + 1, labels + 1), jnp.float32)
    factors = factors.at[..., labels, :labels].set(jnp.exp(beta.astype(jnp.float32)))
    return factors.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="config")
def answer(
    params: Params, asked: Asked, beta: Float[Array | np.ndarray, "B L H C"], config: ModelConfig
) -> Float[Array, "B V"]:
    """Logits of the last tokens, each with betas of its own; nothing else is computed anew."""
    labels = beta.shape[-1]
    probe = Probe(
        factors=_factors(beta),
        classes=jnp.full((len(asked.token), 1), labels, jnp.int32),
        slot_classes=asked.label_words,
    )
    batch: Batch = {"tokens": asked.token[:, None]}
    return forward(params, batch, config, cache=asked.cache, probe=probe).logits[:, 0]


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
    of_seeds = zip(*(np.asarray(x) for x in lesson[:3]), strict=True)
    asked = [ask(params, tokens, last, words, config) for tokens, last, words in of_seeds]
    pupils = Pupils(_joined(asked), jnp.asarray(lesson.label_tokens), jnp.asarray(lesson.labels))
    del asked
    orders = [np.random.default_rng((seed, 3)) for seed in seeds]
    losses = []
    for _ in range(epochs):
        order = np.stack([rng.permutation(prompts) for rng in orders], axis=1)
        beta, state, found = _epoch(params, config, pupils, order, beta, state, learning_rate, loss)
        losses.append(np.asarray(found, np.float64).mean(0))
        if not np.isfinite(losses[-1]).all():
            raise UserError("re-weighting: the loss is no number; the model's logits hold NaN or infinity")
        advance()
    return np.asarray(beta), np.stack(losses) if losses else np.zeros((0, count))


def learning_memory(
    params: Params, config: ModelConfig, seeds: int, prompts: int, length: int, labels: int
) -> int:
    """Bytes on one device while betas are learned, from compiling alone: the keys and values of all prompts,
    and temporaries.

    Args:
      params: arrays, or their shapes.
      seeds: that learn at once.
      prompts: of each to learn from.
      length: of a prompt, padded.
      labels: in all.
    """
    integers: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    rows = seeds * prompts
    empty = lambda rows: jax.eval_shape(lambda: init_cache(config, rows, length))
    asked = Asked(empty(rows), integers(rows), integers(rows, length))
    pupils = Pupils(asked, integers(seeds, prompts, labels), integers(seeds, prompts))
    beta = jax.ShapeDtypeStruct((seeds, config.num_layers, config.num_heads, labels), jnp.float32)
    state = jax.eval_shape(optax.adam(0.01).init, beta)
    learning = _epoch.lower(params, config, pupils, integers(prompts, seeds), beta, state, 0.01, "labels")
    reading = read_on.lower(params, empty(prompts), integers(prompts, length), integers(prompts), config)
    temporary = []
    for lowered in (learning, reading):
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        temporary.append(int(memory.temp_size_in_bytes))
    # While the caches of seeds are joined each is there twice.
    return 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(asked)) + max(temporary)


class Pupils(NamedTuple):
    """What is learned from: S seeds with N prompts each, one after the other."""

    asked: Asked
    """B = S N."""
    label_tokens: Int[Array, "S N C"]
    labels: Int[Array, "S N"]


def _joined(asked: Sequence[Asked]) -> Asked:
    """The prompts of all, one after the other."""
    layers = [cast(tuple[Array, Array], one.cache.layers) for one in asked]
    keys, values = (jnp.concatenate(parts, axis=1) for parts in zip(*layers, strict=True))
    length, offset, token, words = (
        jnp.concatenate(parts)
        for parts in zip(
            *((one.cache.length, one.cache.offset, one.token, one.label_words) for one in asked), strict=True
        )
    )
    return Asked(Cache((keys, values), length, offset), token, words)


def _chosen(asked: Asked, rows: Int[Array, " B"]) -> Asked:
    keys, values = cast(tuple[Array, Array], asked.cache.layers)
    cache = Cache((keys[:, rows], values[:, rows]), asked.cache.length[rows], asked.cache.offset[rows])
    return Asked(cache, asked.token[rows], asked.label_words[rows])


@functools.partial(
    jax.jit, static_argnames=("config", "learning_rate", "loss"), donate_argnames=("beta", "state")
)
def _epoch(
    params: Params,
    config: ModelConfig,
    pupils: Pupils,
    order: Int[Array | np.ndarray, "N S"],
    beta: Float[Array, "S L H C"],
    state: Any,
    learning_rate: float,
    loss: LessonLoss,
) -> tuple[Array, Any, Float[Array, "N S"]]:
    optimizer = optax.adam(learning_rate)

    def step(carry: tuple[Any, Any], chosen: Any) -> tuple[tuple[Any, Any], Array]:
        beta, state = carry
        seed = jnp.arange(len(chosen))
        asked = _chosen(pupils.asked, seed * order.shape[0] + chosen)
        names, right = pupils.label_tokens[seed, chosen], pupils.labels[seed, chosen]
        gradient = jax.value_and_grad(_loss, has_aux=True)
        (_, each), slope = gradient(beta, params, config, asked, names, right, loss)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax mixes weak and strong types in its bias correction
            updates, state = optimizer.update(slope, state)
            beta = optax.apply_updates(beta, updates)
        return (beta, state), each

    (learned, state), losses = jax.lax.scan(step, (beta, state), order)
    return learned, state, losses


def _loss(
    beta: Float[Array, "S L H C"],
    params: Params,
    config: ModelConfig,
    asked: Asked,
    label_tokens: Int[Array, "S C"],
    labels: Int[Array, " S"],
    kind: LessonLoss,
) -> tuple[Array, Float[Array, " S"]]:
    """Sum over seeds, and of each. A row of the batch is one seed's prompt: rows do not mix, so the gradient
    of each seed's betas is that of its own loss, as under `jax.vmap` and without its extra axis."""
    logits, right = answer(params, asked, beta, config), labels[:, None]
    if kind == "labels":
        logits = jnp.take_along_axis(logits, label_tokens, axis=1)
    else:
        right = jnp.take_along_axis(label_tokens, right, axis=1)
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), right, axis=1)[:, 0]
    return jnp.sum(each), each
