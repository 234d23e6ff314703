"""Information flow of in-context learning: saliency by layer, as sums over pairs of token classes or as maps.

Source: Wang et al. 2023, "Label Words are Anchors" (arXiv 2305.14160), section 2.1. One gradient with respect
to the taps of jaxlab.models.probe gives all layers; weights are not differentiated, layers are recomputed in
the backward pass.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.costs import bytes_per_device
from jaxlab.errors import UserError
from jaxlab.icl.roles import Roles
from jaxlab.models import Batch, ModelConfig, Params, Probe, as_arrays, check_tokens, forward

Reduction = Literal["abs_of_sum", "sum_of_abs"]
Loss = Literal["labels", "vocabulary"]
NsaEdges = Literal["token", "block"]


class _Options(NamedTuple):
    loss: Loss
    reduction: Reduction = "abs_of_sum"
    nsa_edges: NsaEdges = "token"
    num_classes: int = 0


def flows(
    params: Params,
    batch: Mapping[str, Any],
    config: ModelConfig,
    classes: Int[Array | np.ndarray, "B T"],
    targets: Mapping[str, Any],
    *,
    reduction: Reduction = "abs_of_sum",
    loss: Loss = "labels",
    nsa_edges: NsaEdges = "token",
    num_classes: int | None = None,
) -> tuple[Float[Array, "B L K K"], Float[Array, "B L K K"]]:
    """Sums of the flow I_l(i, j) over the edges j < i, from the class of j (column) to the class of i (row).

    Args:
      classes: token class 0..K-1, -1 outside.
      targets: "positions" int32[B], where the answer is read off; "label_tokens" int32[C], or int32[B, C]
        where they differ between prompts; "labels" int32[B], the right answers as indices into label_tokens.
      reduction: over heads, the absolute value of the sum (the paper) or the sum of absolute values (its
        footnote 3).
      loss: cross-entropy among the label tokens, or over the whole vocabulary.
      nsa_edges: the flow from a compressed block of native sparse attention goes in equal parts, or whole, to
        its tokens.
      num_classes: K; by default one more than the largest class, which must then be known, not traced.

    Returns:
      The sums, and the numbers of edges that the attention of the layer can see, of the same shape: sums /
      counts are means. An edge that is not visible (another segment, outside of the window) is not counted.

    Raises:
      UserError: targets lack a key or do not fit the batch, or the embedding has no row for a token.
    """
    targets = _checked(batch, targets, config)
    if classes.shape != batch["tokens"].shape:
        raise UserError(f"flows: classes are {classes.shape}, tokens {batch['tokens'].shape}")
    if num_classes is None:
        if isinstance(classes, jax.core.Tracer):
            raise UserError("flows: give num_classes where the classes are traced (inside jit or vmap)")
        num_classes = int(classes.max()) + 1
    if num_classes < 1:
        raise UserError("flows: no token has a class; classes are 0, 1, ..., and -1 is outside of all")
    options = _Options(loss, reduction, nsa_edges, num_classes)
    return _flows(params, _arrays(batch), jnp.asarray(classes), targets, config, options)


def saliency_maps(
    params: Params,
    batch: Mapping[str, Any],
    config: ModelConfig,
    targets: Mapping[str, Any],
    *,
    loss: Loss = "labels",
) -> Float[Array, "B L T T"]:
    """I_l [to i, from j] of every layer, the diagonal included. For pictures: memory grows with L * T * T.

    Arguments and errors are those of `flows`.
    """
    return _maps(params, _arrays(batch), _checked(batch, targets, config), config, _Options(loss))


def flow_shares(
    sums: Float[Array | np.ndarray, "*B L K K"], counts: Float[Array | np.ndarray, "*B L K K"], roles: Roles
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Means [*B, L] over the edge sets of the roles, and the shares of S_wp, S_pq and S_ww in their sum.

    A set without visible edges has mean 0. Where all three are 0, so are the shares. Sets beside the three,
    like that of the sink, have no share; `Roles.edge_sets` names them all.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    means = {}
    for name, edges in roles.edge_sets().items():
        means[name] = sums[..., edges].sum(-1) / np.maximum(counts[..., edges].sum(-1), 1.0)
    total = sum((means[name] for name in roles.shared), start=np.zeros(()))
    total = np.where(total > 0.0, total, 1.0)
    return means, {name: means[name] / total for name in roles.shared}


def target_logits(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    positions: Int[Array | np.ndarray, " B"],
    probe: Probe | None = None,
) -> Float[Array, "B V"]:
    """The logits at one position of each sequence."""
    logits, _ = forward(params, batch, config, probe=probe)
    return jnp.take_along_axis(logits, jnp.asarray(positions)[:, None, None], axis=1)[:, 0]


def _loss(params: Params, batch: Batch, config: ModelConfig, targets: Any, kind: Loss, probe: Probe) -> Array:
    """Sum over the batch; sequences do not mix, so the gradient of each is its own."""
    logits = target_logits(params, batch, config, targets["positions"], probe)
    names, labels = targets["label_tokens"], targets["labels"]
    if kind == "labels":
        logits, right = jnp.take_along_axis(logits, names, axis=1), labels
    else:
        right = jnp.take_along_axis(names, labels[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), right[:, None], axis=1))


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _flows(
    params: Params, batch: Batch, classes: Array, targets: Any, config: ModelConfig, options: _Options
) -> tuple[Array, Array]:
    pairs = (config.num_layers, classes.shape[0], options.num_classes, options.num_classes)

    def loss(taps: tuple[Array, Array]) -> Array:
        probe = Probe(*taps, classes=classes, reduction=options.reduction, nsa_edges=options.nsa_edges)
        return _loss(params, batch, _frugal(config), targets, options.loss, probe)

    sums, counts = jax.grad(loss)((jnp.zeros(pairs, jnp.float32), jnp.zeros(pairs, jnp.float32)))
    return sums.swapaxes(0, 1), counts.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _maps(params: Params, batch: Batch, targets: Any, config: ModelConfig, options: _Options) -> Array:
    batch_size, tokens = batch["tokens"].shape

    def loss(tap: Array) -> Array:
        return _loss(params, batch, _frugal(config), targets, options.loss, Probe(map_tap=tap))

    signed = jax.grad(loss)(jnp.zeros((config.num_layers, batch_size, tokens, tokens), jnp.float32))
    return jnp.abs(signed).swapaxes(0, 1)


def flow_memory(
    config: ModelConfig,
    batch_size: int,
    tokens: int,
    num_labels: int,
    roles: Roles,
    *,
    params: Params,
) -> tuple[int, int]:
    """(bytes of the parameters, bytes of XLA's temporaries) of `flows` on one device, from compiling it
    alone.

    Args:
      params: shapes, dtypes and shardings; those of a mesh under `jaxlab.models.using(mesh)`.
    """
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    targets = {
        "positions": integers(batch_size),
        "label_tokens": integers(batch_size, num_labels),
        "labels": integers(batch_size),
    }
    sequences = integers(batch_size, tokens)
    options = _Options("labels", num_classes=roles.classes)
    compiled = _flows.lower(params, {"tokens": sequences}, sequences, targets, config, options).compile()
    size = bytes_per_device(params)
    memory = compiled.memory_analysis()
    assert memory is not None
    return size, int(memory.temp_size_in_bytes)


def _frugal(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, remat="layer")


def _arrays(batch: Mapping[str, Any]) -> Batch:
    """What the forward pass reads, as arrays, so that a batch with more in it is not another program."""
    read = ("tokens", "segment_ids", "positions", "images")
    return as_arrays(cast(Batch, {name: value for name, value in batch.items() if name in read}))


def _checked(batch: Mapping[str, Any], targets: Mapping[str, Any], config: ModelConfig) -> dict[str, Array]:
    try:
        check_tokens(batch["tokens"], config)
    except ValueError as error:
        raise UserError(f"flows: {error}") from None
    missing = {"positions", "label_tokens", "labels"} - set(targets)
    if missing:
        raise UserError(f"flows: targets lack {', '.join(sorted(missing))}")
    size = batch["tokens"].shape[0]
    positions, names, labels = (
        jnp.asarray(targets[n]).astype(jnp.int32) for n in ("positions", "label_tokens", "labels")
    )
    if names.ndim == 1:
        names = jnp.broadcast_to(names[None], (size, names.shape[0]))
    if positions.shape != (size,) or labels.shape != (size,) or names.ndim != 2 or names.shape[0] != size:
        raise UserError(
            f"flows: for {size} sequences positions and labels must be [{size}] and label_tokens [C] or "
            f"[{size}, C], but they are {positions.shape}, {labels.shape} and {names.shape}"
        )
    return {"positions": positions, "label_tokens": names, "labels": labels}
