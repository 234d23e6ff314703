"""Public functions of Native Sparse Attention: checks, choice of the implementation, and the three branches
as one.

Axis letters: B batch, T query tokens, S source/key tokens, H query heads, Hkv key/value heads, Dk key head
dim, Dv value head dim, M compressed blocks, N selection blocks, n chosen blocks. Source: arXiv 2502.11089.

Common to all functions:

* `implementation`: "xla", "mosaic_gpu" (kernels for Hopper) or None: the best that supports the case, told
  at level DEBUG of the logger `kernels_pallas.nsa.support`; today "xla", as the kernels ran in an interpreter
  only. A named one runs or raises NotImplementedError with the reason; none is replaced by another silently.
* Queries stand at absolute positions among the keys: `q_positions` int32 [B, T] (decoding, prefill in
  chunks), or 0..T-1 when None, and then there must be as many queries as keys. A query sees no key after its
  own position.
* `segment_ids` int32 [B, S] belong to the keys; a query has the segment of its position. The tokens of a
  segment follow each other. Tokens see their own
  segment only; segment 0 is padding, which sees nothing, is seen by nothing, gives exactly 0, and whose
  contents (NaN included) reach neither outputs nor gradients. Blocks lie at multiples of the stride and the
  block size of the whole row, not of the segment: a compressed block is visible only to a segment that holds
  it completely; a selection block can be chosen by every segment that has a token in it, and only tokens of
  the query's segment are attended to. So a packed sequence gives what it gives alone when it starts at a
  multiple of both.
* A query that sees nothing in a branch gets exactly 0 from it (log-sum-exp -inf), with zero gradients.
* Inputs are float32, bfloat16 or float16, all of one dtype; softmax and sums run in float32. Reverse-mode
  differentiation of first order only.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.banded import Band, banded_attention
from kernels_pallas.nsa.choice import Grid, best, candidates, choose
from kernels_pallas.nsa.compression import block_segments, num_compressed
from kernels_pallas.nsa.selection import Block, attend_to_blocks
from kernels_pallas.nsa.support import MAX_VALUE_DIM, Implementation, reason_against, uses_kernels
from kernels_pallas.nsa.tiling import Places, accumulator, default_scale, where_finite


class NsaBranches(NamedTuple):
    """Outputs of the three branches before the gates, and what the choice was made from and came to."""

    compressed: Float[Array, "B T H Dv"]
    selected: Float[Array, "B T H Dv"]
    window: Float[Array, "B T H Dv"]
    lse: Float[Array, "B T H"]
    indices: Int[Array, "B Hkv T n"]


def compressed_attention(
    q: Float[Array, "B T H Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    v_cmp: Float[Array, "B M Hkv Dv"],
    *,
    block_len: int,
    stride: int,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Attention to compressed keys; block i covers tokens [i * stride, i * stride + block_len) and is visible
    to a query at t only if i * stride + block_len - 1 <= t.

    Returns the output in the dtype of q and the log-sum-exp of the scaled scores in float32, -inf where no
    block is visible. `scale` is 1 / sqrt(Dk) when None. Raises ValueError for shapes or sizes that do not
    fit, NotImplementedError for an implementation that is not there.
    """
    _check_attention(q, k_cmp, v_cmp, block_len=block_len, stride=stride)
    blocks = k_cmp.shape[1]
    kernels = uses_kernels(implementation, "compressed_attention", reason_against(q, v_cmp, blocks))
    places = _places(q, segment_ids, q_positions, None)
    _check_blocks(blocks, segment_ids, q, q_positions, block_len, stride)
    if blocks == 0:
        empty = jnp.zeros((*q.shape[:3], v_cmp.shape[-1]), q.dtype)
        return empty, jnp.full(q.shape[:3], -jnp.inf, accumulator(q.dtype))
    if segment_ids is not None:
        segments = block_segments(segment_ids, block_len, stride, blocks)
        places = places._replace(key_segments=segments)
        k_cmp, v_cmp = _without_padding(segments, k_cmp), _without_padding(segments, v_cmp)
    band = Band(stride, block_len - 1, None, default_scale(scale, q.shape[-1]))
    grouped = _grouped(_clean_q(q, places), k_cmp)
    if kernels:
        from kernels_pallas.nsa import mosaic_gpu

        # The kernels work out from the tokens' segments which blocks a query sees.
        tokens = places._replace(key_segments=segment_ids)
        out, lse = mosaic_gpu.banded(band, grouped, k_cmp, v_cmp, tokens)
    else:
        out, lse = banded_attention(band, grouped, k_cmp, v_cmp, places)
    return _finish(out, places), lse.reshape(q.shape[:3])


