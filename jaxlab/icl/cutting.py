"""Edges cut by the classes of their tokens: A(i, j) = 0 after the softmax, in chosen layers.

Blocking (jaxlab/icl/blocking.py) cuts what flows into words; here also what flows from them, and between any
two classes. What is cut where is data, so one compiled program serves every setting.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import UserError
from jaxlab.icl.ranking import correlation
from jaxlab.models import Batch, ModelConfig, Params, Probe, forward

Edges = Literal["into", "from", "to_last"]


def check_one_softmax(config: ModelConfig, what: str) -> None:
    """Refuse attention whose weights cannot be read, cut or multiplied one by one.

    Args:
      what: is done with the weights, as the message begins.

    Raises:
      UserError: it is native sparse attention, or sparse at inference.
    """
    if "nsa" in config.kinds or config.sparsity is not None:
        kind = "native sparse" if "nsa" in config.kinds else "sparse at inference"
        raise UserError(f"{what} in one softmax over all tokens; the model's attention is {kind}")


@functools.partial(jax.jit, static_argnames="config")
def cut_logits(
    params: Params,
    batch: Batch,
    positions: Int[Array | np.ndarray, " B"],
    classes: Int[Array | np.ndarray, "E B T"],
    cut: Bool[Array | np.ndarray, "E L K K"],
    config: ModelConfig,
) -> Float[Array, "E B V"]:
    """Logits at `positions` for each of E settings, in which edges j < i are cut in layer l where `cut` says
    so of [l, class of i, class of j]. A setting that cuts nothing is the model as it is.

    Args:
      classes: token class 0..K-1; of -1 nothing is cut.
    """
    positions = jnp.asarray(positions)
    layers, count = config.num_layers, cut.shape[-1]

    def one(setting: tuple[Array, Array]) -> Array:
        of_tokens, edges = setting
        keep = 1.0 - edges.astype(jnp.float32)[:, None, None]
        keep = jnp.broadcast_to(keep, (layers, len(positions), config.num_heads, count, count))
        probe = Probe(factors=keep, classes=of_tokens)
        return forward(params, batch, config, probe=probe, logit_positions=positions[:, None]).logits[:, 0]

    return jax.lax.map(one, (jnp.asarray(classes, jnp.int32), jnp.asarray(cut)))


def cut_of_words(
    words: Bool[np.ndarray, "B T"],
    positions: Int[np.ndarray, " B"],
    layers: Bool[np.ndarray, " L"],
    edges: Edges,
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "L 3 3"]]:
    """Classes and cut for `cut_logits`: of edges into the words, from them to any token, or to the last."""
    at = np.arange(words.shape[1])[None] == positions[:, None]
    classes = np.where(at, 2, words.astype(np.int32)).astype(np.int32)
    pairs = np.zeros((3, 3), bool)
    if edges == "into":
        pairs[1, :] = True
    elif edges == "from":
        pairs[:, 1] = True
    else:
        pairs[2, 1] = True
    return classes, layers[:, None, None] & pairs


def single_cuts(visible: Bool[np.ndarray, "L K K"]) -> Bool[np.ndarray, "E L K K"]:
    """One setting for each layer and pair of classes that has edges."""
    where = np.argwhere(visible)
    cut = np.zeros((len(where), *visible.shape), bool)
    cut[(np.arange(len(where)), *where.T)] = True
    return cut


def label_loss(
    logits: Float[np.ndarray, "*E B V"], label_tokens: Int[np.ndarray, "B C"], labels: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "*E B"]:
    """Cross-entropy among the label tokens."""
    names = np.broadcast_to(label_tokens, (*logits.shape[:-1], label_tokens.shape[-1]))
    chosen = np.take_along_axis(np.asarray(logits, np.float64), names, axis=-1)
    right = np.take_along_axis(chosen, np.broadcast_to(labels[:, None], (*chosen.shape[:-1], 1)), axis=-1)
    return np.logaddexp.reduce(chosen, axis=-1) - right[..., 0]


def vocabulary_loss(
    logits: Float[np.ndarray, "*E B V"], label_tokens: Int[np.ndarray, "B C"], labels: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "*E B"]:
    """Cross-entropy over the vocabulary, of the label token that is right."""
    logits = np.asarray(logits, np.float64)
    names = label_tokens[np.arange(len(labels)), labels]
    right = np.take_along_axis(logits, np.broadcast_to(names[:, None], (*logits.shape[:-1], 1)), axis=-1)
    return np.logaddexp.reduce(logits, axis=-1) - right[..., 0]


def faithfulness(flow: Float[np.ndarray, "*E"], effect: Float[np.ndarray, "*E"]) -> dict[str, float]:
    """How well flows tell what cutting their edges does: correlations over layers and pairs of classes of the
    flow with the size of the change of the loss."""
    flow, effect = np.asarray(flow, np.float64), np.abs(np.asarray(effect, np.float64))
    return {"pearson": correlation(flow, effect), "spearman": correlation(flow, effect, ranks=True)}
