"""Attention from the place of the answer to the label words, and how well it predicts the answer.

Source: Wang et al. 2023 (arXiv 2305.14160), section 2.3, figure 5, appendix E. The weights of one query are
read out of every layer; no T x T array is built for them.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.icl.inputs import checked_places, prepared
from jaxlab.icl.ranking import one_vs_one, one_vs_rest
from jaxlab.models import Batch, ModelConfig, Params, Probe, forward


class LabelPlaces(NamedTuple):
    """Where the label words of a batch stand; -1 fills rows up that have fewer."""

    at: Int[np.ndarray, "B P"]
    """The token."""
    label: Int[np.ndarray, "B P"]
    """Of which label it is."""
    share: Float[np.ndarray, "B P"]
    """Its part in its label word: one over the tokens that carry it."""


def label_places(
    label_words: Int[np.ndarray, "B T"], demonstrations: Int[np.ndarray, "B T"] | None = None
) -> LabelPlaces:
    """The places of the label words, those of each row in their order.

    Args:
      label_words: of which label a token is, -1 of none.
      demonstrations: of which demonstration it is, to tell the tokens of one label word from those of
        another; None: each is a label word of its own.
    """
    rows, length = label_words.shape
    count = max(1, int((label_words >= 0).sum(1).max(initial=0)))
    order = np.argsort(np.where(label_words >= 0, 0, 1), axis=1, kind="stable")[:, :count]
    label = np.take_along_axis(label_words, order, axis=1)
    at = np.where(label >= 0, order, -1)
    share = (label >= 0).astype(np.float64)
    if demonstrations is not None and length:
        of = np.where(label >= 0, np.take_along_axis(demonstrations, order, axis=1), -1)
        same = (of[:, :, None] == of[:, None, :]) & (label >= 0)[:, None, :]
        share = share / np.maximum(same.sum(2), 1)
    return LabelPlaces(at.astype(np.int32), label.astype(np.int32).reshape(rows, count), share)


def attention_at(
    params: Params,
    batch: Mapping[str, Any],
    config: ModelConfig,
    positions: Int[Array | np.ndarray, " B"],
    at: Int[Array | np.ndarray, "B P"],
) -> tuple[Float[Array, "B V"], Float[Array, "B L H P"]]:
    """Logits at `positions`, and the attention weights from there to the tokens `at` (0 where that is -1).

    Raises:
      UserError: a batch that the model does not read, shapes that do not fit it, or places outside of it.
      ValueError: attention that is not one softmax over all tokens (native sparse attention).
    """
    batch = prepared(batch, config, "attention_at")
    positions = checked_places(positions, batch, "positions", "attention_at")
    at = checked_places(at, batch, "at", "attention_at", least=-1)
    return _attention_at(params, batch, config, positions, at)


@functools.partial(jax.jit, static_argnames="config")
def _attention_at(
    params: Params, batch: Batch, config: ModelConfig, positions: Array, at: Array
) -> tuple[Array, Array]:
    probe = Probe(read_from=positions, read_at=at)
    output = forward(params, batch, config, probe=probe, logit_positions=positions[:, None])
    assert output.weights_read is not None
    return output.logits[:, 0], output.weights_read.swapaxes(0, 1)


def attention_by_label(
    weights: Float[Array | np.ndarray, "B L H P"], places: LabelPlaces, num_labels: int
) -> Float[np.ndarray, "B L C"]:
    """A_l(q, p_i): summed over heads, and over the demonstrations of a label (appendix E); of a label word of
    several tokens that carry it, their mean."""
    one_hot = (places.label[..., None] == np.arange(num_labels)) * places.share[..., None]
    return np.einsum("blhp,bpc->blc", np.asarray(weights, np.float64), one_hot)


def aucroc(
    scores: Float[np.ndarray, "N L C"],
    predicted: Int[np.ndarray, " N"],
    mode: Literal["paper", "released_code"] = "paper",
    one_demonstration: bool = False,
) -> Float[np.ndarray, " L"]:
    """AUCROC_l: how well the scores of a layer tell the label that the model itself predicts; NaN in all
    layers where it predicts one label alone.

    Args:
      mode: `paper`: one label against the rest, mean over the labels that are predicted. `released_code`: one
        against one, of the scores' shares.
      one_demonstration: in `released_code`, whether each label has one: its notebook then takes values in
        the order of layers for values in the order of labels, so that they stand in wrong places.
    """
    count, layers, labels = scores.shape
    if mode == "released_code" and one_demonstration:
        scores = scores.swapaxes(1, 2).reshape(count, layers, labels)
    measure = one_vs_rest if mode == "paper" else one_vs_one
    return np.array([measure(scores[:, layer], predicted) for layer in range(layers)])


def accumulated(by_layer: Float[np.ndarray, "*S L"]) -> Float[np.ndarray, "*S L"]:
    """R_l: what the layers up to l add to AUCROC above chance, as a share of what all add (equation 6)."""
    above = np.cumsum(np.asarray(by_layer, np.float64) - 0.5, axis=-1)
    whole = above[..., -1:]
    return above / np.where(whole == 0.0, np.nan, whole)
