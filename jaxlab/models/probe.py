"""Attention with taps: the gradient with respect to a tap *is* the information flow.

Saliency of one layer (Wang et al. 2023, "Label Words are Anchors", section 2.1): P = sum over heads of A *
dL/dA, and I = |P|; I[i, j] is the flow from token j to token i. The functions here give the outputs of plain
attention, but their backward pass also hands these flows, streamed over blocks of rows (probe_stream.py), to
the taps of a `Probe`; no T x T array per head is ever kept. A tap's own value is never read.

How a decoder uses it. Leaves of a `Probe` are per layer (leading axis L) or shared; the layers are scanned:

    per_layer, shared = probe.split()
    def layer(x, inputs):
        weights, layer_probe = inputs
        ...
        out = probed_attention(q, k, v, layer_probe.join(shared), segment_ids=segment_ids, window=window)
        ...
    x, _ = jax.lax.scan(layer, x, (params["layers"], per_layer))
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.probe_stream import Branch, Spec, stream_attention
from kernels_pallas.nsa import compressed_attention, select_blocks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("class_tap", "count_tap", "map_tap", "blocked", "classes"),
    meta_fields=("reduction", "blocking", "nsa_edges"),
)
@dataclasses.dataclass(frozen=True)
class Probe:
    """What to read from, and what to block in, the attention of every layer. A pytree; every leaf may be
    None.

    The fields are typed `Any` because a pytree holds tracers, slices of one layer and cotangents as well.
    """

    class_tap: Any = None
    """float32[L, B, K, K]: its cotangent is the flow summed over edges j < i, [class of i, class of j]."""
    count_tap: Any = None
    """float32[L, B, K, K]: its cotangent is the number of visible edges j < i of each pair of classes."""
    map_tap: Any = None
    """float32[L, B, T, T]: its cotangent is P, the signed flow map [to i, from j], diagonal included."""
    blocked: Any = None
    """bool[L, B, T]: tokens i to which nothing flows from tokens j < i. A[i, i] stays."""
    classes: Any = None
    """int32[B, T], of all layers: the class of each token, 0..K-1, or -1 for none. The first two taps need
    it."""
    reduction: Literal["abs_of_sum", "sum_of_abs"] = "abs_of_sum"
    """Over heads: |sum of P| as the paper's text has it, or sum of |P| (its footnote 3). The map is
    signed."""
    blocking: Literal["paper", "released_code"] = "paper"
    """`paper`: A[i, j] = 0 after the softmax. `released_code`: the logit is -10000 before it; the row
    renormalises."""
    nsa_edges: Literal["token", "block"] = "token"
    """Flow from a compressed block: in equal parts from its tokens, or whole from each of them."""

    def split(self) -> tuple["Probe", "Probe"]:
        """(leaves with a leading layer axis, to be scanned over; leaves shared by all layers)."""
        per_layer = dataclasses.replace(self, classes=None)
        shared = dataclasses.replace(self, class_tap=None, count_tap=None, map_tap=None, blocked=None)
        return per_layer, shared

    def join(self, shared: "Probe") -> "Probe":
        """The probe of one layer: this one's leaves (a slice of `split()[0]`) with the shared ones."""
        return dataclasses.replace(self, classes=shared.classes)


def probed_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    probe: Probe,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    rows: int | None = None,
) -> Float[Array, "B T H Dv"]:
    """Causal attention, grouped heads allowed, that a `Probe` of one layer reads and blocks.

    `segment_ids`: tokens see their own segment only; 0 is padding, which sees nothing, is seen by none and
    has output 0. `window`: the last so many tokens, the current one included. `scale`: default Dk ** -0.5.
    `sinks`: logits that take part in each head's softmax and have no value; no flow comes from them.
    `rows`: rows in a block of the stream, chosen from the sizes by default. Arithmetic is float32; the output
    has the dtype of q.
    """
    branch = Branch(window=window)
    return _probed(
        q, ((k, v),), (branch,), probe, segment_ids=segment_ids, scale=scale, rows=rows, sinks=sinks
    )[0]


def probed_nsa_attention(
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
    """
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
    pairs = ((k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win))
    outs = _probed(q, pairs, branches, probe, chosen=chosen, segment_ids=segment_ids, scale=scale, rows=rows)
    # The gates multiply here, outside, so that they are in the cotangents of the branches, hence in their
    # flows.
    return jnp.einsum("bthdc,bthc->bthd", jnp.stack(outs, axis=-1), gates.astype(q.dtype))


def _probed(
    q: Array,
    pairs: tuple[tuple[Array, Array], ...],
    branches: tuple[Branch, ...],
    probe: Probe,
    *,
    segment_ids: Array | None,
    scale: float | None,
    rows: int | None,
    chosen: Array | None = None,
    sinks: Array | None = None,
) -> tuple[Array, ...]:
    """One output for each branch and its (keys, values)."""
    if q.shape[2] % pairs[0][0].shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {pairs[0][0].shape[2]} key/value heads")
    if (probe.class_tap is not None or probe.count_tap is not None) and probe.classes is None:
        raise ValueError("class_tap and count_tap need the token classes: Probe(classes=...)")
    spec = Spec(branches, q.shape[-1] ** -0.5 if scale is None else scale, rows)
    keys, values = tuple(k for k, _ in pairs), tuple(v for _, v in pairs)
    return stream_attention(spec, q, keys, values, chosen, segment_ids, probe, sinks)
