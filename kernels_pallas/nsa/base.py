"""What the whole package shares: records that go between its parts, arithmetic of blocks, safe numerics.

Axis letters as in api.py, and G = H / Hkv query heads of a group.
"""

import dataclasses
import math
from typing import NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

NSA_RESIDUALS = ("nsa_output", "nsa_lse", "nsa_indices")
"""Names (`jax.ad_checkpoint.checkpoint_name`) of what the backward passes need of the forward passes besides
their inputs: outputs and log-sum-exps of the branches, and chosen blocks. With a policy that saves them no
attention is computed twice."""
NOWHERE = np.iinfo(np.int32).max
"""Index of an entry that is neither written nor read."""


class NsaBranches(NamedTuple):
    """Outputs of the three branches before the gates, what blocks were selected from, and which were."""

    compressed: Float[Array, "B T H Dv"]
    selected: Float[Array, "B T H Dv"]
    window: Float[Array, "B T H Dv"]
    lse: Float[Array, "B T H"]
    indices: Int[Array, "B Hkv T n"]


class GatedBranches(NamedTuple):
    """The sum of the branches times their gates, and `NsaBranches` with grouped heads."""

    out: Float[Array, "B T Hkv G Dv"]
    compressed: Float[Array, "B T Hkv G Dv"]
    selected: Float[Array, "B T Hkv G Dv"]
    window: Float[Array, "B T Hkv G Dv"]
    lse: Float[Array, "B T Hkv G"]
    indices: Int[Array, "B T Hkv n"]


class Positions(NamedTuple):
    """Where queries and keys stand: absolute positions of the queries, and segments when sequences are
    packed."""

    q_positions: Int[Array, "B T"]
    q_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None


class Interval(NamedTuple):
    """Key i stands at i * stride + offset and is seen from there on, for `window` positions (None: for
    ever)."""

    stride: int
    offset: int
    window: int | None
    scale: float


class Block(NamedTuple):
    """Static facts of selected attention."""

    size: int
    scale: float


class SelectionGrid(NamedTuple):
    """Static sizes of the selection of blocks; `kv_len` tokens make ceil(kv_len / block_size) of them."""

    block_len: int
    stride: int
    block_size: int
    num_blocks: int
    num_init: int
    num_local: int
    kv_len: int
    scale: float

    @property
    def candidates(self) -> int:
        return ceil_div(self.kv_len, self.block_size)


class SizeOptions(TypedDict, total=False):
    """The fields of `NsaSizes`, as keywords of the public functions."""

    block_len: int
    stride: int
    block_size: int
    num_blocks: int
    num_init: int
    num_local: int
    window: int
    scale: float | None


@dataclasses.dataclass(frozen=True)
class NsaSizes:
    """Static sizes of all three branches; the defaults are the paper's."""

    block_len: int = 32
    """Tokens of a compressed block."""
    stride: int = 16
    """Tokens between the starts of compressed blocks."""
    block_size: int = 64
    """Tokens of a selection block."""
    num_blocks: int = 16
    """Selection blocks that a query reads, the forced ones included."""
    num_init: int = 1
    """First blocks of the query's text that are always read."""
    num_local: int = 2
    """Newest blocks that are always read, the query's own included."""
    window: int = 512
    """Tokens of the sliding window, the query's own included."""
    scale: float | None = None
    """Of the scores; None: 1 / sqrt(Dk)."""

    def grid(self, kv_len: int, key_dim: int) -> SelectionGrid:
        """Of `kv_len` keys."""
        scale = default_scale(self.scale, key_dim)
        sizes = self.block_len, self.stride, self.block_size, self.num_blocks, self.num_init, self.num_local
        return SelectionGrid(*sizes, kv_len, scale)


class Residuals(NamedTuple):
    """What an attention's forward pass leaves to its backward pass; nothing of size queries times keys."""

    q: Array
    k: Array
    v: Array
    indices: Array | None
    """Of selected blocks, where there are some."""
    positions: Positions
    out: Array
    lse: Array


def named(out: Array, lse: Array) -> tuple[Array, Array]:
    """An output and its log-sum-exp under their names in `NSA_RESIDUALS`."""
    return checkpoint_name(out, NSA_RESIDUALS[0]), checkpoint_name(lse, NSA_RESIDUALS[1])


def softmax_shift(saved: Residuals, d_out: Array, d_lse: Array) -> Array:
    """By what a softmax's gradient lessens the gradient of each weight: the sum of d_out * out over the head
    dim, less the gradient of the log-sum-exp, which is none for a query that saw nothing."""
    dtype = accumulator(saved.q.dtype)
    d_lse = jnp.where(saved.lse == -jnp.inf, jnp.zeros_like(d_lse), d_lse)
    return dot_outputs(d_out.astype(dtype), saved.out) - d_lse


def dot_outputs(d_out: Float[Array, "*heads Dv"], out: Float[Array, "*heads Dv"]) -> Float[Array, "*heads"]:
    """Sum of both over the head dim, 0 where nothing asks for a gradient, be the output NaN."""
    found = jnp.sum(d_out * out.astype(d_out.dtype), axis=-1)
    return where_finite(jnp.any(d_out != 0, axis=-1), found)


def softmax_floor(lse: Array) -> Array:
    """The log-sum-exp for a backward pass: 0 for a query that saw nothing. That of one that saw a NaN, all of
    whose weights are then 0, for the keys' sake: `softmax_shift` is NaN where it asks for gradients."""
    return jnp.where(jnp.isnan(lse), jnp.full_like(lse, jnp.inf), finite(lse))


