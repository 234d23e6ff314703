"""The public operators of Native Sparse Attention: each checks its arguments and calls an implementation.

Axis letters: B batch, T query tokens, S source/key tokens, H query heads, Hkv key/value heads, Dk key head
dim, Dv value head dim, M compressed blocks, N selection blocks, n selected blocks. Source: arXiv 2502.11089.

Common to all functions:

* `implementation`: "xla", "mosaic_gpu" (kernels for Hopper) or None: the best that supports the case, told
  at level DEBUG of the logger `kernels_pallas.nsa.implementations`. Kernels are the best where a record says
  that they were right on this device (`kernels_pallas/nsa/records`). A named one runs or raises
  NotImplementedError with the reason; none is replaced by another silently.
* Queries stand at absolute positions among the keys: `q_positions` int32 [B, T] (decoding, prefill in
  chunks), or 0..T-1 when None, and then there must be as many queries as keys. A query sees no key after its
  own position.
* `segment_ids` int32 [B, S] belong to the keys; a query has the segment of its position. A text is a stretch
  of tokens of one segment. Tokens see their own text only; segment 0 is padding, which sees nothing, is seen
  by nothing, gives exactly 0, and whose contents (NaN included) reach neither outputs nor gradients.
  **Packed equals alone**: compressed and selection blocks are counted from each text's own start, wherever it
  lies. Indices of selection blocks are those of the query's own text, 0 is its first. A text that begins at
  row s has its i-th compressed block in slot ceil(s / stride) + i of k_cmp and v_cmp, which have
  num_compressed(S, block_len, stride, packed=True) slots; `compress_blocks` with the same segment_ids lays
  them so, and `block_starts` tells where each begins.
* What a query does not see, NaN in its future included, does not reach its output.
* A query that sees nothing in a branch gets exactly 0 from it (log-sum-exp -inf), with zero gradients.
* Inputs are float32, bfloat16 or float16, all of one dtype; softmax and sums run in float32. Reverse-mode
  differentiation of first order only.
"""

