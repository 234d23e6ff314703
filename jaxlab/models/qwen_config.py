"""What the vision tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL is."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError


@dataclass(frozen=True)
class QwenVisionConfig:
    """A vision transformer over images of any size, whose squares of patches become tokens."""

    frames: int = 2
    """Frames in a patch; an image is repeated."""
    merge: int = 2
    """Squares of so many patches a side become one token."""
    patch_bias: bool = False
    """A bias on the patch projection (Qwen3-VL)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm (Qwen2.5-VL), with an epsilon of 1e-6."""
    mlp: Literal["gated", "plain"] = "plain"
    """Gated (Qwen2.5-VL) or plain two-matrix MLP."""
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] = "quick_gelu"
    """Activation of the MLP."""
    window: int = 0
    """Pixels a side of the windows that layers see (Qwen2.5-VL); 0: all layers see the whole image."""
    full_layers: tuple[int, ...] = ()
    """Layers that see the whole image although there are windows."""
    position_side: int = 0
    """Rows and columns of the table of learned positions, stretched to each image (Qwen3-VL); 0: none."""
    deep_layers: tuple[int, ...] = ()
    """Layers whose outputs are added after the decoder's first ones, the earliest first (DeepStack of
    Qwen3-VL); the i-th named here has the i-th merger."""

    def __post_init__(self) -> None:
        for name in ("frames", "merge"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in ("window", "position_side"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        if self.full_layers and not self.window:
            raise ConfigError(
                "without windows all layers see the whole image; leave it empty", key="full_layers"
            )

        if len(set(self.deep_layers)) != len(self.deep_layers):
            raise ConfigError(f"{list(self.deep_layers)} names a layer twice", key="deep_layers")

    def window_side(self, patch_size: int) -> int:
        """Tokens a side of a window."""
        return self.window // self.merge // patch_size

    def check(self, patch_size: int, head_dim: int, num_layers: int) -> None:
        """Whether it fits a tower of such patches, heads and layers.

        Raises:
          ConfigError: a layer that there is not, a window smaller than a token, or heads that cannot be cut
            into four equal parts.
        """
        for name in ("full_layers", "deep_layers"):
            for layer in getattr(self, name):
                if not 0 <= layer < num_layers:
                    raise ConfigError(f"{layer} is none of {num_layers} layers", key=f"qwen.{name}")
        if self.window and not self.window_side(patch_size):
            raise ConfigError(f"{self.window} pixels hold no token", key="qwen.window")
        if head_dim % 4:
            raise ConfigError(f"heads of {head_dim} dimensions; it must be a multiple of 4", key="num_heads")
