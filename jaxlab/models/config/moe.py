"""What a mixture of experts is."""

import math
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
    router_dtype: Literal["compute", "float32"] = "compute"
    """What router logits are computed in: as everything else, or in float32 (DeepSeek-V3)."""
    router_bias: bool = False
    """A bias on router logits (gpt-oss)."""
    choice_bias: bool = False
    """A number for each expert that is added to its weight for the choice alone (DeepSeek-V3, sec. 2.1.2)."""
    num_groups: int = 1
    """Experts form so many groups of neighbours, and a token chooses among those of its best groups."""
    groups_per_token: int = 1
    """Groups in which a token may choose (DeepSeek-V2, arXiv 2405.04434, sec. 2.2.2)."""
    group_score: Literal["max", "top2"] = "max"
    """What makes a group good: its best expert, or its best two together (DeepSeek-V3)."""
    normalize: bool = True
    """The weights of the chosen experts sum to one."""
    scale: float = 1.0
    """Factor on the routed experts' output."""
    bias: bool = False
    """Biases in the routed experts (gpt-oss)."""
    swiglu_limit: float | None = None
    """The routed experts' gate is at most this and their up projection within it, and they compute
    gate * sigmoid(swiglu_alpha * gate) * (up + 1) (gpt-oss); none: as other gated MLPs."""
    swiglu_alpha: float = 1.702
    """Slope of that sigmoid."""
    first_dense: int = 0
    """So many first layers have an MLP of mlp_width instead."""
    balance_loss: float = 0.0
    """Weight of the load-balancing loss in training (Switch Transformer, arXiv 2101.03961, eq. 4)."""
    bias_rate: float = 0.0
    """Balance without a loss (arXiv 2408.15664): in training each update moves the choice_bias of an expert
    by this, up where it got less than its share of the choices, down where more; 0: it is not moved."""
    capacity_factor: float | None = None
    """An expert takes at most so many times its even share of the choices of a group of tokens, the first
    ones; what others chose it for is dropped. None: all."""
    capacity_group: int | None = None
    """Tokens of a row, counted from its start, that share a capacity; none: the row."""
    exchange: Literal["auto", "dense", "ragged"] = "auto"
    """How tokens reach experts on other devices: in buffers of the size that the most would need, or the
    tokens alone (GPUs); auto: ragged on GPUs."""

    def __post_init__(self) -> None:
        for name in ("shared_width", "first_dense", "balance_loss", "bias_rate"):
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
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(
                f"{self.num_experts} experts cannot form {self.num_groups} groups of one size",
                key="num_groups",
            )
        size = self.num_experts // self.num_groups
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ConfigError(
                f"{self.groups_per_token} of {self.num_groups} groups cannot be chosen",
                key="groups_per_token",
            )
        if self.groups_per_token * size < self.experts_per_token:
            raise ConfigError(
                f"{self.groups_per_token} groups of {size} experts have no {self.experts_per_token}",
                key="groups_per_token",
            )
        if self.group_score == "top2" and self.num_groups > 1 and size < 2:
            raise ConfigError("top2 needs groups of two experts or more", key="group_score")
        if self.bias_rate and not self.choice_bias:
            raise ConfigError("moves the bias of the choice; set choice_bias", key="bias_rate")
        if self.capacity_group is not None and self.capacity_factor is None:
            raise ConfigError("needs a capacity; set capacity_factor", key="capacity_group")
        if self.capacity_group is not None and self.capacity_group < 1:
            raise ConfigError(f"must be at least 1, is {self.capacity_group}", key="capacity_group")
        for name in ("swiglu_limit", "swiglu_alpha", "capacity_factor"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be positive and finite, is {getattr(self, name)}", key=name)
        if self.shared_gate and not self.shared_width:
            raise ConfigError("needs shared experts; set shared_width", key="shared_gate")

    def capacity(self, tokens: int) -> int | None:
        """Choices of a group of so many tokens that an expert takes; None: all."""
        if self.capacity_factor is None:
            return None
        even = tokens * self.experts_per_token / self.num_experts
        return min(tokens, max(1, math.ceil(self.capacity_factor * even)))