from typing import Any, Unpack

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import (
    NSA_RESIDUALS,
    Block,
    Interval,
    NsaBranches,
    NsaSizes,
    SelectionGrid,
    SizeOptions,
    accumulator,
    default_scale,
    weigh,
)
from kernels_pallas.nsa.checks import (
    check_attention,
    check_gates,
    check_indices,
    check_indices_shape,
    check_num_compressed,
    check_queries,
    check_selection,
    check_sizes,
)
from kernels_pallas.nsa.implementations import Implementation, operators_for
from kernels_pallas.nsa.importance import newest_candidates, select_by_rounds
from kernels_pallas.nsa.interface import Case
from kernels_pallas.nsa.support import (
    grouped,
    heads_joined,
    positions_of,
    queries_without_padding,
    seen_or_nothing,
    without_empty_slots,
    without_padding,
)


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
    """Attention to compressed keys; block i covers tokens [i * stride, i * stride + block_len) of a text and
    is visible to its token t only if i * stride + block_len - 1 <= t.

    Returns the output in the dtype of q and the log-sum-exp of the scaled scores in float32, -inf where no
    block is visible. `scale` is 1 / sqrt(Dk) when None.

    Raises:
        ValueError: shapes or sizes do not fit.
        NotImplementedError: the named implementation cannot take the case.
    """
    check_attention(q, (("k_cmp", k_cmp), ("v_cmp", v_cmp)), block_len=block_len, stride=stride)
    blocks = k_cmp.shape[1]
    operators = operators_for(Case("compressed_attention", q, k_cmp, v_cmp), implementation)
    positions = positions_of(q, segment_ids, q_positions, None)
    tokens = q.shape[1] if q_positions is None else None
    check_num_compressed(blocks, segment_ids, tokens, block_len, stride)
    if blocks == 0:
        empty = jnp.zeros((*q.shape[:3], v_cmp.shape[-1]), q.dtype)
        return empty, jnp.full(q.shape[:3], -jnp.inf, accumulator(q.dtype))
    if segment_ids is not None:
        k_cmp, v_cmp = (without_empty_slots(segment_ids, x, block_len, stride) for x in (k_cmp, v_cmp))
    k_cmp, v_cmp = seen_or_nothing(k_cmp, v_cmp)
    interval = Interval(stride, block_len - 1, None, default_scale(scale, q.shape[-1]))
    rows = grouped(queries_without_padding(q, positions), k_cmp)
    out, lse = operators.compressed_attention(interval, rows, k_cmp, v_cmp, positions)
    return heads_joined(out, positions), lse.reshape(q.shape[:3])


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
    share with it (Eq. 9 in overlap form, Eq. 10). The first `num_init` blocks of the query's text and the
    newest `num_local` ones, the query's own included, are always selected and count within `num_blocks`;
    among equals the lower index wins. Candidates hold at least one token that the query may see. `kv_len` is
    S; None takes it from segment_ids or, without q_positions, from q. No gradient flows through it.

    Raises:
        ValueError: shapes or sizes do not fit.
        NotImplementedError: the named implementation cannot take the case.
    """
    check_attention(q, (("k_cmp", k_cmp), ("k_cmp", k_cmp)), block_len=block_len, stride=stride)
    operators = operators_for(Case("select_blocks", q, k_cmp), implementation)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse has shape {lse.shape}; for q {q.shape} it must be {q.shape[:3]}")
    check_selection(block_size, num_blocks, num_init, num_local)
    if kv_len is None:
        if segment_ids is None and q_positions is not None:
            raise ValueError("select_blocks with q_positions needs kv_len, the number of keys")
        kv_len = q.shape[1] if segment_ids is None else segment_ids.shape[1]
    positions = positions_of(q, segment_ids, q_positions, None)
    check_num_compressed(k_cmp.shape[1], segment_ids, kv_len, block_len, stride)
    if segment_ids is not None:
        k_cmp = without_empty_slots(segment_ids, k_cmp, block_len, stride)
    scale = default_scale(scale, q.shape[-1])
    grid = SelectionGrid(block_len, stride, block_size, num_blocks, num_init, num_local, kv_len, scale)
    q, k_cmp, lse = lax.stop_gradient((queries_without_padding(q, positions), k_cmp, lse))
    q = grouped(q, k_cmp)
    indices = operators.select_blocks(grid, q, k_cmp, lse.reshape(q.shape[:-1]), positions)
    return checkpoint_name(indices, NSA_RESIDUALS[2])


def select_blocks_by_importance(
    importance: Float[Array, "B Hkv T N"],
    *,
    block_size: int,
    num_blocks: int,
    num_init: int = 1,
    num_local: int = 2,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
) -> Int[Array, "B Hkv T n"]:
    """`select_blocks` by another importance of the N selection blocks of each query's text than that of
    compressed keys.

    importance: float32, larger is better, of any sign; that of candidates is read, except of the first and
    local blocks, which are always selected. Candidates, ties and order are those of `select_blocks`. No
    gradient flows through the selection.

    Raises:
        ValueError: shapes or sizes do not fit.
    """
    check_selection(block_size, num_blocks, num_init, num_local)
    batch, _, length, blocks = importance.shape
    if segment_ids is not None and blocks * block_size < segment_ids.shape[1]:
        raise ValueError(f"{blocks} blocks of {block_size} do not cover {segment_ids.shape[1]} tokens")
    if q_positions is None and blocks * block_size < length:
        raise ValueError(f"{blocks} blocks of {block_size} do not cover {length} tokens")
    queries = jnp.zeros((batch, length, 1, 1), importance.dtype)
    newest = newest_candidates(block_size, positions_of(queries, segment_ids, q_positions, None))
    indices = select_by_rounds(lax.stop_gradient(importance), newest, num_blocks, num_init, num_local)
    return checkpoint_name(indices, NSA_RESIDUALS[2])


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
    """Attention to the tokens of the selected blocks that are not in the query's future.

    Block j holds tokens [j * block_size, (j + 1) * block_size) of the query's text. A query's indices must
    differ from each other; those below 0 or after the query's own block are missing slots and never read.
    Their order does not matter.

    Raises:
        ValueError: shapes or sizes do not fit.
        NotImplementedError: the named implementation cannot take the case.
    """
    check_attention(q, (("k", k), ("v", v)), block_size=block_size)
    operators = operators_for(Case("selected_attention", q, k, v, block_size), implementation)
    check_indices_shape(indices, q, k)
    positions = positions_of(q, segment_ids, q_positions, k)
    check_indices(indices, newest_candidates(block_size, positions))
    q, k, v = without_padding(q, k, v, positions)
    k, v = seen_or_nothing(k, v)
    block = Block(block_size, default_scale(scale, q.shape[-1]))
    indices = jnp.moveaxis(lax.stop_gradient(indices), 1, 2)
    out = operators.selected_attention(block, grouped(q, k), k, v, indices, positions)
    return heads_joined(out, positions)


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

    Raises:
        ValueError: shapes or sizes do not fit.
        NotImplementedError: the named implementation cannot take the case.
    """
    return window_attention_with_lse(
        q,
        k,
        v,
        window=window,
        scale=scale,
        segment_ids=segment_ids,
        q_positions=q_positions,
        implementation=implementation,
    )[0]


