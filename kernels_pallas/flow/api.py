"""Attention with taps: the gradient with respect to a tap *is* the information flow.

Saliency of one layer (Wang et al. 2023, "Label Words are Anchors", arXiv 2305.14160, section 2.1): P = sum
over heads of A * dL/dA, and I = |P|; I[i, j] is the flow from token j to token i. The functions here give the
outputs of plain attention, but their backward pass also hands these flows to the taps of a `Probe`; no T x T
array per head is ever kept.

Axis letters: B batch, T tokens, H query heads, Hkv key/value heads, Dk and Dv their dimensions, M compressed
blocks, K token classes, P tokens read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.flow.base import MASKED, Marks, Spec, softcapped
from kernels_pallas.flow.probe import Probe
from kernels_pallas.flow.xla.branches import Branch, BranchSpec, branched_attention
from kernels_pallas.flow.xla.tiles import tiled_attention
from kernels_pallas.nsa import compressed_attention, select_blocks


def flow_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    probe: Probe,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    together: Int[Array, "B T"] | None = None,
    together_in_window: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    rows: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """Causal attention, grouped heads allowed, that a `Probe` of one layer reads and changes.

    Args:
      segment_ids: tokens see their own segment only; 0 is padding, which sees nothing, is seen by none and
        has output 0.
      together: tokens of one number above 0 see each other whatever their order. Flows are of the edges j < i
        all the same; the map has all of them.
      together_in_window: the window bounds what `together` allows too.
      window: the last so many tokens, the current one included.
      scale: of the scores; default Dk ** -0.5.
      softcap: scores are cap * tanh(score / cap).
      sinks: logits that take part in each head's softmax and have no value; no flow comes from them.
      rows: of a tile, chosen from the sizes by default.

    Returns:
      The output in the dtype of q; arithmetic is float32.

    Raises:
      ValueError: heads that do not fit, or a tap over classes without them.
      NotImplementedError: the implementation that the probe names cannot take the call.
    """
    _check(q, k, probe)
    spec = Spec(_scale(q, scale), window, softcap, together_in_window, rows)
    marks = Marks(segment_ids, together)
    if probe.implementation == "mosaic_gpu":
        # Imported where it is asked for: without Mosaic GPU, XLA works.
        from kernels_pallas.flow.mosaic_gpu.attention import kernel_attention, reason_against

        reason = reason_against(spec, q, v, marks, probe)
        if reason is not None:
            raise NotImplementedError(f"flow: implementation='mosaic_gpu': {reason}; use 'xla' or None")
        return kernel_attention(spec, q, k, v, marks, probe, sinks)
    return tiled_attention(spec, q, k, v, marks, probe, sinks)


def read_weights(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hkv Dk"],
    read_from: Int[Array, " B"],
    read_at: Int[Array, "B P"],
    seen: Bool[Array, "B T"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B H P"]:
    """Attention weights of one query at given tokens, for each head, float32; nothing is of size T x T.

    Args:
      read_from: the query.
      read_at: the tokens; 0 comes back where this is -1.
      seen: which tokens that query sees.
      scale: of the scores; default Dk ** -0.5.
      softcap: scores are cap * tanh(score / cap).
      sinks: logits that take part in each head's softmax.
    """
    batch, _, heads, dim = q.shape
    row = jnp.take_along_axis(q, read_from[:, None, None, None], axis=1)[:, 0]
    row = row.reshape(batch, k.shape[2], heads // k.shape[2], dim).astype(jnp.float32)
    scores = jnp.einsum("bkgd,bskd->bkgs", row, k.astype(jnp.float32)) * _scale(q, scale)
    scores = jnp.where(seen[:, None, None], softcapped(scores, softcap), MASKED)
    scores = scores.reshape(batch, heads, -1)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        beside = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None], (batch, heads, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, beside], axis=-1), axis=-1)[..., :-1]
    weights = jnp.where(seen[:, None], weights, 0.0)
    found = jnp.take_along_axis(weights, jnp.maximum(read_at, 0)[:, None], axis=2)
    return jnp.where((read_at >= 0)[:, None], found, 0.0)


def slot_factors(probe: Probe, slots: Int[Array, "B T"]) -> Float[Array, "B H T S"]:
    """The factors of a probe of one layer on edges from the slots of a cache to new tokens; 1 where one of
    the two has no class, and on what is no edge j < i.

    Args:
      slots: those of the new tokens.
    """
    count = probe.factors.shape[-1]
    of_tokens, of_slots = (jax.nn.one_hot(x, count) for x in (probe.classes, probe.slot_classes))
    changed = jnp.einsum("btx,bhxy,bsy->bhts", of_tokens, probe.factors.astype(jnp.float32) - 1.0, of_slots)
    earlier = jnp.arange(of_slots.shape[1])[None, None] < slots[:, :, None]
    return 1.0 + jnp.where(earlier[:, None], changed, 0.0)


def nsa_flow_attention(
    q: Float[Array, "B T H Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    v_cmp: Float[Array, "B M Hkv Dv"],
    k_slc: Float[Array, "B T Hkv Dk"],
    v_slc: Float[Array, "B T Hkv Dv"],
    k_win: Float[Array, "B T Hkv Dk"],
    v_win: Float[Array, "B T Hkv Dv"],
    gates: Float[Array, "B T H 3"],
    probe: Probe,
    *,
    block_len: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    window: int,
    num_init: int = 1,
    num_local: int = 2,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    rows: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """Native sparse attention that a `Probe` of one layer reads and blocks; arguments as `nsa_attention`,
    plus the probe.

    Per edge and head the flows of the three branches, gates included, are added before the heads are reduced.
    The edge from a compressed block is shared out to its tokens (`Probe.nsa_edges`). A blocked token sees no
    compressed block that holds an earlier token. The choice of blocks is that of the unblocked scores, and no
    gradient flows through it.

    Raises:
      ValueError: as `flow_attention`; or factors, which NSA does not have.
    """
    _check(q, k_slc, probe)
    if probe.factors is not None:
        raise ValueError("native sparse attention has no factors on its weights")
    if probe.implementation == "mosaic_gpu":
        raise NotImplementedError("flow: implementation='mosaic_gpu': NSA has none; use 'xla' or None")
    _, lse = compressed_attention(
        q, k_cmp, v_cmp, block_len=block_len, stride=stride, scale=scale, segment_ids=segment_ids
    )
    chosen = select_blocks(
        q,
        k_cmp,
        lse,
        block_len=block_len,
        stride=stride,
        block_size=block_size,
        num_blocks=num_blocks,
        num_init=num_init,
        num_local=num_local,
        scale=scale,
        segment_ids=segment_ids,
        kv_len=q.shape[1],
    )
    branches = (
        Branch(length=block_len, stride=stride, whole=probe.nsa_edges == "block"),
        Branch(chosen_block=block_size),
        Branch(window=window),
    )
    spec = BranchSpec(branches, _scale(q, scale), rows)
    keys, values = (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win)
    outs = branched_attention(spec, q, keys, values, chosen, segment_ids, probe)
    # The gates multiply here, outside, so that they are in the cotangents of the branches, hence in their
    # flows.
    return jnp.einsum("bthdc,bthc->bthd", jnp.stack(outs, axis=-1), gates.astype(q.dtype))


def _scale(q: Array, scale: float | None) -> float:
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def _check(q: Array, k: Array, probe: Probe) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads")
    of_classes = (probe.class_tap, probe.count_tap, probe.factors)
    if any(x is not None for x in of_classes) and probe.classes is None:
        raise ValueError("taps and factors over classes need the token classes: Probe(classes=...)")
