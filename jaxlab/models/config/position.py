"""How a model knows where a token stands."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions, and how they are stretched to sequences longer than those of training."""

    kind: Literal["rotary"] = "rotary"
    theta: float = 10000.0
    """Base of the wavelengths."""
    dim: int | None = None
    """Dimensions of a head that turn, the first ones; none means all."""
    interleaved: bool = False
    """Pairs are neighbours (2i, 2i + 1), as in GPT-J, not halves (i, i + dim / 2), as in Llama."""
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"] = "none"
    """linear: positions divided by factor. dynamic: theta grows with the sequence. yarn: arXiv 2309.00071.
    llama3: Llama 3.1's wavelength-dependent division. longrope: arXiv 2402.13753, a factor on
    each wavelength."""
    factor: float = 1.0
    """How many times longer than original_length sequences may be."""
    original_length: int = 8192
    """Longest sequence before stretching (dynamic, yarn, llama3, longrope)."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_length / this are divided in full."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_length / this stay."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over original_length stay."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are divided in full."""
    truncate: bool = True
    """yarn: the bounds of the ramp are whole dimensions."""
    attention_factor: float | None = None
    """yarn, longrope: factor on cosines and sines; none means 0.1 ln(factor) + 1, and for longrope
    sqrt(1 + ln(factor) / ln(original_length))."""
    short_factors: tuple[float, ...] = ()
    """longrope: on the wavelength of each pair, while no sequence of a batch exceeds original_length."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same once one does."""
    sections: tuple[int, ...] = ()
    """Pairs of a head that turn by the first, second, third coordinate of a position (M-RoPE of Qwen2-VL);
    empty: positions have one coordinate."""
    sections_interleaved: bool = False
    """Coordinates alternate over the pairs (Qwen3-VL) instead of taking one stretch each."""
    layers: tuple[bool, ...] = ()
    """Whether the first layers turn their queries and keys, repeated over the others; those that do not know
    no positions (NoPE, arXiv 2305.19466). Empty: all layers turn them."""

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_frequency_factor", "high_frequency_factor", "beta_fast"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be positive and finite, is {getattr(self, name)}", key=name)
        if self.original_length < 1:
            raise ConfigError(f"must be at least 1, is {self.original_length}", key="original_length")
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ConfigError(f"must be even and positive, is {self.dim}", key="dim")
        if (self.scaling == "longrope") != bool(self.short_factors and self.long_factors):
            raise ConfigError("longrope, and it alone, has factors for short and long texts", key="scaling")
        for name in ("short_factors", "long_factors"):
            if not all(0 < factor < float("inf") for factor in getattr(self, name)):
                raise ConfigError("must be positive and finite numbers", key=name)
        if self.layers and not any(self.layers):
            raise ConfigError("names no layer with positions; set kind none", key="layers")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ConfigError(
                f"must be above low_frequency_factor {self.low_frequency_factor}, "
                f"is {self.high_frequency_factor}",
                key="high_frequency_factor",
            )


@dataclass(frozen=True)
class LearnedPositions:
    """A table with a learned vector for each position up to max_length."""

    kind: Literal["learned"] = "learned"
    offset: int = 0
    """Rows of the table before that of the first position (OPT's are 2)."""

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ConfigError(f"must not be negative, is {self.offset}", key="offset")


@dataclass(frozen=True)
class NoPositions:
    """Tokens do not know where they stand, but for what a causal mask tells them."""

    kind: Literal["none"] = "none"


PositionConfig = RopeConfig | LearnedPositions | NoPositions
