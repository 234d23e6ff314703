"""Native Sparse Attention of whole texts from keys and values of tokens on: what a layer of any model calls.

Compression, attention and, on a mesh, each device's part of both.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.api import (
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.base import (
    NsaBranches,
    NsaSizes,
    SizeOptions,
    block_starts,
    num_compressed,
    segment_starts,
    weigh,
)
from kernels_pallas.nsa.checks import check_branches, check_text
from kernels_pallas.nsa.decode_cache import NewTokens
from kernels_pallas.nsa.implementations import Implementation
from kernels_pallas.nsa.xla.compression import compress_blocks
from kernels_pallas.sharding import MeshAxes, Part, in_parts

BRANCHES = ("compression", "selection", "window")
"""In the order of the gates."""
Rotate = Callable[[Float[Array, "B M Hkv Dk"], Int[Array, "B M *axes"]], Float[Array, "B M Hkv Dk"]]
CompressAt = Callable[[Array, Array, Int[Array, "B M"] | None], tuple[Array, Array]]


def shared_tokens(
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    k_rotated: Float[Array, "B T Hkv Dk"] | None = None,
) -> NewTokens:
    """One key and one value of each token for all three branches (the paper gives each its own). `k_rotated`
    is k with rotary positions where the model has them: compression takes keys without."""
    k_rotated = k if k_rotated is None else k_rotated
    return NewTokens(k, v, k_rotated, v, k_rotated, v)


def compress_part(
    compress: CompressAt,
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    *,
    block_len: int,
    stride: int,
    segment_ids: Int[Array, "B S"] | None = None,
    part: Part | None = None,
) -> tuple[Float[Array, "B M Hkv Dk"], Float[Array, "B M Hkv Dv"]]:
    """All compressed keys and values, from `compress(k, v, starts)` (see `compress_blocks`).

    Of one stretch of split texts (`part`; the segments are of all tokens): it compresses the blocks whose
    slots lie in it, the last ones with the first tokens of the next stretch and, of packed texts, the first
    one with the last tokens of the one before. So tokens are never gathered, only what becomes of them.
    """
    rows = None if segment_ids is None else block_starts(segment_ids, block_len=block_len, stride=stride)
    if part is None:
        return compress(k, v, rows)
    before = 0 if rows is None else stride - 1
    k, v = (part.with_neighbours(y, before, block_len - stride) for y in (k, v))
    own = None if rows is None else part.own_rows(rows, stride, before)
    slots = num_compressed(part.parts * part.length, block_len, stride, packed=rows is not None)
    k_cmp, v_cmp = (part.whole(part.joined(x)) for x in compress(k, v, own))
    return k_cmp[:, :slots], v_cmp[:, :slots]  # what runs past the end is no block


def attend_part(
    q: Float[Array, "B t H Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    v_cmp: Float[Array, "B M Hkv Dv"],
    k_slc: Float[Array, "B t Hkv Dk"],
    v_slc: Float[Array, "B t Hkv Dv"],
    k_win: Float[Array, "B t Hkv Dk"],
    v_win: Float[Array, "B t Hkv Dv"],
    gates: Float[Array, "B t H 3"],
    *,
    part: Part | None,
    segment_ids: Int[Array, "B T"] | None,
    indices: Int[Array, "B Hkv t n"] | None,
    implementation: Implementation | None,
    **sizes: Unpack[SizeOptions],
) -> tuple[Float[Array, "B t H Dv"], NsaBranches]:
    """`nsa_attention` of one device's tokens of split texts (`part`; the segments are of all tokens).

    Keys and values of chosen blocks are gathered, those of the window come from the neighbours alone;
    compressed ones are of all tokens already. `sizes` are those of `nsa_attention`.
    """
    if part is None:
        return nsa_attention(
            q,
            k_cmp,
            v_cmp,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gates,
            segment_ids=segment_ids,
            indices=indices,
            implementation=implementation,
            **sizes,
        )
    n = NsaSizes(**sizes)
    common: dict[str, Any] = {"implementation": implementation, "scale": n.scale}
    placed: dict[str, Any] = {"segment_ids": segment_ids, "q_positions": part.positions(q.shape[0]), **common}
    of_blocks: dict[str, Any] = {"block_len": n.block_len, "stride": n.stride}
    compressed, lse = compressed_attention(q, k_cmp, v_cmp, **of_blocks, **placed)
    if indices is None:
        choice: dict[str, Any] = {"block_size": n.block_size, "num_blocks": n.num_blocks}
        choice |= {"num_init": n.num_init, "num_local": n.num_local, "kv_len": part.parts * part.length}
        indices = select_blocks(q, k_cmp, lse, **of_blocks, **choice, **placed)
    k_slc, v_slc = part.whole(k_slc), part.whole(v_slc)
    selected = selected_attention(q, k_slc, v_slc, indices, block_size=n.block_size, **placed)
    recent = window_of_part(q, k_win, v_win, window=n.window, part=part, segment_ids=segment_ids, **common)
    return weigh(gates, compressed, selected, recent), NsaBranches(compressed, selected, recent, lse, indices)


def window_of_part(
    q: Float[Array, "B t H Dk"],
    k: Float[Array, "B t Hkv Dk"],
    v: Float[Array, "B t Hkv Dv"],
    *,
    window: int,
    part: Part,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B t H Dv"]:
    """`window_attention` of one device's tokens of split texts, with the keys before its stretches from the
    devices that have them."""
    length = part.parts * part.length
    before = min(window - 1, length - part.stretch)
    if segment_ids is None:
        segment_ids = jnp.ones((q.shape[0], length), jnp.int32)
    queries = part.apart(q)
    at = jnp.broadcast_to(before + jnp.arange(part.stretch, dtype=jnp.int32)[None], queries.shape[:2])
    out = window_attention(
        queries,
        part.with_neighbours(k, before, 0),
        part.with_neighbours(v, before, 0),
        window=window,
        scale=scale,
        segment_ids=part.rows_with_neighbours(segment_ids, before),
        q_positions=at,
        implementation=implementation,
    )
    return part.joined(out)


def attend_to_text(
    q: Float[Array, "B T H Dk"],
    tokens: NewTokens,
    gates: Float[Array, "B T H 3"],
    phi_k: Mapping[str, Array],
    phi_v: Mapping[str, Array],
    *,
    rotate: Rotate | None = None,
    positions: Int[Array, "B T *axes"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    indices: Int[Array, "B Hkv T n"] | None = None,
    branches: Collection[str] = BRANCHES,
    read_all: bool = False,
    axes: MeshAxes = MeshAxes(),  # noqa: B008  a NamedTuple of constants
    stretches: int = 1,
    implementation: Implementation | None = None,
    **sizes: Unpack[SizeOptions],
) -> tuple[Float[Array, "B T H Dv"], Int[Array, "B Hkv T n"] | None]:
    """`compress_blocks` of both and `nsa_attention`, for each device its part of the mesh that is set.

    Args:
      q: queries, with rotary positions where the model has them.
      tokens: keys and values of the branches; those to compress without rotary positions.
      gates: weights of compression, selection and window.
      phi_k, phi_v: parameters of `compress_blocks` for keys and for values; {}: means.
      rotate: gives compressed keys the rotary positions of the first token of their block. It must not close
        over arrays.
      positions: of the tokens, for `rotate`; None: they are counted from the start of each text.
      segment_ids: packed texts and padding (0); packed equals alone.
      indices: replaces the choice of blocks.
      branches: those that are added up; the others are not computed, whatever their gates.
      read_all: selection reads all blocks; the choice is returned all the same.
      axes: names of the mesh axes that split examples, heads and tokens; default: one device.
      stretches: 2 where `q`, `tokens` and `gates` lie in the zigzag of `kernels_pallas.sharding.Part`;
        `positions` and `segment_ids` are in order.
      sizes: the fields of `NsaSizes`.

    Returns the output and the chosen blocks, None without selection.

    Raises:
      ValueError: shapes or sizes do not fit, or cannot be split over the mesh.
      NotImplementedError: the named implementation cannot take the case.
    """
    check_branches(branches, BRANCHES)
    check_text(q, tokens._asdict(), gates, positions, segment_ids)
    n = NsaSizes(**sizes)
    blocks: dict[str, Any] = {"block_len": n.block_len, "stride": n.stride}

    def core(
        arrays: tuple[Array, ...],
        rows: tuple[Array | None, Array | None],
        weights: tuple[Mapping[str, Array], Mapping[str, Array]],
        indices: Array | None,
        part: Part | None,
    ) -> tuple[Array, Array | None]:
        q, k, v, k_slc, v_slc, k_win, v_win, gates = arrays
        starts, segment_ids = rows
        compress = lambda k, v, starts: (
            compress_blocks(k, weights[0], starts=starts, **blocks),
            compress_blocks(v, weights[1], starts=starts, **blocks),
        )
        k_cmp, v_cmp = compress_part(compress, k, v, segment_ids=segment_ids, part=part, **blocks)
        if rotate is not None:
            assert starts is not None
            k_cmp = rotate(k_cmp, starts)
        operands = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
        of_calls: dict[str, Any] = {"segment_ids": segment_ids, "implementation": implementation}
        out, found = attend_part(*operands, part=part, indices=indices, **of_calls, **sizes)
        outputs = {"compression": found.compressed, "selection": found.selected, "window": found.window}
        if read_all:  # a window as long as the text
            if part is not None:
                k_slc, v_slc = part.whole(k_slc), part.whole(v_slc)
                of_calls["q_positions"] = part.positions(q.shape[0])
            outputs["selection"] = window_attention(
                q, k_slc, v_slc, window=k_slc.shape[1], scale=n.scale, **of_calls
            )
        chosen = found.indices if "selection" in branches else None
        if set(branches) == {*BRANCHES} and not read_all:
            return out, chosen
        # What the other branches would give is not used, so it is not computed.
        parts = [
            gates[..., i, None].astype(q.dtype) * outputs[b] for i, b in enumerate(BRANCHES) if b in branches
        ]
        return jax.tree.reduce(jnp.add, parts), chosen

    return in_parts(
        core,
        (q, *tokens, gates),
        (None if rotate is None else block_positions(positions, segment_ids, q.shape[:2], n), segment_ids),
        (phi_k, phi_v),
        indices,
        axes=axes,
        unit=n.stride,
        least=max(n.block_len - n.stride, 1),
        stretches=stretches,
    )


def block_positions(
    positions: Int[Array, "B T *axes"] | None,
    segment_ids: Int[Array, "B T"] | None,
    shape: tuple[int, ...],
    sizes: NsaSizes,
) -> Int[Array, "B M *axes"]:
    """The position of each compressed block's first token, of a row of `shape` [B, T]; for slots without a
    block any. None: counted from the start of its text."""
    (batch, length), stride = shape, sizes.stride
    if segment_ids is None:
        if positions is not None:
            return positions[:, : max(0, length - sizes.block_len + 1) : stride]
        slots = jnp.arange(num_compressed(length, sizes.block_len, stride), dtype=jnp.int32)
        return jnp.broadcast_to(slots[None] * stride, (batch, slots.shape[0]))
    rows = jnp.maximum(block_starts(segment_ids, block_len=sizes.block_len, stride=stride), 0)
    if positions is not None:
        return jax.vmap(lambda x, at: x[at])(positions, rows)
    return rows - jnp.take_along_axis(segment_starts(segment_ids), rows, axis=1)