def select_blocks(
    q: Float[Array, "B T H Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    lse: Float[Array, "B T H"],
    *,
    block_len: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_init: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_len: int | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "B Hkv T n"]:
    """The `num_blocks` best selection blocks for each query and GQA group, in ascending order, then -1.

    `lse` is what `compressed_attention` returned for the same q and k_cmp. A block's importance is the sum of
    softmax(q . k_cmp) over the heads of the group and over the compressed blocks, weighted by the tokens they
    share with it (Eq. 9 in overlap form, Eq. 10). The first `num_init` blocks (of the query's segment) and
    the newest `num_local` ones, the query's own included, are always chosen and count within `num_blocks`;
    among equals the lower index wins. Candidates hold at least one token that the query may see. `kv_len` is
    S; None takes it from segment_ids or, without q_positions, from q. No gradient flows through the choice.

    Raises ValueError for shapes or sizes that do not fit, NotImplementedError for an implementation not
    there.
    """
    _check_attention(q, k_cmp, k_cmp, block_len=block_len, stride=stride)
    reason = reason_against(q, k_cmp[..., :MAX_VALUE_DIM], k_cmp.shape[1])
    kernels = uses_kernels(implementation, "select_blocks", reason)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse has shape {lse.shape}; for q {q.shape} it must be {q.shape[:3]}")
    _check_choice(block_size, num_blocks, num_init, num_local)
    if kv_len is None:
        if segment_ids is None and q_positions is not None:
            raise ValueError("select_blocks with q_positions needs kv_len, the number of keys")
        kv_len = q.shape[1] if segment_ids is None else segment_ids.shape[1]
    places = _places(q, segment_ids, q_positions, kv_len)
    _check_blocks(k_cmp.shape[1], segment_ids, q, q_positions, block_len, stride)
    segments = None
    if segment_ids is not None:
        segments = block_segments(segment_ids, block_len, stride, k_cmp.shape[1])
        k_cmp = _without_padding(segments, k_cmp)
    scale = default_scale(scale, q.shape[-1])
    grid = Grid(block_len, stride, block_size, num_blocks, num_init, num_local, kv_len, scale)
    q, k_cmp, lse = lax.stop_gradient((_clean_q(q, places), k_cmp, lse))
    q = _grouped(q, k_cmp)
    if kernels:
        from kernels_pallas.nsa import mosaic_gpu

        return mosaic_gpu.choose(grid, q, k_cmp, lse.reshape(q.shape[:-1]), places)
    return choose(grid, q, k_cmp, lse.reshape(q.shape[:-1]), places, segments)


def best_blocks(
    importance: Float[Array, "B Hkv T N"],
    *,
    block_size: int,
    num_blocks: int,
    num_init: int = 1,
    num_local: int = 2,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
) -> Int[Array, "B Hkv T n"]:
    """`select_blocks` by another importance of the N selection blocks than that of compressed keys.

    importance: float32, larger is better, of any sign; that of candidates is read, except of the first and
    local blocks, which are always chosen. Candidates, ties and order are those of `select_blocks`. No
    gradient flows through the choice.

    Raises ValueError for shapes or sizes that do not fit.
    """
    _check_choice(block_size, num_blocks, num_init, num_local)
    batch, _, length, blocks = importance.shape
    if segment_ids is not None and blocks * block_size < segment_ids.shape[1]:
        raise ValueError(f"{blocks} blocks of {block_size} do not cover {segment_ids.shape[1]} tokens")
    if q_positions is None and blocks * block_size < length:
        raise ValueError(f"{blocks} blocks of {block_size} do not cover {length} tokens")
    queries = jnp.zeros((batch, length, 1, 1), importance.dtype)
    limits = candidates(block_size, _places(queries, segment_ids, q_positions, None))
    return best(lax.stop_gradient(importance), limits, num_blocks, num_init, num_local)


def selected_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    indices: Int[Array, "B Hkv T n"],
    *,
    block_size: int,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H Dv"]:
    """Attention to the tokens of the chosen blocks that are not in the query's future.

    Block j holds tokens [j * block_size, (j + 1) * block_size). A query's indices must differ from each
    other; those outside 0..N-1 (-1 above all) are missing slots and never read. Their order does not matter.
    Raises ValueError for shapes or sizes that do not fit, NotImplementedError for an implementation that is
    not there.
    """
    _check_attention(q, k, v, block_size=block_size)
    reason = reason_against(q, v, k.shape[1], block_size)
    kernels = uses_kernels(implementation, "selected_attention", reason)
    expected = (q.shape[0], k.shape[2], q.shape[1])
    if indices.ndim != 4 or indices.shape[:3] != expected or indices.shape[3] == 0:
        raise ValueError(f"indices have shape {indices.shape}, not {expected} and at least one slot")
    places = _places(q, segment_ids, q_positions, k.shape[1])
    q, k, v = _clean(q, k, v, places)
    block = Block(block_size, default_scale(scale, q.shape[-1]))
    indices = jnp.moveaxis(lax.stop_gradient(indices), 1, 2)
    if kernels:
        from kernels_pallas.nsa import mosaic_gpu

        out = mosaic_gpu.selected(block, _grouped(q, k), k, v, indices, places)
    else:
        out = attend_to_blocks(block, _grouped(q, k), k, v, indices, places)
    return _finish(out, places)


def window_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    *,
    window: int,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H Dv"]:
    """Attention to the last `window` tokens, the current one included.

    Raises ValueError for shapes or sizes that do not fit, NotImplementedError for an implementation not
    there.
    """
    _check_attention(q, k, v, window=window)
    kernels = uses_kernels(implementation, "window_attention", reason_against(q, v, k.shape[1]))
    places = _places(q, segment_ids, q_positions, k.shape[1])
    q, k, v = _clean(q, k, v, places)
    band = Band(1, 0, window, default_scale(scale, q.shape[-1]))
    if kernels:
        from kernels_pallas.nsa import mosaic_gpu

        return _finish(mosaic_gpu.banded(band, _grouped(q, k), k, v, places)[0], places)
    return _finish(banded_attention(band, _grouped(q, k), k, v, places)[0], places)


def nsa_attention(
    q: Float[Array, "B T H Dk"],
    k_cmp: Float[Array, "B M Hkv Dk"],
    v_cmp: Float[Array, "B M Hkv Dv"],
    k_slc: Float[Array, "B S Hkv Dk"],
    v_slc: Float[Array, "B S Hkv Dv"],
    k_win: Float[Array, "B S Hkv Dk"],
    v_win: Float[Array, "B S Hkv Dv"],
    gates: Float[Array, "B T H 3"],
    *,
    block_len: int = 32,
    stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    num_init: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
    q_cmp: Float[Array, "B T H Dk"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    indices: Int[Array, "B Hkv T n"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H Dv"], NsaBranches]:
    """All three branches, each with its own keys and values, weighted by `gates` (compression, selection,
    window).

    `k_cmp` and `v_cmp` come from `compress_blocks`; they must be the M complete blocks of the S tokens.
    `q_cmp` replaces q in compression and choice (queries without RoPE, say). `indices` replaces the choice.
    Defaults are the paper's. Returns the weighted sum and the branches; what is not used of them costs
    nothing under jit.

    Raises ValueError for shapes or sizes that do not fit, NotImplementedError for an implementation not
    there.
    """
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates have shape {gates.shape}; for q {q.shape} it must be {(*q.shape[:3], 3)}")
    length = k_slc.shape[1]
    if k_win.shape[1] != length:
        raise ValueError(f"selection has {length} keys and the window {k_win.shape[1]}")
    if k_cmp.shape[1] != num_compressed(length, block_len, stride):
        raise ValueError(
            f"{length} keys have {num_compressed(length, block_len, stride)} complete blocks of {block_len} "
            f"every {stride}, but k_cmp has {k_cmp.shape[1]}"
        )
    q_cmp = q if q_cmp is None else q_cmp
    blocks: dict[str, Any] = {"block_len": block_len, "stride": stride}
    # Positions, segments and scale are the same for each branch.
    common: dict[str, Any] = {
        "scale": scale,
        "segment_ids": segment_ids,
        "q_positions": q_positions,
        "implementation": implementation,
    }
    compressed, lse = compressed_attention(q_cmp, k_cmp, v_cmp, **blocks, **common)
    if indices is None:
        indices = select_blocks(
            q_cmp,
            k_cmp,
            lse,
            block_size=block_size,
            num_blocks=num_blocks,
            num_init=num_init,
            num_local=num_local,
            kv_len=length,
            **blocks,
            **common,
        )
    selected = selected_attention(q, k_slc, v_slc, indices, block_size=block_size, **common)
    recent = window_attention(q, k_win, v_win, window=window, **common)
    out = weigh(gates, compressed, selected, recent)
    return out, NsaBranches(compressed, selected, recent, lse, indices)


def weigh(
    gates: Float[Array, "B T H 3"],
    compressed: Float[Array, "B T H Dv"],
    selected: Float[Array, "B T H Dv"],
    recent: Float[Array, "B T H Dv"],
) -> Float[Array, "B T H Dv"]:
    """Sum of the branches times their gates, in float32: a gate's gradient is a sum over the head dim."""
    dtype = accumulator(compressed.dtype)
    of = lambda i, x: gates[..., i, None].astype(dtype) * x.astype(dtype)
    return (of(0, compressed) + of(1, selected) + of(2, recent)).astype(compressed.dtype)


def _check_attention(q: Array, k: Array, v: Array, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, not {size}")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v must have 4 axes, not {q.ndim}, {k.ndim}, {v.ndim}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads equally")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k, v must be floating point, not {q.dtype}")


def _check_choice(block_size: int, num_blocks: int, num_init: int, num_local: int) -> None:
    if min(block_size, num_blocks) < 1 or min(num_init, num_local) < 0:
        raise ValueError(
            f"block_size {block_size} and num_blocks {num_blocks} must be positive, "
            f"num_init {num_init} and num_local {num_local} not negative"
        )
    if num_init + num_local > num_blocks:
        raise ValueError(
            f"{num_init} first and {num_local} local blocks do not fit into num_blocks={num_blocks}"
        )


def _check_blocks(
    blocks: int,
    segment_ids: Array | None,
    q: Array,
    q_positions: Array | None,
    block_len: int,
    stride: int,
) -> None:
    """The number of compressed blocks, where the number of tokens is known."""
    if segment_ids is None and q_positions is not None:
        return
    length = q.shape[1] if segment_ids is None else segment_ids.shape[1]
    expected = num_compressed(length, block_len, stride)
    if blocks != expected:
        raise ValueError(
            f"{length} tokens have {expected} complete blocks of {block_len} every {stride}, not {blocks}"
        )


def _places(q: Array, segment_ids: Array | None, q_positions: Array | None, num_keys: int | None) -> Places:
    batch, length = q.shape[:2]
    if segment_ids is not None:
        if num_keys is not None and segment_ids.shape != (batch, num_keys):
            raise ValueError(f"segment_ids have shape {segment_ids.shape}, not {(batch, num_keys)}")
        num_keys = segment_ids.shape[1]
    if q_positions is None:
        if num_keys is not None and num_keys != length:
            raise ValueError(f"{length} queries against {num_keys} keys need q_positions")
        q_positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        return Places(q_positions, segment_ids, segment_ids)
    if q_positions.shape != (batch, length):
        raise ValueError(f"q_positions have shape {q_positions.shape}, not {(batch, length)}")
    q_positions = q_positions.astype(jnp.int32)
    if segment_ids is None:
        return Places(q_positions)
    return Places(q_positions, jnp.take_along_axis(segment_ids, q_positions, axis=1), segment_ids)


def _without_padding(segments: Array, x: Array) -> Array:
    """Zeros where the segment is 0, and no gradient to or from there."""
    return where_finite((segments != 0)[:, :, None, None], x)


def _clean_q(q: Array, places: Places) -> Array:
    return q if places.q_segments is None else _without_padding(places.q_segments, q)


def _clean(q: Array, k: Array, v: Array, places: Places) -> tuple[Array, Array, Array]:
    if places.key_segments is None:
        return q, k, v
    segments = places.key_segments
    return _clean_q(q, places), _without_padding(segments, k), _without_padding(segments, v)


def _grouped(q: Array, k: Array) -> Float[Array, "B T Hkv G Dk"]:
    batch, length, heads, dim = q.shape
    return q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)


def _finish(out: Float[Array, "B T Hkv G Dv"], places: Places) -> Float[Array, "B T H Dv"]:
    """Join the heads; the mask keeps a cotangent that arrives at padding (NaN, say) from going further."""
    batch, length, kv_heads, groups, dim = out.shape
    return _clean_q(out.reshape(batch, length, kv_heads * groups, dim), places)
