"""Native Sparse Attention: compression, choice of blocks, selection and window, and the three as one
attention, over whole sequences and over a cache."""

from kernels_pallas.nsa.api import (
    NsaBranches,
    best_blocks,
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.cache import (
    NewTokens,
    NsaCache,
    PagedCache,
    Recent,
    append_tokens,
    init_cache,
    init_paged_cache,
    page_for,
    whole,
)
from kernels_pallas.nsa.compression import compress_blocks, num_compressed
from kernels_pallas.nsa.decode import cached_attention
from kernels_pallas.nsa.support import Implementation
from kernels_pallas.nsa.traffic import Traffic, bytes_per_decoded_token

__all__ = [
    "Implementation",
    "NewTokens",
    "NsaBranches",
    "NsaCache",
    "PagedCache",
    "Recent",
    "Traffic",
    "append_tokens",
    "best_blocks",
    "bytes_per_decoded_token",
    "cached_attention",
    "compress_blocks",
    "compressed_attention",
    "init_cache",
    "init_paged_cache",
    "nsa_attention",
    "num_compressed",
    "page_for",
    "select_blocks",
    "selected_attention",
    "whole",
    "window_attention",
]
