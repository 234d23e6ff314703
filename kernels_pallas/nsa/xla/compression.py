"""Compression branch: overlapping blocks of tokens squeezed into one key and one value each, and attention to
them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import accumulator, block_starts, ceil_div, num_compressed, pad_axis
from kernels_pallas.nsa.checks import check_sizes


def compress_blocks(
    x: Float[Array, "B T Hkv D"],
    params: Mapping[str, Array],
    *,
    block_len: int,
    stride: int,
    segment_ids: Int[Array, "B T"] | None = None,
    starts: Int[Array, "B M"] | None = None,
) -> Float[Array, "B M Hkv D"]:
    """Compress each complete block of `block_len` tokens, one every `stride` tokens, by what `params` hold:

    * an MLP (the paper's phi), `act(sum_j (x[r + j] + position[j]) @ hidden[j] + hidden_bias) @ output +
      output_bias` with act = SiLU, j over the block and r the row at which it begins: position [block_len,
      D], hidden [block_len, D, F], hidden_bias [F], output [F, D], output_bias [D];
    * one linear map, `sum_j (x[r + j] + position[j]) @ weight[j] + bias`: position [block_len, D], weight
      [block_len, D, D], bias [D];
    * nothing: the mean of the block.

    They are the same for every head and are cast to the dtype of x; sums run in float32. Block i begins at
    i * stride, and there are M = num_compressed(T, block_len, stride) of them.

    With `segment_ids` (0 is padding) blocks are counted from each text's own start and lie in the slots of
    `block_starts`; M = num_compressed(T, block_len, stride, packed=True). Slots without a block get what
    zeros give; no query sees them. `starts` says instead where each block begins, -1 for none.

    Source: arXiv 2502.11089, section 3.3.1.

    Raises:
        ValueError: the parameters do not fit x, or the stride leaves tokens of packed texts out.
    """
    _check(x, params, block_len, stride)
    batch, length, heads, dim = x.shape
    if segment_ids is not None and starts is None:
        if segment_ids.shape != (batch, length):
            raise ValueError(f"segment_ids have shape {segment_ids.shape}, not {(batch, length)}")
        starts = block_starts(segment_ids, block_len=block_len, stride=stride)
    blocks = num_compressed(length, block_len, stride) if starts is None else starts.shape[1]
    if blocks == 0:
        return jnp.zeros((batch, 0, heads, dim), x.dtype)
    dtype = accumulator(x.dtype)
    # A block is `pieces` consecutive pieces of `stride` tokens, so no token is copied into several blocks:
    # each piece is multiplied with its part of the hidden weights and the products of neighbours are added.
    pieces = ceil_div(block_len, stride)
    if starts is None:
        regular = _regular_pieces(x, blocks, pieces, block_len, stride)
        piece_of_blocks = lambda piece: regular[:, piece : piece + blocks]
    else:
        piece_of_blocks = lambda piece: _piece_at(x, starts, piece * stride, stride, block_len)
    if not params:
        total = jnp.zeros((batch, blocks, heads, dim), dtype)
        for piece in range(pieces):
            tokens = piece_of_blocks(piece).reshape(batch, blocks, heads, stride, dim)
            inside = min(stride, block_len - piece * stride)
            total = total + jnp.sum(tokens[:, :, :, :inside], axis=3, dtype=dtype)
        return (total / block_len).astype(x.dtype)
    name, bias = ("hidden", "hidden_bias") if "hidden" in params else ("weight", "bias")
    weights = pad_axis(params[name].astype(x.dtype), 0, stride).reshape(pieces, stride * dim, -1)
    # The position embedding enters linearly: one constant vector.
    constant = jnp.einsum("jd,jdf->f", params["position"].astype(dtype), params[name].astype(dtype))
    hidden = (constant + params[bias].astype(dtype))[None, None, None, :]
    for piece in range(pieces):
        hidden = hidden + jnp.einsum(
            "bmhe,ef->bmhf", piece_of_blocks(piece), weights[piece], preferred_element_type=dtype
        )
    if name == "weight":
        return hidden.astype(x.dtype)
    hidden = jax.nn.silu(hidden).astype(x.dtype)
    out = jnp.einsum("bmhf,fd->bmhd", hidden, params["output"].astype(x.dtype), preferred_element_type=dtype)
    return (out + params["output_bias"].astype(dtype)[None, None, None, :]).astype(x.dtype)


def _regular_pieces(
    x: Array, blocks: int, pieces: int, block_len: int, stride: int
) -> Float[Array, "B pieces Hkv piece"]:
    """The row cut into pieces of `stride` tokens."""
    batch, _, heads, dim = x.shape
    used = (blocks - 1) * stride + block_len
    x = pad_axis(x[:, :used], 1, stride)
    x = x.reshape(batch, blocks + pieces - 1, stride, heads, dim)
    return jnp.moveaxis(x, 3, 2).reshape(batch, blocks + pieces - 1, heads, stride * dim)


def _piece_at(
    x: Array, starts: Int[Array, "B M"], offset: int, size: int, block_len: int
) -> Float[Array, "B M Hkv piece"]:
    """The `size` tokens from `offset` on of each block; zeros, and no gradient, where there is none.

    Within one piece no token belongs to two blocks, so the gradient's scatter adds at most one number to
    each place and gives the same bits every time.
    """
    batch, length, heads, dim = x.shape
    inside = offset + jnp.arange(size, dtype=jnp.int32)[None, None]
    there = (starts[:, :, None] >= 0) & (inside < block_len)
    token = jnp.where(there, starts[:, :, None] + inside, length).reshape(batch, -1)
    taken = jax.vmap(lambda y, at: y.at[at].get(mode="fill", fill_value=0))(x, token)
    taken = jnp.moveaxis(taken.reshape(batch, -1, size, heads, dim), 3, 2)
    return taken.reshape(batch, -1, heads, size * dim)


def _check(x: Array, params: Mapping[str, Array], block_len: int, stride: int) -> None:
    check_sizes(block_len=block_len, stride=stride)
    if x.ndim != 4:
        raise ValueError(f"what is compressed must have the 4 axes [B, T, H, D], not the shape {x.shape}")
    dim = x.shape[-1]
    expected: dict[str, tuple[int, ...]] = {}
    if "hidden" in params:
        width = params["hidden"].shape[-1]
        expected = {"hidden": (block_len, dim, width), "hidden_bias": (width,)}
        expected |= {"position": (block_len, dim), "output": (width, dim), "output_bias": (dim,)}
    elif params:
        expected = {"position": (block_len, dim), "weight": (block_len, dim, dim), "bias": (dim,)}
    if expected.keys() != params.keys():
        raise ValueError(
            f"compression parameters are {', '.join(sorted(params))}, not {', '.join(sorted(expected))}"
        )
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise ValueError(f"compression parameter '{name}' has shape {params[name].shape}, not {shape}")
