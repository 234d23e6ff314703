"""What a mixture of experts is."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the MLP: routed experts and, if any, shared ones."""

    num_experts: int
    """Routed experts (E)."""
    experts_per_token: int = 2
    """Routed experts that a token passes through (top-k)."""
    width: int = 352
    """Hidden width of a routed expert."""
    shared_width: int = 0
    """Hidden width of the shared experts together, which every token passes through; 0: none."""
    shared_gate: bool = False
    """A sigmoid of the token weights the shared experts' output (Qwen2-MoE)."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become weights, before the choice."""
    normalize: bool = True
    """The weights of the chosen experts sum to one."""
    scale: float = 1.0
    """Factor on the routed experts' output."""
    first_dense: int = 0
    """So many first layers have an MLP of mlp_width instead."""
    balance_loss: float = 0.0
    """Weight of the load-balancing loss in training (Switch Transformer, arXiv 2101.03961, eq. 4)."""

    def __post_init__(self) -> None:
        for name in ("shared_width", "first_dense", "balance_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        for name in ("num_experts", "experts_per_token", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"{self.experts_per_token} of {self.num_experts} experts cannot be chosen",
                key="experts_per_token",
            )
        if self.shared_gate and not self.shared_width:
            raise ConfigError("needs shared experts; set shared_width", key="shared_gate")
