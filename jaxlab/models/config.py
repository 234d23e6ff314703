"""What a model is: one frozen description for language models and vision-language models."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError
from jaxlab.models.qwen_config import QwenVisionConfig
from jaxlab.models.sparse_config import NSAConfig, SparsityConfig
from jaxlab.models.vit_config import MllamaConfig, ViTConfig


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions, and how they are stretched to sequences longer than those of training."""

    theta: float = 10000.0
    """Base of the wavelengths."""
    dim: int | None = None
    """Dimensions of a head that turn, the first ones; none means all."""
    interleaved: bool = False
    """Pairs are neighbours (2i, 2i + 1), as in GPT-J, not halves (i, i + dim / 2), as in Llama."""
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    """linear: positions divided by factor. dynamic: theta grows with the sequence. yarn: arXiv 2309.00071.
    llama3: Llama 3.1's wavelength-dependent division."""
    factor: float = 1.0
    """How many times longer than original_length sequences may be."""
    original_length: int = 8192
    """Longest sequence before stretching (dynamic, yarn, llama3)."""
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
    """yarn: factor on cosines and sines; none means 0.1 ln(factor) + 1."""
    sections: tuple[int, ...] = ()
    """Pairs of a head that turn by the first, second, third coordinate of a position (M-RoPE of Qwen2-VL);
    empty: positions have one coordinate."""
    sections_interleaved: bool = False
    """Coordinates alternate over the pairs (Qwen3-VL) instead of taking one stretch each."""

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_frequency_factor", "high_frequency_factor", "beta_fast"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be positive and finite, is {getattr(self, name)}", key=name)
        if self.original_length < 1:
            raise ConfigError(f"must be at least 1, is {self.original_length}", key="original_length")
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ConfigError(f"must be even and positive, is {self.dim}", key="dim")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ConfigError(
                f"must be above low_frequency_factor {self.low_frequency_factor}, "
                f"is {self.high_frequency_factor}",
                key="high_frequency_factor",
            )


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the MLP: routed experts and, if any, shared ones."""

    num_experts: int = 0
    """Routed experts (E); 0 means a plain MLP in every layer."""
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
        for name in ("num_experts", "shared_width", "first_dense", "balance_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        for name in ("experts_per_token", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"{self.experts_per_token} of {self.num_experts} experts cannot be chosen",
                key="experts_per_token",
            )
        if self.shared_gate and not self.shared_width:
            raise ConfigError("needs shared experts; set shared_width", key="shared_gate")


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer over square patches, and a two-layer projector into the decoder."""

    num_layers: int = 0
    """Layers of the vision transformer; 0 means a language model without vision."""
    kind: Literal["plain", "vit", "qwen", "mllama"] = "plain"
    """plain: square patches of images of one size (jaxlab/models/vision). vit: CLIP,
    SigLIP and their kin. qwen: Qwen2-VL to 3. mllama: known by its parameters only."""
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
    vit: ViTConfig = ViTConfig()
    """Used where kind is vit."""
    qwen: QwenVisionConfig = QwenVisionConfig()
    """Used where kind is qwen."""
    mllama: MllamaConfig = MllamaConfig()
    """Used where kind is mllama."""

    def __post_init__(self) -> None:
        if self.num_layers < 0:
            raise ConfigError(f"must not be negative, is {self.num_layers}", key="num_layers")
        for name in ("image_size", "patch_size", "channels", "width", "num_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.num_layers == 0:
            return
        if self.kind == "vit":
            self.vit.check(self.image_size // self.patch_size, self.num_layers)
        if self.kind == "plain" and self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
                key="patch_size",
            )
        if self.width % self.num_heads:
            raise ConfigError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}", key="num_heads"
            )
        if self.kind == "qwen":
            self.qwen.check(self.patch_size, self.width // self.num_heads, self.num_layers)

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
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] = "silu"
    """Activation of the MLP."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm, before attention, before the MLP and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    norm_offset: float = 0.0
    """Norms scale by this plus their parameter (Gemma's is 1)."""
    post_norms: bool = False
    """A norm also after attention and after the MLP, before the residual sum (Gemma 2 and 3)."""
    parallel: bool = False
    """Attention and MLP read the same norm and are added together (GPT-J)."""
    position: Literal["rotary", "learned", "none"] = "rotary"
    """How the model knows positions."""
    rope: RopeConfig = RopeConfig()
    """Used where position is rotary."""
    local_rope_theta: float | None = None
    """Sliding layers turn by plain rotary positions of this base instead (Gemma 3)."""
    max_length: int = 1024
    """Longest sequence; the size of the table where positions are learned."""
    tie_embeddings: bool = True
    """The head is the transposed embedding."""
    head_bias: bool = False
    """A bias on the logits."""
    embedding_scale: float = 1.0
    """Factor on embeddings as they enter the first layer (Gemma's is the root of the width)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool | None = None
    """A bias on the output projection of attention; none means as attention_bias."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """Norms on queries and keys before positions: over each head, or over all heads together."""
    attention_scale: float | None = None
    """Factor on scores; none means head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores are cap * tanh(score / cap) (Gemma 2)."""
    logit_softcap: float | None = None
    """Logits are cap * tanh(logit / cap) (Gemma 2)."""
    attention: Literal["full", "sliding", "nsa"] = "full"
    """Kind of attention of every layer, unless pattern says otherwise."""
    pattern: tuple[Literal["full", "sliding"], ...] = ()
    """Kinds of the first layers, repeated over the others; empty: attention in all."""
    window: int = 512
    """Tokens that sliding attention sees, the query's own included."""
    nsa: NSAConfig = NSAConfig()
    """Used where attention is nsa."""
    sparsity: SparsityConfig = SparsityConfig()
    """Sparsity at inference of a model trained with full attention."""
    moe: MoEConfig = MoEConfig()
    """Used where moe.num_experts > 0."""
    vision: VisionConfig = VisionConfig()
    """Used where vision.num_layers > 0."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations and matmul operands; parameters keep their own dtype."""
    attention_implementation: Literal["xla", "chunked", "cudnn"] = "xla"
    """Who computes full and sliding attention: xla anywhere, all scores at once; chunked anywhere, in memory
    linear in the length, and twice as fast on a CPU (with a cache as xla); cudnn on NVIDIA GPUs in bf16 with
    Dk = Dv."""
    remat: Literal["none", "layer"] = "none"
    """Recompute each layer in the backward pass instead of keeping its activations."""
    extra_embeddings: int = 0
    """Rows of the embedding table beyond vocab_size, of tokens that are read but never made (Mllama)."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2 L) more."""
    family: str = "jaxlab"
    """Whose names and shapes the parameters have in a Hugging Face folder (jaxlab/checkpoints/families)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "mlp_width", "max_length", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.extra_embeddings < 0 or (self.extra_embeddings and self.tie_embeddings):
            raise ConfigError("must not be negative, and 0 where the head is tied", key="extra_embeddings")
        if self.embedding_scale <= 0:
            raise ConfigError(f"must be positive, is {self.embedding_scale}", key="embedding_scale")
        for name in ("num_kv_heads", "head_dim", "value_head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in (
            "norm_eps",
            "local_rope_theta",
            "attention_scale",
            "attention_softcap",
            "logit_softcap",
        ):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
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
        if self.position == "rotary" and self.rotary_dim > self.key_dim:
            raise ConfigError(f"{self.rotary_dim} exceeds head_dim {self.key_dim}", key="rope.dim")
        if self.rope.sections and sum(self.rope.sections) != self.rotary_dim // 2:
            raise ConfigError(
                f"{list(self.rope.sections)} must sum to the {self.rotary_dim // 2} pairs of a head",
                key="rope.sections",
            )
        if self.pattern and self.attention == "nsa":
            raise ConfigError("layers of NSA have no other kinds beside them; leave it empty", key="pattern")
        if self.head_bias and self.tie_embeddings:
            raise ConfigError("a tied head has no bias; set tie_embeddings: false", key="head_bias")
        if self.attention == "nsa" and self.attention_softcap is not None:
            raise ConfigError("NSA's branches have no softcap", key="attention_softcap")
        if self.sparsity.method != "none":
            if self.attention != "full" or self.pattern or self.attention_softcap is not None:
                raise ConfigError(
                    f"{self.sparsity.method} is for models whose layers all have full attention, no softcap",
                    key="sparsity.method",
                )
            if self.has_vision:
                raise ConfigError("is for models without vision", key="sparsity.method")
        if len(self.pattern) > self.num_layers:
            raise ConfigError(
                f"names {len(self.pattern)} layers, the model has {self.num_layers}", key="pattern"
            )
        if self.moe.num_experts and self.moe.first_dense >= self.num_layers:
            raise ConfigError(f"leaves no layer of {self.num_layers} with experts", key="moe.first_dense")
        if self.moe.num_experts and (self.mlp != "gated" or self.mlp_bias):
            raise ConfigError("experts are gated MLPs without biases; set mlp gated", key="moe.num_experts")
        if self.attention_implementation == "chunked" and self.attention_softcap is not None:
            raise ConfigError("chunked attention has no softcap", key="attention_implementation")
        if self.attention_implementation == "cudnn":
            if self.compute_dtype != "bfloat16":
                raise ConfigError(
                    "cudnn attention needs compute_dtype bfloat16", key="attention_implementation"
                )
            if self.key_dim != self.value_dim:
                raise ConfigError(
                    "cudnn attention needs value_head_dim = head_dim", key="attention_implementation"
                )
            if self.attention_softcap is not None:
                raise ConfigError("cudnn attention has no softcap", key="attention_implementation")
        least = 2 * max(self.key_dim, self.value_dim)
        if self.attention == "nsa" and self.nsa.compress_init == "mean" and self.nsa.compress_width < least:
            raise ConfigError(
                f"mean takes 2 hidden units for each dimension of a head; set nsa.compress_width to {least}",
                key="nsa.compress_init",
            )
        if self.has_vision and not 0 <= self.vision.image_token < self.embedding_rows:
            raise ConfigError(
                f"image_token {self.vision.image_token} is outside the vocabulary of {self.embedding_rows}",
                key="vision.image_token",
            )
        if self.has_vision and self.vision.kind == "qwen":
            deep = self.vision.qwen.deep_layers
            if len(deep) > self.num_layers:
                raise ConfigError(
                    f"are added to {len(deep)} layers, there are {self.num_layers}",
                    key="vision.qwen.deep_layers",
                )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def embedding_rows(self) -> int:
        return self.vocab_size + self.extra_embeddings

    @property
    def key_dim(self) -> int:
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.key_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def score_scale(self) -> float:
        """Factor on scores of queries and keys."""
        return self.key_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rotary_dim(self) -> int:
        return self.key_dim if self.rope.dim is None else self.rope.dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer."""
        pattern = self.pattern or (self.attention,)
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def dense_layers(self) -> int:
        """First layers that have an MLP although later ones have experts."""
        return self.moe.first_dense if self.moe.num_experts else 0

    @property
    def has_output_bias(self) -> bool:
        return self.attention_bias if self.output_bias is None else self.output_bias

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
            vocab_size=1,
            width=v.width,
            num_layers=v.num_layers,
            num_heads=v.num_heads,
            mlp="plain",
            mlp_width=v.mlp_width,
            activation="gelu",
            norm="layer",
            norm_eps=1e-6,
            position="none",
            max_length=v.num_patches,
            attention_bias=True,
            mlp_bias=True,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            initializer_range=self.initializer_range,
        )
