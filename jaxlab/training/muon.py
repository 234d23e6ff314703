"""Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982) as a config, and which parameters are its
matrices."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlab.errors import ConfigError
from jaxlab.models import Params

_STACKED = ("layers", "experts", "branch")
"""Leading axes along which matrices are stacked; each is a matrix of its own."""
_NO_MATRIX = frozenset(
    ("vocab", "pixels", "channels", "frames", "position", "ratio", "tile", "gate", "experts")
)
"""Axes of what AdamW keeps: embeddings, heads, patches, tables of positions, gates and routers."""


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the hidden matrices; embedding, head, norms, biases, gates and routers stay with AdamW."""

    learning_rate: float | None = None
    """Peak learning rate of these matrices; null: optimizer.learning_rate."""
    momentum: float = 0.95
    """Decay of the mean of gradients."""
    nesterov: bool = True
    """Look ahead by one more mean."""
    newton_schulz_steps: int = 5
    """Steps of the iteration that makes an update orthogonal."""
    rms: float | None = 0.2
    """Updates are scaled to this root mean square, that of AdamW's, by sqrt(max(in, out)) (arXiv 2502.16982),
    so that learning rate and weight decay are AdamW's; null: by sqrt(max(1, out / in)) (Jordan et al.)."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "rms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"must be positive, is {value}", key=name)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"must be in [0, 1), is {self.momentum}", key="momentum")
        if not 1 <= self.newton_schulz_steps <= 100:
            raise ConfigError(
                f"must be from 1 to 100, is {self.newton_schulz_steps}", key="newton_schulz_steps"
            )


def muon_dimensions(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a parameter are inputs and outputs of the matrix that it is; None: it is none for Muon.

    All heads of a projection are one matrix, [embed, heads * head_dim], as checkpoints have it; layers,
    experts and NSA's branches are matrices of their own.
    """
    lead = 0
    while lead < len(axes) and axes[lead] in _STACKED:
        lead += 1
    own = axes[lead:]
    if len(own) < 2 or not _NO_MATRIX.isdisjoint(own):
        return None
    inputs = 2 if own[0] in ("heads", "kv_heads", "block") and len(own) > 2 else 1
    numbers = range(lead, len(axes))
    return MuonDimensionNumbers(tuple(numbers[:inputs]), tuple(numbers[inputs:]))


def scale_by_muon_matrices(
    config: MuonConfig, dimensions: dict[str, MuonDimensionNumbers], shapes: dict[str, tuple[int, ...]]
) -> optax.GradientTransformation:
    """Muon's updates for a tree of which only the leaves named in `dimensions` are no MaskedNode."""

    def of(params: Params) -> Any:
        is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if is_masked(leaf) else dimensions[_name(path)],
            params,
            is_leaf=is_masked,
        )

    def scale(updates: Params, params: Params | None = None) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, u: muon_scale(shapes[_name(path)], dimensions[_name(path)], config.rms) * u, updates
        )

    return optax.chain(
        scale_by_muon(
            ns_steps=config.newton_schulz_steps,
            beta=config.momentum,
            nesterov=config.nesterov,
            weight_dimension_numbers=of,
        ),
        optax.stateless(scale),
    )


def muon_scale(shape: tuple[int, ...], dimensions: MuonDimensionNumbers, rms: float | None) -> float:
    """What an orthogonal update of a matrix is multiplied with."""
    fan_in = fan_out = 1
    for axis in dimensions.reduction_axis:
        fan_in *= shape[axis]
    for axis in dimensions.output_axis:
        fan_out *= shape[axis]
    return max(1.0, fan_out / fan_in) ** 0.5 if rms is None else rms * max(fan_in, fan_out) ** 0.5


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
