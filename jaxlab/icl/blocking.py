"""Blocking: nothing flows to the label words in the first or in the last layers, and what the answers then
are.

Source: Wang et al. 2023 (arXiv 2305.14160), section 2.2 and figure 4. What is blocked where is data, so one
compiled program serves every setting.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import UserError
from jaxlab.icl.inputs import checked_places, prepared
from jaxlab.icl.saliency import check_attention, target_logits
from jaxlab.models import Batch, ModelConfig, Params, Probe
from kernels_pallas.flow import Blocking


@dataclass(frozen=True)
class Setting:
    """What is blocked in which layers."""

    words: Literal["label", "random"]
    where: Literal["first", "last"]
    layers: int

    def layer_mask(self, num_layers: int) -> Bool[np.ndarray, " L"]:
        layer = np.arange(num_layers)
        return layer < self.layers if self.where == "first" else layer >= num_layers - self.layers


def blocking_settings(layers: Iterable[int]) -> list[Setting]:
    """Label words and random words, in the first and in the last layers, for each number of layers."""
    return [
        Setting(words, where, n)
        for n in layers
        for where in ("first", "last")
        for words in ("label", "random")
    ]


def random_words(
    rng: np.random.Generator, label_words: Bool[np.ndarray, "B T"], others: Bool[np.ndarray, "B T"]
) -> Bool[np.ndarray, "B T"]:
    """The control: in each row as many of the `others` as there are label words (all of them, if they are
    fewer)."""
    order = np.argsort(np.where(others, rng.random(others.shape), 2.0), axis=1)
    rank = np.argsort(order, axis=1)
    return (rank < label_words.sum(1, keepdims=True)) & others


def blocked_logits(
    params: Params,
    batch: Mapping[str, Any],
    positions: Int[Array | np.ndarray, " B"],
    layers: Bool[Array | np.ndarray, "E L"],
    words: Bool[Array | np.ndarray, "E B T"],
    config: ModelConfig,
    blocking: Blocking | str = "paper",
) -> Float[Array, "E B V"]:
    """Logits at `positions`, for each of E settings: nothing flows to `words` in `layers`, but from
    themselves.

    `paper`: A(p, i) = 0 for i < p after the softmax. `released_code`: their logits are -10000 before it. A
    setting without layers or words is the model as it is.

    Raises:
      UserError: a batch that the model does not read, attention without blocking, positions outside of it,
        layers or words of other shapes, or an unknown `blocking`.
    """
    check_attention(config, "blocking")
    batch = prepared(batch, config, "blocking")
    positions = checked_places(positions, batch, "positions", "blocking")
    if blocking not in get_args(Blocking):
        raise UserError(f"blocking: {blocking!r} is none of {', '.join(get_args(Blocking))}")
    tokens, settings = batch["tokens"].shape, np.shape(layers)[:1]
    if np.shape(layers) != (*settings, config.num_layers):
        raise UserError(
            f"blocking: layers are bool[E, {config.num_layers}], a mask over the model's layers for each "
            f"setting, not {list(np.shape(layers))}"
        )
    if np.shape(words) != (*settings, *tokens):
        raise UserError(
            f"blocking: words are bool[E, B, T], here {[*settings, *tokens]}, not {list(np.shape(words))}"
        )
    layers, words = jnp.asarray(layers).astype(bool), jnp.asarray(words).astype(bool)
    return _blocked_logits(params, batch, positions, layers, words, config, blocking)


@functools.partial(jax.jit, static_argnames=("config", "blocking"))
def _blocked_logits(
    params: Params,
    batch: Batch,
    positions: Array,
    layers: Array,
    words: Array,
    config: ModelConfig,
    blocking: Any,
) -> Array:
    def one(setting: tuple[Array, Array]) -> Array:
        layer, word = setting
        probe = Probe(blocked=layer[:, None, None] & word[None], blocking=blocking)
        return target_logits(params, batch, config, positions, probe)

    return jax.lax.map(one, (layers, words))


def label_predictions(logits: np.ndarray, label_tokens: Int[np.ndarray, "B C"]) -> Int[np.ndarray, "*E B"]:
    """The most likely of the label words [*E, B], as an index, from logits [*E, B, V]; -1, no prediction,
    where one of the logits is NaN."""
    names = np.broadcast_to(label_tokens, (*logits.shape[:-1], label_tokens.shape[-1]))
    best = np.argmax(np.take_along_axis(logits, names, axis=-1), axis=-1)
    return np.where(np.isnan(logits).any(-1), -1, best)


def word_loyalty(
    logits: Float[np.ndarray, "B V"], reference: Float[np.ndarray, "B V"], top: int = 5
) -> np.ndarray:
    """Jaccard similarity [B] of the `top` most likely next words with those of the reference; NaN where a
    logit is."""
    best, kept = (np.argpartition(-x, top - 1, axis=1)[:, :top] for x in (logits, reference))
    common = (best[:, :, None] == kept[:, None, :]).any(2).sum(1)
    broken = np.isnan(logits).any(1) | np.isnan(reference).any(1)
    return np.where(broken, np.nan, common / (2 * top - common))
