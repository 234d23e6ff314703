"""Information flow of in-context learning: saliency by layer, as sums over pairs of token classes or as maps.

Source: Wang et al. 2023, "Label Words are Anchors" (arXiv 2305.14160), section 2.1. One gradient with respect
to the taps of kernels_pallas/flow gives all layers; weights are not differentiated. Layers of long sequences
are recomputed in the backward pass.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.costs import bytes_per_device
from jaxlab.errors import UserError
from jaxlab.icl.inputs import Targets, check_flag, checked_classes, checked_targets, known, prepared
from jaxlab.icl.roles import Roles
from jaxlab.models import Batch, ModelConfig, Params, Probe, forward
from kernels_pallas.flow import Implementation, NsaEdges, Reduction, check_word
from kernels_pallas.target import current_target

Loss = Literal["labels", "vocabulary"]
Remat = Literal["auto", "layer", "elementwise"]
NotFinite = Literal["refuse", "mark"]

KEPT_BYTES = 3 << 29
"""With remat "auto" the matrix products of all layers are kept for the backward pass if they take no more."""
KEPT_LENGTH = 512
"""And if sequences are no longer: from there on memory grows with the layers' inputs alone."""
PART_BYTES = 1 << 28
"""On a CPU, a batch of which more would be kept is cut into parts, one after the other: what is kept is paged
anew in every call, which takes longer than the parts do."""
PART_TOKENS = 512
"""Of a part, at least: with fewer, matrix products are slower."""


class _Options(NamedTuple):
    loss: str
    reduction: str = "abs_of_sum"
    nsa_edges: str = "token"
    num_classes: int = 0
    per_head: bool = False
    signed: bool = False
    remat: Literal["layer", "elementwise"] = "layer"
    implementation: str | None = None
    parts: int = 1
    """Of the batch, one after the other."""


