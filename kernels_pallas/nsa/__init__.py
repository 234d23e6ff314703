"""Native Sparse Attention: compression, choice of blocks, selection and window, and the three as one
attention."""

from kernels_pallas.nsa.api import (
    NsaBranches,
    best_blocks,
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.compression import compress_blocks, num_compressed
from kernels_pallas.nsa.support import Implementation

__all__ = [
    "Implementation",
    "NsaBranches",
    "best_blocks",
    "compress_blocks",
    "compressed_attention",
    "nsa_attention",
    "num_compressed",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
