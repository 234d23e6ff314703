"""What decoding reads of the cache for one token, by the paper's count."""

from collections.abc import Sequence
from typing import NamedTuple


class Traffic(NamedTuple):
    """Of one sequence and layer, for one decoded token."""

    nsa_tokens: int
    dense_tokens: int
    nsa_bytes: int
    dense_bytes: int


def bytes_per_decoded_token(
    length: int,
    *,
    kv_heads: int = 4,
    key_dim: int = 192,
    value_dim: int = 128,
    itemsize: int = 2,
    stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    window: int = 512,
    branches: Sequence[str] = ("compression", "selection", "window"),
) -> Traffic:
    """K/V that a token reads at `length` tokens: length / stride compressed ones, the selected blocks and the
    window, against all with dense attention (arXiv 2502.11089, table 4; the defaults are its model, bf16).

    Of the compressed ones block_len / stride - 1 fewer are complete than the paper counts.

    Raises:
        ValueError: a size is below 1.
    """
    sizes = (length, kv_heads, key_dim, value_dim, itemsize, stride, block_size, num_blocks, window)
    if min(sizes) < 1:
        raise ValueError(f"sizes must be positive, not {min(sizes)}")
    read = {
        "compression": length // stride,
        "selection": min(length, num_blocks * block_size),
        "window": min(length, window),
    }
    nsa = sum(read[branch] for branch in branches)
    of_token = kv_heads * (key_dim + value_dim) * itemsize
    return Traffic(nsa, length, nsa * of_token, length * of_token)
