"""The operators of this implementation."""

from kernels_pallas.nsa.interface import Operators
from kernels_pallas.nsa.xla.block_selection import select_blocks
from kernels_pallas.nsa.xla.decode import decode_token
from kernels_pallas.nsa.xla.interval_attention import attend_to_intervals
from kernels_pallas.nsa.xla.selected_attention import attend_to_blocks

OPERATORS = Operators(
    compressed_attention=attend_to_intervals,
    select_blocks=select_blocks,
    selected_attention=attend_to_blocks,
    window_attention=attend_to_intervals,
    decode_token=decode_token,
)