def flows(
    params: Params,
    batch: Mapping[str, Any],
    config: ModelConfig,
    classes: Any,
    targets: Mapping[str, Any],
    *,
    reduction: Reduction | str = "abs_of_sum",
    loss: Loss | str = "labels",
    nsa_edges: NsaEdges | str = "token",
    num_classes: int | None = None,
    per_head: bool = False,
    signed: bool = False,
    remat: Remat | str = "auto",
    implementation: Implementation | str | None = None,
    not_finite: NotFinite | str = "refuse",
) -> tuple[Float[Array, "B L *H K K"], Float[Array, "B L *H K K"]]:
    """Sums of the flow I_l(i, j) over the edges j < i, from the class of j (column) to the class of i (row).

    Values are checked before anything is compiled; where they are traced (inside `jit` or `vmap`) they are
    believed. Numbers may be lists, NumPy's or JAX's.

    Args:
      batch: all that the model reads, as `forward` takes it: images and what the family's processor gives
        beside them too.
      classes: int[B, T], token class 0..K-1, -1 outside. Padding has none.
      targets: "positions" int[B], where the answer is read off; "label_tokens" int[C], or int[B, C] where
        they differ between prompts; "labels" int[B], the right answers as indices into label_tokens.
        Positions and labels may be int[B, P] alike, -1 none: their losses are summed, as for the tokens of a
        generation. For each on its own, call once for each.
      reduction: over heads, the absolute value of the sum (the paper), the sum of absolute values (its
        footnote 3), or their mean.
      loss: cross-entropy among the label tokens, or over the whole vocabulary.
      nsa_edges: the flow from a compressed block of native sparse attention goes in equal parts, or whole, to
        its tokens.
      num_classes: K; by default one more than the largest class, which must then be known, not traced.
      per_head: each query head apart, on an axis H after L.
      signed: no absolute values.
      remat: what the backward pass recomputes (`ModelConfig.remat`): "layer" takes memory for the inputs of
        layers alone, and more time than "elementwise", which keeps matrix products; "auto" keeps those of
        sequences up to KEPT_LENGTH where they take up to KEPT_BYTES. On a CPU, batches of text are then
        cut into parts (PART_BYTES).
      implementation: of full and sliding attention with flows: "xla", or "mosaic_gpu" on a Hopper GPU, in
        bfloat16; None: XLA.
      not_finite: what is done about a sequence whose loss or flows hold NaN or infinity: "refuse" all, or
        "mark" it, whose sums are then NaN throughout; the others are as they are without it.

    Returns:
      The sums, and the numbers of edges that the attention of the layer can see, of the same shape: sums /
      counts are means. An edge that is not visible (another segment, outside of the window) is not counted.
      Layers that read images from outside of the text (Mllama) have no such edges and are not among L.

    Raises:
      UserError: an unknown word; targets or classes that do not fit the batch, are outside of their range or
        in padding; a token that the embedding has no row for; attention without flows; or NaN in weights or
        logits.
      NotImplementedError: the named implementation cannot take the model's attention.
    """
    check_attention(config, "flows")
    check_flag("per_head", per_head, "flows")
    check_flag("signed", signed, "flows")
    batch = prepared(batch, config, "flows")
    options = _checked_options(loss, remat, config, batch)
    try:
        check_word("reduction", reduction, get_args(Reduction))
        check_word("nsa_edges", nsa_edges, get_args(NsaEdges))
        check_word("not_finite", not_finite, get_args(NotFinite))
        if implementation is not None:
            check_word("implementation", implementation, get_args(Implementation))
    except ValueError as error:
        raise UserError(f"flows: {error}") from None
    checked = checked_targets(targets, batch, config, "flows")
    _check_labels(checked, options.loss)
    by_token, count = checked_classes(classes, num_classes, batch, "flows")
    options = options._replace(
        reduction=reduction,
        nsa_edges=nsa_edges,
        num_classes=count,
        per_head=per_head,
        signed=signed,
        implementation=implementation,
    )
    sums, counts, losses = _flows(params, batch, by_token, checked, config, options)
    if not_finite == "mark":
        good = jnp.isfinite(losses) & jnp.isfinite(sums).all(range(1, sums.ndim))
        return jnp.where(jnp.expand_dims(good, range(1, sums.ndim)), sums, jnp.nan), counts
    _check_finite(params, losses, sums)
    return sums, counts


def saliency_maps(
    params: Params,
    batch: Mapping[str, Any],
    config: ModelConfig,
    targets: Mapping[str, Any],
    *,
    loss: Loss | str = "labels",
    signed: bool = False,
) -> Float[Array, "B L T T"]:
    """I_l [to i, from j] of every layer, the diagonal included. For pictures: memory grows with L * T * T.

    Args:
      params: as for `flows`, and so all others.
      batch: with all that the model reads.
      config: of the model.
      targets: where the answers are read off, and what they are.
      loss: among the label tokens, or over the vocabulary.
      signed: P itself, no absolute values.

    Raises:
      UserError: as `flows`.
    """
    check_attention(config, "saliency_maps")
    batch = prepared(batch, config, "saliency_maps")
    options = _checked_options(loss, "layer", config, batch)
    checked = checked_targets(targets, batch, config, "saliency_maps")
    _check_labels(checked, options.loss)
    maps, losses = _maps(params, batch, checked, config, options)
    _check_finite(params, losses, maps)
    return maps if signed else jnp.abs(maps)


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
    """The logits at one position of each sequence; those of others are never built."""
    at = jnp.asarray(positions)[:, None]
    return forward(params, batch, config, probe=probe, logit_positions=at).logits[:, 0]


