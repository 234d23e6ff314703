"""Error diagnosis: label words whose keys are alike, as the queries see them, are confused.

Source: Wang et al. 2023 (arXiv 2305.14160), section 3.3, equation 11, figure 6, appendices J and K.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.icl.label_attention import LabelPlaces
from jaxlab.icl.ranking import auc, correlation
from jaxlab.models import Batch, ModelConfig, Params, activations


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def queries_and_keys(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    positions: Int[Array | np.ndarray, " B"],
    at: Int[Array | np.ndarray, "B P"],
    layers: tuple[int, ...],
) -> tuple[Float[Array, "B L D"], Float[Array, "B L P D"]]:
    """Queries at `positions` and keys at the tokens `at` of some layers, the query heads one after the other
    (D = H * Dk; a key that several query heads share stands once for each)."""
    found = activations(params, batch, config, ("queries", "keys"), layers=list(layers))
    positions, at = jnp.asarray(positions), jnp.maximum(jnp.asarray(at), 0)
    queries = jnp.take_along_axis(found["queries"], positions[None, :, None, None, None], axis=2)[:, :, 0]
    keys = jnp.take_along_axis(found["keys"], at[None, :, :, None, None], axis=2)
    keys = jnp.repeat(keys, queries.shape[2] // keys.shape[3], axis=3)
    flat = lambda x: x.reshape(*x.shape[:-2], -1).astype(jnp.float32)
    return flat(queries).swapaxes(0, 1), flat(keys).swapaxes(0, 1)


def keys_by_label(
    keys: Float[np.ndarray, "B L P D"], places: LabelPlaces, num_labels: int
) -> Float[np.ndarray, "B L C D"]:
    """The mean key of each label's words; NaN where a prompt has none."""
    one_hot = (places.label[..., None] == np.arange(num_labels)) * places.share[..., None]
    total = one_hot.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (
            np.einsum("blpd,bpc->blcd", keys, one_hot)
            / np.where(total == 0.0, np.nan, total)[:, None, :, None]
        )


def key_features(
    queries: Float[np.ndarray, "N D"], keys: Float[np.ndarray, "C D"], directions: int = 10
) -> Float[np.ndarray, "C M"]:
    """k^ = sigma_m v_m . k: keys along the principal directions v_m of the queries, each times the standard
    deviation of the queries along it (appendix J). M is at most the number of queries less one."""
    queries = np.asarray(queries, np.float64)
    centred = queries - queries.mean(0)
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    count = min(directions, max(1, len(queries) - 1), len(size))
    return np.asarray(keys, np.float64) @ axes[:count].T * (size[:count] / np.sqrt(max(1, len(queries) - 1)))


def predicted_confusion(features: Float[np.ndarray, "C M"]) -> Float[np.ndarray, "C C"]:
    """Distances of the labels' keys over the largest one (equation 11): 0 the most confused; the diagonal,
    which is not defined, is NaN."""
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
    largest = distance.max()
    result = distance / largest if largest > 0.0 else np.full_like(distance, np.nan)
    np.fill_diagonal(result, np.nan)
    return result


def real_confusion(
    label_logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "C C"]:
    """AUC of p_i / (p_i + p_j) on the prompts of labels i or j (appendix K): .5 always confused, 1 never.

    The logarithm of p_i / p_j ranks prompts as p_i / (p_i + p_j) does. NaN where a label has no prompts, and
    on the diagonal.
    """
    count = label_logits.shape[1]
    result = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(count):
            if i != j:
                mine = (labels == i) | (labels == j)
                result[i, j] = auc(label_logits[mine, i] - label_logits[mine, j], labels[mine] == i)
    return result


def confusion_correlation(
    predicted: Float[np.ndarray, "C C"], real: Float[np.ndarray, "C C"]
) -> dict[str, float]:
    """How well one tells the other over the pairs of labels: Pearson's and Spearman's correlation, and
    whether the most confused pair is the same one.

    NaN of fewer than three pairs (two labels have one), and where all pairs are confused alike.
    """
    pairs = np.triu_indices(len(real), 1)
    x, y = predicted[pairs], real[pairs]
    both = np.isfinite(x) & np.isfinite(y)
    worst = float("nan")
    if both.sum() >= 3 and np.ptp(x[both]) > 0.0 and np.ptp(y[both]) > 0.0:
        worst = float(np.argmin(x[both]) == np.argmin(y[both]))
    return {"pearson": correlation(x, y), "spearman": correlation(x, y, ranks=True), "same_worst_pair": worst}