def window_attention_with_lse(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    *,
    window: int,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """`window_attention`, and the log-sum-exp of each query's scores in float32; -inf where it sees nothing.

    Raises:
        ValueError: shapes or sizes do not fit.
        NotImplementedError: the named implementation cannot take the case.
    """
    check_attention(q, (("k", k), ("v", v)), window=window)
    operators = operators_for(Case("window_attention", q, k, v), implementation)
    positions = positions_of(q, segment_ids, q_positions, k)
    q, k, v = without_padding(q, k, v, positions)
    k, v = seen_or_nothing(k, v)
    interval = Interval(1, 0, window, default_scale(scale, q.shape[-1]))
    out, lse = operators.window_attention(interval, grouped(q, k), k, v, positions)
    return heads_joined(out, positions), lse.reshape(q.shape[:3])


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
    q_cmp: Float[Array, "B T H Dk"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    indices: Int[Array, "B Hkv T n"] | None = None,
    implementation: Implementation | None = None,
    **sizes: Unpack[SizeOptions],
) -> tuple[Float[Array, "B T H Dv"], NsaBranches]:
    """All three branches, each with its own keys and values, weighted by `gates` (compression, selection,
    window).

    `k_cmp` and `v_cmp` come from `compress_blocks` with the same segment_ids.
    `q_cmp` replaces q in compression and selection of blocks (queries without RoPE, say). `indices` replaces
    the latter. `sizes` are the fields of `NsaSizes`, whose defaults are the paper's. Returns the weighted sum
    and the branches; what is not used of them costs nothing under jit.

    Raises:
        ValueError: shapes or sizes do not fit.
        NotImplementedError: the named implementation cannot take the case.
    """
    check_gates(gates, q)
    check_attention(
        q,
        (("k_slc", k_slc), ("v_slc", v_slc)),
        (("k_win", k_win), ("v_win", v_win)),
        (("k_cmp", k_cmp), ("v_cmp", v_cmp)),
    )
    n, length = NsaSizes(**sizes), k_slc.shape[1]
    if k_win.shape[1] != length:
        raise ValueError(f"k_win has {k_win.shape[1]} entries, k_slc {length}")
    check_queries(q, q_positions, segment_ids, k_slc)
    if q_cmp is not None and q_cmp.shape != q.shape:
        raise ValueError(f"q_cmp has shape {q_cmp.shape}, q {q.shape}")
    check_num_compressed(k_cmp.shape[1], segment_ids, length, n.block_len, n.stride)
    q_cmp = q if q_cmp is None else q_cmp
    blocks: dict[str, Any] = {"block_len": n.block_len, "stride": n.stride}
    # Positions, segments and scale are the same for each branch.
    common: dict[str, Any] = {
        "scale": n.scale,
        "segment_ids": segment_ids,
        "q_positions": q_positions,
        "implementation": implementation,
    }
    if k_cmp.shape[1]:
        check_selection(n.block_size, n.num_blocks, n.num_init, n.num_local)
        grid = n.grid(length, q.shape[-1])
        keys = k_cmp, v_cmp, k_slc, v_slc, k_win, v_win
        placed = segment_ids, q_positions
        found = _by_one_function(grid, n.window, q, q_cmp, keys, gates, indices, placed, implementation)
        if found is not None:
            return found
    compressed, lse = compressed_attention(q_cmp, k_cmp, v_cmp, **blocks, **common)
    if indices is None:
        indices = select_blocks(
            q_cmp,
            k_cmp,
            lse,
            block_size=n.block_size,
            num_blocks=n.num_blocks,
            num_init=n.num_init,
            num_local=n.num_local,
            kv_len=length,
            **blocks,
            **common,
        )
    selected = selected_attention(q, k_slc, v_slc, indices, block_size=n.block_size, **common)
    recent = window_attention(q, k_win, v_win, window=n.window, **common)
    out = weigh(gates, compressed, selected, recent)
    return out, NsaBranches(compressed, selected, recent, lse, indices)


def _by_one_function(
    grid: SelectionGrid,
    window: int,
    q: Array,
    q_cmp: Array,
    keys: tuple[Array, ...],
    gates: Array,
    indices: Array | None,
    placed: tuple[Array | None, Array | None],
    implementation: Implementation | None,
) -> tuple[Array, NsaBranches] | None:
    """Where one implementation takes all of it and has a function for the whole; `placed` are segments and
    positions."""
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = keys
    check_sizes(block_len=grid.block_len, stride=grid.stride, block_size=grid.block_size, window=window)
    if indices is not None:
        check_indices_shape(indices, q, k_slc)
    cases = (
        Case("compressed_attention", q_cmp, k_cmp, v_cmp),
        Case("select_blocks", q_cmp, k_cmp),
        Case("selected_attention", q, k_slc, v_slc, grid.block_size),
        Case("window_attention", q, k_win, v_win),
    )
    operators, *others = (operators_for(case, implementation) for case in cases)
    if operators.gated_attention is None or any(other is not operators for other in others):
        return None
    whole = Case("gated_attention", q, k_slc, v_slc, grid.block_size)
    if operators_for(whole, implementation) is not operators:
        return None
    segment_ids, q_positions = placed
    positions = positions_of(q, segment_ids, q_positions, k_slc)
    if indices is not None:
        check_indices(indices, newest_candidates(grid.block_size, positions))
        indices = jnp.moveaxis(lax.stop_gradient(indices), 1, 2)
    own_q_cmp = None if q_cmp is q else grouped(queries_without_padding(q_cmp, positions), k_cmp)
    if segment_ids is not None:
        sizes = grid.block_len, grid.stride
        k_cmp, v_cmp = (without_empty_slots(segment_ids, x, *sizes) for x in (k_cmp, v_cmp))
    q, k_slc, v_slc = without_padding(q, k_slc, v_slc, positions)
    _, k_win, v_win = without_padding(q, k_win, v_win, positions)
    pairs = ((k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win))
    keys = tuple(x for pair in pairs for x in seen_or_nothing(*pair))
    q_groups, gate_groups = grouped(q, k_slc), grouped(gates, k_slc)
    found = operators.gated_attention(
        grid, window, (q_groups, own_q_cmp, *keys), gate_groups, indices, positions
    )
    if found is None:
        return None
    out, compressed, selected, recent = (heads_joined(x, positions) for x in found[:4])
    lse, indices = found.lse.reshape(q.shape[:3]), jnp.moveaxis(found.indices, 2, 1)
    return out, NsaBranches(compressed, selected, recent, lse, indices)