def _loss(
    params: Params, batch: Batch, config: ModelConfig, targets: Targets, kind: str, probe: Probe
) -> tuple[Array, Array]:
    """The sum over the batch, and the loss of each [B]; sequences do not mix, so the gradient of each is its
    own."""
    places, right = targets.positions, jnp.maximum(targets.labels, 0)
    names = targets.label_tokens if kind == "labels" else None
    if names is None:
        right = jnp.take_along_axis(targets.label_tokens, right, axis=1)
    at = jnp.maximum(places, 0)
    logits = forward(params, batch, config, probe=probe, logit_positions=at, logit_tokens=names).logits
    likely = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), right[:, :, None], axis=2)[:, :, 0]
    read = jnp.where(places >= 0, likely, 0.0)
    return -jnp.sum(read), -jnp.sum(read, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _flows(
    params: Params, batch: Batch, classes: Array, targets: Targets, config: ModelConfig, options: _Options
) -> tuple[Array, Array, Array]:
    """Sums, counts, and the loss of each sequence."""
    if options.parts == 1:
        return _flows_of_part(params, batch, classes, targets, config, options)
    cut = lambda x: x.reshape(options.parts, -1, *x.shape[1:])
    parts = jax.tree.map(cut, (batch, classes, targets))
    of_part = lambda x: _flows_of_part(params, x[0], x[1], x[2], config, options)
    found = jax.lax.map(of_part, parts)
    joined: tuple[Array, Array, Array] = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    return joined


def _flows_of_part(
    params: Params, batch: Batch, classes: Array, targets: Targets, config: ModelConfig, options: _Options
) -> tuple[Array, Array, Array]:
    lead = (config.num_layers, classes.shape[0])
    pairs = (options.num_classes, options.num_classes)
    heads = (config.num_heads,) if options.per_head else ()

    def loss(taps: tuple[Array, Array]) -> tuple[Array, Array]:
        probe = Probe(
            *taps,
            classes=classes,
            reduction=options.reduction,
            signed=options.signed,
            nsa_edges=options.nsa_edges,
            implementation=options.implementation,
        )
        return _loss(
            params, batch, dataclasses.replace(config, remat=options.remat), targets, options.loss, probe
        )

    zeros = (jnp.zeros((*lead, *heads, *pairs), jnp.float32), jnp.zeros((*lead, *pairs), jnp.float32))
    (_, losses), (sums, counts) = jax.value_and_grad(loss, has_aux=True)(zeros)
    if options.per_head:
        counts = jnp.broadcast_to(counts[:, :, None], sums.shape)
    return sums.swapaxes(0, 1), counts.swapaxes(0, 1), losses


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _maps(
    params: Params, batch: Batch, targets: Targets, config: ModelConfig, options: _Options
) -> tuple[Array, Array]:
    batch_size, tokens = batch["tokens"].shape

    def loss(tap: Array) -> tuple[Array, Array]:
        frugal = dataclasses.replace(config, remat=options.remat)
        return _loss(params, batch, frugal, targets, options.loss, Probe(map_tap=tap))

    zeros = jnp.zeros((config.num_layers, batch_size, tokens, tokens), jnp.float32)
    (_, losses), signed = jax.value_and_grad(loss, has_aux=True)(zeros)
    return signed.swapaxes(0, 1), losses


def flow_memory(
    config: ModelConfig,
    batch_size: int,
    tokens: int,
    num_labels: int,
    roles: Roles,
    *,
    params: Params,
    implementation: Implementation | None = None,
) -> tuple[int, int]:
    """(bytes of the parameters, bytes of XLA's temporaries) of `flows` on one device, from compiling it
    alone.

    Args:
      params: shapes, dtypes and shardings as they will be loaded; those of a mesh under
        `jaxlab.models.using(mesh)`.
      implementation: as of `flows`.
    """
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    targets = Targets(integers(batch_size, 1), integers(batch_size, num_labels), integers(batch_size, 1))
    sequences = integers(batch_size, tokens)
    batch: Batch = {"tokens": sequences}
    options = _checked_options("labels", "auto", config, batch)._replace(
        num_classes=roles.classes, implementation=implementation
    )
    compiled = _flows.lower(params, batch, sequences, targets, config, options).compile()
    size = bytes_per_device(params)
    memory = compiled.memory_analysis()
    assert memory is not None
    return size, int(memory.temp_size_in_bytes)


def kept_bytes(config: ModelConfig, tokens: int) -> int:
    """About what the layers keep of so many tokens where matrix products are kept."""
    c = config
    heads = (c.num_heads + c.kv_heads) * (c.key_dim + c.value_dim)
    if c.qk_norm != "none":  # queries and keys before their norms, too
        heads += (c.num_heads + c.kv_heads) * c.key_dim
    hidden = c.mlp_width
    if c.moe is not None:
        hidden = max(hidden, c.moe.experts_per_token * c.moe.width + c.moe.shared_width)
    per_layer = 3 * c.width + heads + (2 if c.mlp == "gated" else 1) * hidden
    return tokens * c.num_layers * per_layer * jnp.dtype(c.compute_dtype).itemsize


def _checked_options(loss: str, remat: str, config: ModelConfig, batch: Batch) -> _Options:
    try:
        check_word("loss", loss, get_args(Loss))
        check_word("remat", remat, get_args(Remat))
    except ValueError as error:
        raise UserError(f"flows: {error}") from None
    size, length = batch["tokens"].shape
    parts = _parts(batch, config)
    keeps = length <= KEPT_LENGTH and kept_bytes(config, size // parts * length) <= KEPT_BYTES
    if remat == "layer" or (remat == "auto" and not keeps):
        return _Options(loss)
    return _Options(loss, remat="elementwise", parts=parts)


def _parts(batch: Batch, config: ModelConfig) -> int:
    """Into how many parts a batch is cut: of text alone, on one CPU, where much would be kept of it."""
    size, length = batch["tokens"].shape
    on_cpu = jax.default_backend() == "cpu" and current_target() == "device"
    on_one = jax.sharding.get_abstract_mesh().empty
    if not (on_cpu and on_one and set(batch) <= {"tokens", "segment_ids"}):
        return 1
    if kept_bytes(config, size * length) <= PART_BYTES:
        return 1
    counts = (n for n in range(1, size + 1) if size % n == 0)
    return max((n for n in counts if size // n * length >= PART_TOKENS), default=1)


def _check_labels(targets: Targets, loss: str) -> None:
    """A loss among label tokens needs two of them at least, and no two alike."""
    if loss != "labels":
        return
    if targets.label_tokens.shape[1] < 2:
        raise UserError("flows: a loss among label tokens needs two at least; take loss='vocabulary' for one")
    if known(targets.label_tokens):
        for row, tokens in enumerate(np.asarray(targets.label_tokens).tolist()):
            if len(set(tokens)) < len(tokens):
                twice = next(t for t in tokens if tokens.count(t) > 1)
                raise UserError(f"flows: two labels of sequence {row} are the same token {twice}")


def _check_finite(params: Params, losses: Array, found: Array) -> None:
    """Say where numbers went wrong, if they did and are known."""
    if not known((losses, found)):
        return
    finite = bool(jnp.all(jnp.isfinite(losses)))
    if finite and bool(jnp.all(jnp.isfinite(found))):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(leaf))):
            name = ".".join(str(getattr(key, "key", key)) for key in path)
            raise UserError(f"flows: the weights {name} hold NaN or infinity")
    where = "gradients" if finite else "logits"
    raise UserError(f"flows: the {where} are not finite in {losses.dtype}; the weights are")


def check_attention(config: ModelConfig, who: str) -> None:
    """Refuse attention that has neither flows nor blocking.

    Raises:
      UserError: sparsity at inference, or a selector of NSA that does not go by compressed keys; or it is no
        config of a model.
    """
    if not isinstance(config, ModelConfig):
        raise UserError(
            f"{who}: the config is a ModelConfig, as load_model gives it, not {type(config).__name__}; the "
            "order is params, batch, config"
        )
    if config.sparsity is not None:
        raise UserError(f"{who}: sparsity at inference ({config.sparsity.kind}) has no flows and no blocking")
    if "nsa" in config.kinds and config.nsa.selector != "compressed":
        raise UserError(
            f"{who}: NSA has flows and blocking with selector: compressed, not {config.nsa.selector}"
        )
