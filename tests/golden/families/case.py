"""What a golden case is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]
"""Arguments of the model's forward, by transformers' names; `input_ids` is int64[B, T]."""


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    """Class of transformers."""
    config: Callable[[], Any]
    awkward: str
    """What the case is meant to catch."""
    inputs: Callable[[np.random.Generator], Inputs] | None
    """Of the forward; none: only names and config are recorded."""
    prompt: Callable[[np.random.Generator, bool], Inputs] | None = None
    """Of a generation; where the case is stateful, of a short and of a long one."""
    others: dict[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)
    """Further forwards, with other arguments made from those of `inputs`: stored as logits.NAME."""
    seed: int = 0
    centered_norms: str = ""
    """Pattern of the norms that scale by 1 + weight."""
    embedding: float = 0.3
    """Standard deviation of embeddings."""
    disk_names: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement) of names where `save_pretrained` of a new model writes others than it does for a
    checkpoint of the hub that was loaded."""
    transposed: str = ""
    """Pattern of the tensors whose last two axes stand the other way round on the hub."""
    layouts: list[dict[str, Any]] = field(default_factory=list)
    """Other names that the same tensors have in the wild; see README.md."""
    special: tuple[int, ...] = ()
    """Tokens that a generation must not contain."""
    stateful: bool = False
    """Rotary positions change as the sequence grows, so that generation depends on where it began."""
    variety: int = 5
    """Least number of different tokens in a generation."""
    no_effect: str = ""
    """Pattern of the tensors that are known not to matter."""
