"""What the attention of every layer needs to know of the tokens of a batch."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int

from jaxlab.models.rotary import Rotary


class AttentionContext(NamedTuple):
    """Positions of a batch's tokens, and which of them may see each other."""

    positions: Int[Array, "B T *axes"]
    """Position within the sequence; with M-RoPE its three coordinates."""
    segment_ids: Int[Array, "B T"] | None = None
    """Packed sequences; 0 is padding. None: one sequence a row, no padding."""
    cache_slots: Int[Array, "B T"] | None = None
    """With a cache: the slot of the cache that each token takes."""
    together: Int[Array, "B T"] | None = None
    """Tokens of one number above 0 see each other whatever their order (the patches of an image)."""
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """Cosines and sines of full and of sliding layers; None: attention has no rotary positions."""
    causal: bool = True
    together_in_window: bool = False
    """Sliding layers bound what `together` allows by their window (Gemma 3)."""
    visible: Bool[Array, "B T"] | None = None
    """Tokens that may be seen; None: all (the patches of an image within a larger tensor)."""
    apart: Bool[Array, "B T"] | None = None
    """Tokens that do not see each other, and the others do (what fills up the tiles of Mllama)."""

    real: Bool[Array, "B T"] | None = None
    """Tokens that are no padding; None: all, or nobody asks."""
    stretches: int = 1
    """Of the tokens of a sequence that each device of a mesh has: with 2 the tokens lie in a zigzag
    (`jaxlab.models.mesh.reorder`), their rotary positions and `real` too; all else here is in order."""

    def for_layer(self, rotary: bool) -> "AttentionContext":
        """What a layer with or without rotary positions knows."""
        return self if rotary else self._replace(rotary=None, local_rotary=None)
