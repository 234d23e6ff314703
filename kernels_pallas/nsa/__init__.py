"""Native Sparse Attention: compression, selection of blocks, attention to them and to a window, and all as
one, over whole sequences and over a cache. README.md beside this file is the map."""

from kernels_pallas.nsa.api import (
    compressed_attention,
    nsa_attention,
    select_blocks,
    select_blocks_by_importance,
    selected_attention,
    window_attention,
    window_attention_with_lse,
)
from kernels_pallas.nsa.base import (
    NSA_RESIDUALS,
    NsaBranches,
    NsaSizes,
    SizeOptions,
    block_starts,
    num_compressed,
)
from kernels_pallas.nsa.checks import debug_checks
from kernels_pallas.nsa.decode_cache import (
    NewTokens,
    NsaCache,
    PagedCache,
    Recent,
    append_tokens,
    capacity,
    init_cache,
    init_paged_cache,
    page_for,
    whole,
)
from kernels_pallas.nsa.decoding import cached_attention
from kernels_pallas.nsa.implementations import Implementation
from kernels_pallas.nsa.specs.traffic import Traffic, bytes_per_decoded_token
from kernels_pallas.nsa.text_attention import (
    attend_part,
    attend_to_text,
    block_positions,
    compress_part,
    shared_tokens,
    window_of_part,
)
from kernels_pallas.nsa.xla.compression import compress_blocks

__all__ = [
    "NSA_RESIDUALS",
    "Implementation",
    "NewTokens",
    "NsaBranches",
    "NsaCache",
    "NsaSizes",
    "PagedCache",
    "Recent",
    "SizeOptions",
    "Traffic",
    "append_tokens",
    "attend_part",
    "attend_to_text",
    "block_positions",
    "block_starts",
    "bytes_per_decoded_token",
    "cached_attention",
    "capacity",
    "compress_blocks",
    "compress_part",
    "compressed_attention",
    "debug_checks",
    "init_cache",
    "init_paged_cache",
    "nsa_attention",
    "num_compressed",
    "page_for",
    "select_blocks",
    "select_blocks_by_importance",
    "selected_attention",
    "shared_tokens",
    "whole",
    "window_attention",
    "window_attention_with_lse",
    "window_of_part",
]
