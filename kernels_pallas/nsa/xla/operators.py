"""The operators of this implementation."""

from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import Interval, Positions
from kernels_pallas.nsa.interface import Operators
from kernels_pallas.nsa.xla.block_selection import select_blocks
from kernels_pallas.nsa.xla.decode import decode_token
from kernels_pallas.nsa.xla.interval_attention import attend_to_intervals
from kernels_pallas.nsa.xla.selected_attention import attend_to_blocks


def interval_attention(
    interval: Interval,
    q: Float[Array, "B T Hkv G Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    positions: Positions,
    block_segments: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B T Hkv G Dv"], Float[Array, "B T Hkv G"]]:
    """Compressed and window attention; the keys are blocks where `block_segments` are given."""
    if block_segments is not None:
        positions = positions._replace(key_segments=block_segments)
    return attend_to_intervals(interval, q, k, v, positions)


OPERATORS = Operators(
    compressed_attention=interval_attention,
    select_blocks=select_blocks,
    selected_attention=attend_to_blocks,
    window_attention=interval_attention,
    decode_token=decode_token,
)
