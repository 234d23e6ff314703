"""Compression branch: overlapping blocks of tokens squeezed into one key and one value each, and attention to
them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import accumulator, ceil_div, num_compressed, pad_axis, where_finite


def compress_blocks(
    x: Float[Array, "B T Hkv D"],
    params: Mapping[str, Array],
    *,
    block_len: int,
    stride: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B M Hkv D"]:
    """Compress each complete block of `block_len` tokens, one every `stride` tokens, by one MLP (the paper's
    phi).

    Block i is `act(sum_j (x[i * stride + j] + position[j]) @ hidden[j] + hidden_bias) @ output + output_bias`
    with act = SiLU and j over the block, the same for every head. M = max(0, (T - block_len) // stride + 1).

    params: position [block_len, D], hidden [block_len, D, F], hidden_bias [F], output [F, D], output_bias
    [D]; they are cast to the dtype of x, sums run in float32. With `segment_ids`, tokens of segment 0
    (padding) count as zeros whatever they hold; blocks that touch them, or two segments, are computed but
    seen by no query.

    Source: arXiv 2502.11089, section 3.3.1.

    Raises:
        ValueError: the parameters do not fit x.
    """
    _check(x, params, block_len, stride)
    batch, length, heads, dim = x.shape
    blocks = num_compressed(length, block_len, stride)
    if blocks == 0:
        return jnp.zeros((batch, 0, heads, dim), x.dtype)
    if segment_ids is not None:
        x = where_finite((segment_ids != 0)[:, :, None, None], x)
    dtype = accumulator(x.dtype)
    # A block is `pieces` consecutive pieces of `stride` tokens, so no token is copied into several blocks:
    # each piece is multiplied with its part of the hidden weights and the products of neighbours are added.
    pieces = ceil_div(block_len, stride)
    used = (blocks - 1) * stride + block_len
    x = pad_axis(x[:, :used], 1, stride)
    x = x.reshape(batch, blocks + pieces - 1, stride, heads, dim)
    x = jnp.moveaxis(x, 3, 2).reshape(batch, blocks + pieces - 1, heads, stride * dim)
    weights = pad_axis(params["hidden"].astype(x.dtype), 0, stride)
    weights = weights.reshape(pieces, stride * dim, -1)
    # The position embedding enters linearly: one constant vector.
    constant = jnp.einsum(
        "jd,jdf->f", params["position"].astype(dtype), params["hidden"].astype(dtype)
    ) + params["hidden_bias"].astype(dtype)
    hidden = constant[None, None, None, :]
    for piece in range(pieces):
        hidden = hidden + jnp.einsum(
            "bmhe,ef->bmhf", x[:, piece : piece + blocks], weights[piece], preferred_element_type=dtype
        )
    hidden = jax.nn.silu(hidden).astype(x.dtype)
    out = jnp.einsum("bmhf,fd->bmhd", hidden, params["output"].astype(x.dtype), preferred_element_type=dtype)
    return (out + params["output_bias"].astype(dtype)[None, None, None, :]).astype(x.dtype)


def block_segments(
    segment_ids: Int[Array, "B S"], block_len: int, stride: int, blocks: int
) -> Int[Array, "B M"]:
    """Segment of each compressed block: that of its tokens if they all share one, else 0 (seen by nobody)."""
    starts = jnp.arange(blocks, dtype=jnp.int32) * stride
    first, last = segment_ids[:, starts], segment_ids[:, starts + block_len - 1]
    # Number of places up to each token where the segment changes: equal at both ends means one segment in
    # between.
    changes = jnp.cumsum((segment_ids[:, 1:] != segment_ids[:, :-1]).astype(jnp.int32), axis=1)
    changes = jnp.pad(changes, ((0, 0), (1, 0)))
    whole = changes[:, starts] == changes[:, starts + block_len - 1]
    return jnp.where(whole & (first == last), first, jnp.zeros_like(first))


def _check(x: Array, params: Mapping[str, Array], block_len: int, stride: int) -> None:
    if block_len < 1 or stride < 1:
        raise ValueError(f"block_len and stride must be positive, not {block_len} and {stride}")
    dim, width = x.shape[-1], params["hidden_bias"].shape[-1]
    expected = {
        "position": (block_len, dim),
        "hidden": (block_len, dim, width),
        "hidden_bias": (width,),
        "output": (width, dim),
        "output_bias": (dim,),
    }
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise ValueError(f"compression parameter '{name}' has shape {params[name].shape}, not {shape}")
