"""Facts of a call, and what both forms of attention share."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

MASKED = -1e30
"""Stands for minus infinity, without the NaN of inf - inf in rows that see nothing."""
RELEASED_LOGIT = -10000.0
"""The logit of a blocked edge in the released code."""


FLOW_RESIDUALS = ("flow_queries", "flow_keys", "flow_values", "flow_output", "flow_lse")
"""Names (`checkpoint_name`) of what the backward pass needs of the forward pass: its inputs as it reads them,
and what it cannot have of them without a product."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static in a call of full or sliding attention."""

    scale: float
    window: int | None = None
    """The last so many tokens, the current one included."""
    softcap: float | None = None
    """Scores are cap * tanh(score / cap)."""
    together_in_window: bool = False
    """Whether the window bounds what `Marks.together` allows too."""
    rows: int | None = None
    """Rows and columns of a tile; None: from the sizes."""


class Marks(NamedTuple):
    """What tokens carry, of which depends who sees whom besides their order."""

    segment_ids: Int[Array, "B T"] | None = None
    """Tokens see their own segment only; 0 is padding, which sees nothing and is seen by none."""
    together: Int[Array, "B T"] | None = None
    """Tokens of one number above 0 see each other whatever their order (the patches of an image)."""


def softcapped(scores: Array, cap: float | None) -> Array:
    """Scores in (-cap, cap)."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def through_softcap(d_scores: Array, scores: Array, cap: float | None) -> Array:
    """The gradient of scores before the cap, from that of `scores` behind it."""
    return d_scores if cap is None else d_scores * (1.0 - jnp.square(scores / cap))