def num_compressed(length: int, block_len: int, stride: int, *, packed: bool = False) -> int:
    """Number of complete blocks in a text of `length` tokens; `packed`: of the slots of a row of so many,
    however it is divided into texts (see `block_starts`), which is at most one more."""
    if length < block_len:
        return 0
    return (ceil_div(length - block_len, stride) if packed else (length - block_len) // stride) + 1


def overlap(start: int, length: int, other_start: int, other_length: int) -> int:
    """Tokens that two intervals share."""
    return max(0, min(start + length, other_start + other_length) - max(start, other_start))


def ceil_div[N: (int, Array)](a: N, b: int) -> N:
    return -(-a // b)


def power_of_two_at_most(x: int) -> int:
    """Largest power of two that is at most x (1 for anything smaller)."""
    return 1 << max(0, x.bit_length() - 1) if x >= 1 else 1


def default_scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if scale is None else scale


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Softmax and sums run in float32, or in the input's type where that is wider."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def finite(x: Array) -> Array:
    """Replace the -inf that stands for 'nothing visible' by 0, so that differences with it are defined."""
    return jnp.where(x == -jnp.inf, jnp.zeros_like(x), x)


def where_finite(mask: Bool[Array, "..."], x: Array) -> Array:
    """x where the mask holds, else 0; also stops NaN and its gradient."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def without_nan(k: Array) -> Array:
    """Keys for a backward pass: a weight's gradient of 0 does not stop a NaN in the key that it meets. Who
    saw such a key has a NaN in its log-sum-exp or output, and so in its gradient."""
    return where_finite(jnp.isfinite(k), k)


def pad_axis(x: Array, axis: int, multiple: int, *, fill: int | None = 0) -> Array:
    """Pad the end of one axis with a value (None: its last one) up to a multiple."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, mode="edge") if fill is None else jnp.pad(x, widths, constant_values=fill)


def heads_first(x: Array) -> Array:
    """[B, T, Hkv, ...] -> [B, Hkv, T, ...]."""
    return jnp.moveaxis(x, 2, 1)


def segment_starts(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Row of the first token of the segment that each token belongs to."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    changed = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return lax.cummax(jnp.where(changed, index, jnp.zeros_like(index)), axis=1)


def text_starts(positions: Positions) -> Int[Array, "B T"]:
    """Row of the first token of each query's text."""
    if positions.key_segments is None:
        return jnp.zeros_like(positions.q_positions)
    return jnp.take_along_axis(segment_starts(positions.key_segments), positions.q_positions, axis=1)


def is_padding(positions: Positions) -> Bool[Array, "B T"]:
    """Queries of segment 0."""
    if positions.q_segments is None:
        return jnp.zeros(positions.q_positions.shape, bool)
    return positions.q_segments == 0


def block_starts(segment_ids: Int[Array, "B S"], *, block_len: int, stride: int) -> Int[Array, "B M"]:
    """The row at which the compressed block in each slot of a packed row begins, -1 where there is none.

    A text that begins at row s has its i-th block in slot ceil(s / stride) + i. That slot's row of the grid,
    slot * stride, is a token of the block, so it says whose block it is; and as block_len >= stride, no two
    texts want the same slot. M = num_compressed(S, block_len, stride, packed=True).

    Raises:
        ValueError: the stride leaves tokens out, or segment_ids are not those of a batch.
    """
    if segment_ids.ndim != 2:
        raise ValueError(f"segment_ids have shape {segment_ids.shape}, not [B, S]")
    if stride > block_len:
        raise ValueError(f"stride {stride} exceeds block_len {block_len}: packed texts would share blocks")
    length = segment_ids.shape[1]
    slots = num_compressed(length, block_len, stride, packed=True)
    row = jnp.arange(slots, dtype=jnp.int32) * stride
    starts = segment_starts(segment_ids)
    begin = row[None] - (-starts[:, row]) % stride
    last = jnp.minimum(begin + block_len, length) - 1
    whole = (begin + block_len <= length) & (jnp.take_along_axis(starts, last, axis=1) == starts[:, row])
    return jnp.where(whole & (segment_ids[:, row] != 0), begin, -1)


def intervals(
    positions: Positions, stride: int, offset: int, window: int | None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First key and end of the keys that each query sees; end <= first where it sees none.

    Key ceil(s / stride) + i stands for the tokens s + i * stride ... s + i * stride + offset of the text that
    begins at row s; none of them may be in the query's future. `window` bounds the age of a key's last token;
    keys are then tokens.
    """
    start, newest = text_starts(positions), positions.q_positions
    count = jnp.maximum((newest - start - offset) // stride + 1, 0)
    first = ceil_div(start, stride)
    end = jnp.where(is_padding(positions), 0, first + count)
    if window is not None:
        assert (stride, offset) == (1, 0)
        first = jnp.maximum(first, newest - window + 1)
    return first, end


def selected_rows(
    indices: Int[Array, "B T Hkv n"], positions: Positions, size: int
) -> Int[Array, "B T Hkv n"]:
    """The row at which each selected block of the query's text begins; -1 for missing slots, for blocks in
    the query's future, and for all of padding."""
    start = text_starts(positions)
    own = jnp.where(is_padding(positions), -1, (positions.q_positions - start) // size)
    there = (indices >= 0) & (indices <= own[:, :, None, None])
    return jnp.where(there, start[:, :, None, None] + indices * size, -1)


def weigh(
    gates: Float[Array, "*heads 3"],
    compressed: Float[Array, "*heads Dv"],
    selected: Float[Array, "*heads Dv"],
    recent: Float[Array, "*heads Dv"],
) -> Float[Array, "*heads Dv"]:
    """Sum of the branches times their gates, in float32: a gate's gradient is a sum over the head dim."""
    dtype = accumulator(compressed.dtype)
    of = lambda i, x: gates[..., i, None].astype(dtype) * x.astype(dtype)
    return (of(0, compressed) + of(1, selected) + of(2, recent)).astype(compressed.dtype)
