"""What an implementation of Native Sparse Attention has, and what it is told of a call before it takes it."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import Block, GatedBranches, Interval, NsaBranches, Positions, SelectionGrid
from kernels_pallas.nsa.decode_cache import Cache, Recent


class Case(NamedTuple):
    """A call that an implementation may take, by its arguments."""

    operator: str
    q: Float[Array, "B T H Dk"]
    k: Float[Array, "B S Hkv Dk"]
    """Those of the selection branch where there are several; in a cache as they lie there."""
    v: Float[Array, "B S Hkv Dv"] | None = None
    block_size: int | None = None
    """Of selected blocks."""
    cache: Cache | None = None
    """For one token of every sequence."""


IntervalAttention = Callable[
    [Interval, Array, Array, Array, Positions],
    tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]],
]


class Operators(NamedTuple):
    """One implementation. Queries are grouped, [B, T, Hkv, G, Dk]; shapes were checked, padding holds zeros.

    `positions` have the segments of the tokens; blocks are counted from the start of each text. A query that
    sees nothing gets exactly 0, log-sum-exp -inf and zero gradients. The attentions are differentiable in
    reverse mode, of first order.
    """

    compressed_attention: IntervalAttention
    """(interval, q, k_cmp, v_cmp, positions) -> output in the dtype of q and the log-sum-exp in float32.
    M > 0. What a query sees is `base.intervals`."""
    select_blocks: Callable[[SelectionGrid, Array, Array, Array, Positions], Int[Array, "B Hkv T n"]]
    """(grid, q, k_cmp, lse [B, T, Hkv, G], positions) -> indices in ascending order, then -1."""
    selected_attention: Callable[[Block, Array, Array, Array, Array, Positions], Float[Array, "B T Hkv G Dv"]]
    """(block, q, k, v, indices int32 [B, T, Hkv, n], positions) -> output. Where blocks begin is
    `base.selected_rows`."""
    window_attention: IntervalAttention
    """As `compressed_attention`, a key being a token."""
    decode_token: Callable[
        [SelectionGrid, Cache, Recent, Array, Array, int, Array | None], tuple[Array, NsaBranches]
    ]
    """(grid, cache, recent, q [B, 1, H, Dk], gates [B, 1, H, 3], window, indices int32 [B, Hkv, 1, n] or
    None) -> the weighted sum, 0 for a sequence without a new token, and the branches of the newest token of
    each sequence, which the cache holds already."""
    gated_attention: Callable[..., GatedBranches | None] | None = None
    """(grid, window, (q, q_cmp or None, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), gates [B, T, Hkv, G, 3],
    indices [B, T, Hkv, n] or None, positions) -> everything at once, differentiable; None:
    not this case, it goes branch by branch. M > 0. No function: nothing is gained by it."""
