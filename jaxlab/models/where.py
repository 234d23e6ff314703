"""Where the tokens of a batch stand, for the attention of every layer."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int

from jaxlab.models.rotary import Rotary


class Where(NamedTuple):
    """Where the tokens of a batch stand: what every layer's attention needs to know of them."""

    positions: Int[Array, "B T *axes"]
    """Position within the sequence; with M-RoPE its three coordinates."""
    segment_ids: Int[Array, "B T"] | None = None
    """Packed sequences; 0 is padding. None: one sequence a row, no padding."""
    rows: Int[Array, "B T"] | None = None
    """With a cache: the row of the cache that each token takes."""
    together: Int[Array, "B T"] | None = None
    """Tokens of one number above 0 see each other whatever their order (the patches of an image)."""
    local_segments: Int[Array, "B T"] | None = None
    """Segments of sliding layers, where they are others (the windows of a vision tower)."""
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """Turns of full and of sliding layers; None: attention has no rotary positions."""
    together_in_window: bool = False
    """Sliding layers bound what `together` allows by their window (Gemma 3)."""
    visible: Bool[Array, "B T"] | None = None
    """Tokens that may be seen; None: all (the patches of an image within a larger tensor)."""
