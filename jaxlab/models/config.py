"""What a model is: one frozen description for language models and vision-language models."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError


@dataclass(frozen=True)
class NSAConfig:
    """Native Sparse Attention (ACL 2025, sec. 3); the defaults are the paper's."""

    block_len: int = 32
    """Tokens in a compression block (l)."""
    stride: int = 16
    """Tokens between the starts of compression blocks (d)."""
    block_size: int = 64
    """Tokens in a selection block (l')."""
    num_blocks: int = 16
    """Selection blocks that a query reads (n), the forced ones included."""
    num_init: int = 1
    """Blocks at the start of the sequence that are always read."""
    num_local: int = 2
    """Blocks ending at the query's own that are always read."""
    window: int = 512
    """Tokens of the sliding window (w), the query's own included."""
    compress_width: int = 256
    """Hidden width of the MLP that compresses a block's keys (another one its values)."""
    gate_width: int = 0
    """Hidden width of the gate MLP; 0 makes it one linear layer."""

    def __post_init__(self) -> None:
        for name in ("block_len", "stride", "block_size", "num_blocks", "window", "compress_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in ("num_init", "num_local", "gate_width"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        if self.num_init + self.num_local > self.num_blocks:
            raise ConfigError(
                f"{self.num_blocks} blocks cannot hold the forced {self.num_init} first "
                f"and {self.num_local} local ones; raise num_blocks",
                key="num_blocks",
            )
        if self.stride > self.block_len:
            raise ConfigError(
                f"stride {self.stride} exceeds block_len {self.block_len}: tokens would be lost", key="stride"
            )


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer over square patches, and a two-layer projector into the decoder."""

    num_layers: int = 0
    """Layers of the vision transformer; 0 means a language model without vision."""
    image_size: int = 8
    """Height and width of an image in pixels."""
    patch_size: int = 2
    """Height and width of a patch in pixels; each patch becomes one token."""
    channels: int = 1
    """Colour channels."""
    width: int = 64
    """Width of the vision transformer."""
    num_heads: int = 4
    """Attention heads of the vision transformer."""
    mlp_width: int = 256
    """Hidden width of its MLP."""
    image_token: int = 0
    """Token id that stands in the text where a patch goes."""

    def __post_init__(self) -> None:
        if self.num_layers < 0:
            raise ConfigError(f"must not be negative, is {self.num_layers}", key="num_layers")
        for name in ("image_size", "patch_size", "channels", "width", "num_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.num_layers == 0:
            return
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
                key="patch_size",
            )
        if self.width % self.num_heads:
            raise ConfigError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}", key="num_heads"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, with or without vision."""

    vocab_size: int = 256
    """Rows of the embedding table."""
    width: int = 128
    """Model width (D)."""
    num_layers: int = 4
    """Decoder layers (L)."""
    num_heads: int = 4
    """Query heads (H)."""
    num_kv_heads: int | None = None
    """Key/value heads (Hkv); none means as many as query heads."""
    head_dim: int | None = None
    """Key head dimension (Dk); none means width / num_heads."""
    value_head_dim: int | None = None
    """Value head dimension (Dv); none means head_dim."""
    mlp: Literal["gated", "plain"] = "gated"
    """Gated (SwiGLU-like) or plain two-matrix MLP."""
    mlp_width: int = 352
    """Hidden width of the MLP (F)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Activation of the MLP."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm, before attention, before the MLP and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    position: Literal["rotary", "learned", "none"] = "rotary"
    """How positions are told."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    max_length: int = 1024
    """Longest sequence; the size of the table where positions are learned."""
    tie_embeddings: bool = True
    """The head is the transposed embedding."""
    embedding_scale: float = 1.0
    """Factor on embeddings as they enter the first layer (Gemma's is the root of the width)."""
    attention_bias: bool = False
    """Biases on the query, key, value and output projections."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    attention: Literal["full", "sliding", "nsa"] = "full"
    """Kind of attention, the same in every layer."""
    window: int = 512
    """Tokens that sliding attention sees, the query's own included."""
    nsa: NSAConfig = NSAConfig()
    """Used where attention is nsa."""
    vision: VisionConfig = VisionConfig()
    """Used where vision.num_layers > 0."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations and matmul operands; parameters keep their own dtype."""
    attention_implementation: Literal["xla", "cudnn"] = "xla"
    """Who computes full and sliding attention: XLA anywhere, cuDNN on NVIDIA GPUs in bf16 with Dk = Dv."""
    remat: Literal["none", "layer"] = "none"
    """Recompute each layer in the backward pass instead of keeping its activations."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2 L) more."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "mlp_width", "max_length", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.embedding_scale <= 0:
            raise ConfigError(f"must be positive, is {self.embedding_scale}", key="embedding_scale")
        for name in ("num_kv_heads", "head_dim", "value_head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be positive and finite, is {getattr(self, name)}", key=name)
        if not 0 <= self.initializer_range < float("inf"):
            raise ConfigError(
                f"must be finite and not negative, is {self.initializer_range}", key="initializer_range"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot be split over {self.kv_heads} key/value heads; "
                "num_heads must be a multiple of num_kv_heads",
                key="num_kv_heads",
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise ConfigError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}; give head_dim",
                key="num_heads",
            )
        if self.position == "rotary" and self.key_dim % 2:
            raise ConfigError(f"rotary positions need an even head_dim, not {self.key_dim}", key="head_dim")
        if self.attention_implementation == "cudnn":
            if self.compute_dtype != "bfloat16":
                raise ConfigError(
                    "cudnn attention needs compute_dtype bfloat16", key="attention_implementation"
                )
            if self.key_dim != self.value_dim:
                raise ConfigError(
                    "cudnn attention needs value_head_dim = head_dim", key="attention_implementation"
                )
        if self.has_vision and not 0 <= self.vision.image_token < self.vocab_size:
            raise ConfigError(
                f"image_token {self.vision.image_token} is outside the vocabulary of {self.vocab_size}",
                key="vision.image_token",
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_dim(self) -> int:
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.key_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def has_vision(self) -> bool:
        return self.vision.num_layers > 0

    @property
    def language(self) -> "ModelConfig":
        """The same decoder without vision."""
        return dataclasses.replace(self, vision=VisionConfig())

    @property
    def tower(self) -> "ModelConfig":
        """The vision transformer in the decoder's terms: a pre-norm ViT with LayerNorm, GELU and biases."""
        v = self.vision
        return ModelConfig(
            vocab_size=1, width=v.width, num_layers=v.num_layers, num_heads=v.num_heads, mlp="plain",
            mlp_width=v.mlp_width, activation="gelu", norm="layer", norm_eps=1e-6, position="none",
            max_length=v.num_patches, attention_bias=True, mlp_bias=True, compute_dtype=self.compute_dtype,
            remat=self.remat, initializer_range=self.initializer_range,
        )  # fmt: skip
