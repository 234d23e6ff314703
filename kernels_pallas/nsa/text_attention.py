"""Native Sparse Attention of whole texts from keys and values of tokens on: what a layer of any model calls.

Compression, attention and, on a mesh, each device's part of both.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.api import nsa_attention
from kernels_pallas.nsa.base import block_starts, num_compressed, segment_starts
from kernels_pallas.nsa.decode_cache import NewTokens
from kernels_pallas.nsa.implementations import Implementation
from kernels_pallas.nsa.xla.compression import compress_blocks
from kernels_pallas.sharding import MeshAxes, Part, in_parts

Rotate = Callable[[Float[Array, "B M Hkv Dk"], Int[Array, "B M"]], Float[Array, "B M Hkv Dk"]]
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
    k_cmp, v_cmp = compress(k, v, own)
    return part.whole(k_cmp)[:, :slots], part.whole(v_cmp)[:, :slots]  # what runs past the end is no block


def attend_to_text(
    q: Float[Array, "B T H Dk"],
    tokens: NewTokens,
    gates: Float[Array, "B T H 3"],
    phi_k: Mapping[str, Array],
    phi_v: Mapping[str, Array],
    *,
    block_len: int = 32,
    stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    num_init: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
    rotate: Rotate | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    indices: Int[Array, "B Hkv T n"] | None = None,
    axes: MeshAxes = MeshAxes(),  # noqa: B008  a NamedTuple of constants
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H Dv"], Int[Array, "B Hkv T n"]]:
    """`compress_blocks` of both and `nsa_attention`, for each device its part of the mesh that is set.

    Args:
      q: queries, with rotary positions where the model has them.
      tokens: keys and values of the branches; those to compress without rotary positions.
      gates: weights of compression, selection and window.
      phi_k, phi_v: parameters of `compress_blocks` for keys and for values; {}: means.
      rotate: gives compressed keys the rotary positions of the first token of their block, which is counted
        from the start of its text. It must not close over arrays.
      segment_ids: packed texts and padding (0); packed equals alone.
      indices: replaces the choice of blocks.
      axes: names of the mesh axes that split examples, heads and tokens; default: one device.

    Returns the output and the chosen blocks.

    Raises:
      ValueError: shapes or sizes do not fit, or cannot be split over the mesh.
      NotImplementedError: the named implementation cannot take the case.
    """
    sizes: dict[str, Any] = {"block_len": block_len, "stride": stride}
    choice: dict[str, Any] = {"block_size": block_size, "num_blocks": num_blocks, "num_init": num_init}

    def core(
        arrays: tuple[Array, ...],
        segment_ids: Array | None,
        weights: tuple[Mapping[str, Array], Mapping[str, Array]],
        indices: Array | None,
        part: Part | None,
    ) -> tuple[Array, Array]:
        q, k, v, *others, gates = arrays
        length = k.shape[1] if part is None else part.parts * part.length
        compress = lambda k, v, starts: (
            compress_blocks(k, weights[0], starts=starts, **sizes),
            compress_blocks(v, weights[1], starts=starts, **sizes),
        )
        k_cmp, v_cmp = compress_part(compress, k, v, segment_ids=segment_ids, part=part, **sizes)
        if rotate is not None:
            k_cmp = rotate(k_cmp, _block_positions(segment_ids, k_cmp.shape[:2], length, **sizes))
        positions = None
        if part is not None:
            others, positions = [part.whole(x) for x in others], part.positions(q.shape[0])
        k_slc, v_slc, k_win, v_win = others
        out, branches = nsa_attention(
            q,
            k_cmp,
            v_cmp,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gates,
            **sizes,
            **choice,
            num_local=num_local,
            window=window,
            scale=scale,
            segment_ids=segment_ids,
            q_positions=positions,
            indices=indices,
            implementation=implementation,
        )
        return out, branches.indices

    out, chosen = in_parts(
        core,
        (q, *tokens, gates),
        segment_ids,
        (phi_k, phi_v),
        indices,
        axes=axes,
        unit=stride,
        least=max(block_len - stride, 1),
    )
    assert chosen is not None
    return out, chosen


def _block_positions(
    segment_ids: Array | None, shape: tuple[int, ...], length: int, *, block_len: int, stride: int
) -> Int[Array, "B M"]:
    """The position of each block's first token in its text; 0 for slots without one."""
    if segment_ids is None:
        return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None] * stride, (shape[0], shape[1]))
    rows = block_starts(segment_ids, block_len=block_len, stride=stride)
    there = jnp.clip(rows, 0, length - 1)
    return jnp.where(rows < 0, 0, rows - jnp.take_along_axis(segment_starts(segment_ids), there, axis=1))
