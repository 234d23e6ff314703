"""LoRA (arXiv 2106.09685) as a config: adapters are trained, the matrices beside them are not."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.checkpoints import AdapterSettings
from jaxlab.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, as PEFT has them."""

    rank: int = 8
    """Rank of each update (r)."""
    alpha: float = 16.0
    """An update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules by their names in transformers: q_proj, self_attn.q_proj, embed_tokens, or all-linear for
    every matrix but embedding and head."""
    parts: tuple[Literal["language", "vision", "projector"], ...] = ("language",)
    """Parts of a vision-language model in which targets are looked for."""
    also: tuple[str, ...] = ()
    """Parameters that are trained whole beside the adapters (PEFT's modules_to_save), by patterns as
    optimizer.groups has them: projector, layers.mlp_norm, *.bias."""
    dropout: float = 0.0
    """Part of an adapter's input that is dropped while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    merge: bool = False
    """At the end write the whole model too, the adapters merged into it."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1 << 16:
            raise ConfigError(f"must be from 1 to {1 << 16}, is {self.rank}", key="rank")
        if not 0 < self.alpha <= 1e6:
            raise ConfigError(f"must be positive and at most 1e6, is {self.alpha}", key="alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"must be in [0, 1), is {self.dropout}", key="dropout")
        for name in ("targets", "parts"):
            if not getattr(self, name):
                raise ConfigError("names nothing; leave it out for the default", key=name)

    @property
    def settings(self) -> AdapterSettings:
        return AdapterSettings(self.rank, self.alpha, self.dropout, self.rslora)
