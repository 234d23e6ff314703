"""What a model is: one frozen description for language models and vision-language models."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxlab.errors import ConfigError
from jaxlab.models.config.attention import (
    AttentionConfig,
    FullAttentionConfig,
    LatentConfig,
    NSAConfig,
    SlidingAttentionConfig,
)
from jaxlab.models.config.moe import MoEConfig
from jaxlab.models.config.position import PositionConfig, RopeConfig
from jaxlab.models.config.sparsity import SparsityConfig
from jaxlab.models.config.vision import QwenVisionConfig, VisionConfig, ViTConfig

_INT32 = (1 << 31) - 1
_MOST = {"num_layers": 1 << 16, "max_length": 1 << 62}
"""Of sizes that are not bound by int32; what is known of each layer is a list."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, with or without vision."""

    MOVED: ClassVar[dict[str, str]] = {
        "nsa": "attention: {kind: nsa, ...}",
        "window": "attention: {kind: sliding, window: ...}",
        "pattern": "attention: {kind: sliding, pattern: ...}",
        "local_rope_theta": "attention: {kind: sliding, rope_theta: ...}",
        "attention_implementation": "attention: {kind: full, implementation: ...}",
        "rope": "position: {kind: rotary, ...}",
    }
    """Keys that files had before, for the message that refuses them."""

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
    norm_bias: bool = True
    """LayerNorm adds a parameter; RMSNorm never does. (Cohere's scales only.)"""
    norm_offset: float = 0.0
    """Norms scale by this plus their parameter (Gemma's is 1)."""
    pre_norms: bool = True
    """A norm before attention and before the MLP; false: they read the stream as it is (OLMo 2)."""
    post_norms: bool = False
    """A norm also after attention and after the MLP, before the residual sum (Gemma 2 and 3)."""
    parallel: bool = False
    """Attention and MLP read the same norm and are added together (GPT-J)."""
    parallel_norms: bool = False
    """Where they are parallel, each reads the stream by a norm of its own (GPT-NeoX)."""
    position: PositionConfig = RopeConfig()
    """How the model knows positions."""
    max_length: int = 1024
    """Longest sequence; the size of the table where positions are learned."""
    tie_embeddings: bool = True
    """The head is the transposed embedding."""
    head_bias: bool = False
    """A bias on the logits."""
    embedding_scale: float = 1.0
    """Factor on embeddings as they enter the first layer (Gemma's is the root of the width)."""
    residual_scale: float = 1.0
    """Factor on what attention and the MLP add to the residual stream (Granite)."""
    logit_scale: float = 1.0
    """Factor on logits, before any softcap (Granite, Cohere)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool | None = None
    """A bias on the output projection of attention; none means as attention_bias."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: Literal["none", "head", "each_head", "width"] = "none"
    """Norms on queries and keys before positions: over each head, all with one scale, or each with its own
    and no bias (StableLM 2); or over all heads together."""
    attention_scale: float | None = None
    """Factor on scores; none means head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores are cap * tanh(score / cap) (Gemma 2)."""
    attention_sinks: bool = False
    """A logit for each head that takes part in the softmax of every query and has no value (gpt-oss)."""
    logit_softcap: float | None = None
    """Logits are cap * tanh(logit / cap) (Gemma 2)."""
    attention: AttentionConfig = FullAttentionConfig()
    """The attention of every layer."""
    latent: LatentConfig | None = None
    """Queries, keys and values come from narrow latents (DeepSeek); none: from the stream."""
    sparsity: SparsityConfig | None = None
    """Sparsity at inference of a model trained with full attention; none reads everything."""
    moe: MoEConfig | None = None
    """A mixture of experts in place of the MLP; none: an MLP in every layer."""
    vision: VisionConfig | None = None
    """The vision tower; none: a language model."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations and matmul operands; parameters keep their own dtype."""
    remat: Literal["none", "layer", "all_but_attention", "elementwise"] = "none"
    """What the backward pass recomputes instead of keeping it: nothing, each layer whole, each layer without
    the attention itself (NSA's three outputs, log-sum-exps and chosen blocks are kept), or what lies between
    its matrix products (norms, activations, rotary positions), which costs little."""
    extra_embeddings: int = 0
    """Rows of the embedding table beyond vocab_size, of tokens that are read but never made (Mllama)."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2 L) more."""
    family: str = "jaxlab"
    """Whose names and shapes the parameters have in a Hugging Face folder (jaxlab/checkpoints/families)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "mlp_width", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
            if getattr(self, name) > _MOST.get(name, _INT32):
                most = _MOST.get(name, _INT32)
                raise ConfigError(f"must be at most {most}, is {getattr(self, name)}", key=name)
        if self.extra_embeddings < 0 or (self.extra_embeddings and self.tie_embeddings):
            raise ConfigError("must not be negative, and 0 where the head is tied", key="extra_embeddings")
        if self.embedding_scale <= 0:
            raise ConfigError(f"must be positive, is {self.embedding_scale}", key="embedding_scale")
        for name in ("num_kv_heads", "head_dim", "value_head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in (
            "norm_eps",
            "residual_scale",
            "logit_scale",
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
        if not self.pre_norms and not self.post_norms:
            raise ConfigError(
                "a layer without norms before needs those after: set post_norms", key="pre_norms"
            )
        if self.parallel_norms and not (self.parallel and self.pre_norms):
            raise ConfigError("is for norms before parallel attention and MLP", key="parallel_norms")
        if self.head_bias and self.tie_embeddings:
            raise ConfigError("a tied head has no bias; set tie_embeddings: false", key="head_bias")
        self._check_position()
        self._check_attention()
        self._check_experts_and_vision()

    def _check_position(self) -> None:
        rope = self.position
        if not isinstance(rope, RopeConfig):
            return
        if self.key_dim % 2:
            raise ConfigError(f"rotary positions need an even head_dim, not {self.key_dim}", key="head_dim")
        if self.rotary_dim > self.key_dim:
            raise ConfigError(f"{self.rotary_dim} exceeds head_dim {self.key_dim}", key="position.dim")
        factors = {len(rope.short_factors), len(rope.long_factors)}
        if rope.scaling == "longrope" and factors != {self.rotary_dim // 2}:
            raise ConfigError(
                f"there must be one for each of {self.rotary_dim // 2} pairs", key="position.short_factors"
            )
        if len(rope.layers) > self.num_layers:
            raise ConfigError(
                f"names {len(rope.layers)} layers, the model has {self.num_layers}", key="position.layers"
            )
        if rope.sections and sum(rope.sections) != self.rotary_dim // 2:
            raise ConfigError(
                f"{list(rope.sections)} must sum to the {self.rotary_dim // 2} pairs of a head",
                key="position.sections",
            )

    def _check_attention(self) -> None:
        attention, softcap = self.attention, self.attention_softcap is not None
        self._check_latent()
        if self.attention_sinks and (
            self.sparsity is not None
            or isinstance(attention, NSAConfig)
            or attention.implementation not in ("auto", "xla")
        ):
            raise ConfigError(
                "are known to full and sliding attention by xla, without sparsity", key="attention_sinks"
            )
        if self.sparsity is not None:
            if attention.kind != "full" or softcap:
                raise ConfigError(
                    f"{self.sparsity.kind} is for models whose layers all have full attention, no softcap",
                    key="sparsity",
                )
            if self.has_vision:
                raise ConfigError("is for models without vision", key="sparsity")
        if isinstance(attention, NSAConfig):
            if softcap:
                raise ConfigError("NSA's branches have no softcap", key="attention_softcap")
            least = 2 * max(self.key_dim, self.value_dim)
            by_mlp = attention.compress_kind == "mlp"
            if by_mlp and attention.compress_init == "mean" and attention.compress_width < least:
                raise ConfigError(
                    "mean takes 2 hidden units for each dimension of a head; "
                    f"set attention.compress_width to {least}",
                    key="attention.compress_init",
                )
            return
        if isinstance(attention, SlidingAttentionConfig) and len(attention.pattern) > self.num_layers:
            raise ConfigError(
                f"names {len(attention.pattern)} layers, the model has {self.num_layers}",
                key="attention.pattern",
            )
        refused = {
            f"{attention.implementation} attention has no softcap": softcap,
            "cudnn attention needs compute_dtype bfloat16": self.compute_dtype != "bfloat16",
            "cudnn attention needs value_head_dim = head_dim": self.key_dim != self.value_dim,
        }
        for why, holds in refused.items():
            if (
                holds
                and why.startswith(attention.implementation)
                and attention.implementation not in ("auto", "xla")
            ):
                raise ConfigError(why, key="attention.implementation")

    def _check_latent(self) -> None:
        if self.latent is None:
            return
        turns = isinstance(self.position, RopeConfig) and self.rotary_dim < self.key_dim
        needs = {
            "full attention in all layers, without sparsity": (
                self.attention.kind == "full" and self.sparsity is None
            ),
            "attention_bias false": not self.attention_bias,
            "qk_norm none: its norms are on latents": self.qk_norm == "none",
            "as many key/value heads as query heads": self.kv_heads == self.num_heads,
            f"a position.dim below the {self.key_dim} dimensions of a head": turns,
        }
        lacking = next((what for what, there in needs.items() if not there), None)
        if lacking is not None:
            raise ConfigError(f"needs {lacking}", key="latent")

    def _check_experts_and_vision(self) -> None:
        if self.moe is not None:
            if self.moe.first_dense >= self.num_layers:
                raise ConfigError(f"leaves no layer of {self.num_layers} with experts", key="moe.first_dense")
            if self.mlp != "gated" or self.mlp_bias:
                raise ConfigError("experts are gated MLPs without biases; set mlp gated", key="moe")
        if self.vision is None:
            return
        if not 0 <= self.vision.image_token < self.embedding_rows:
            raise ConfigError(
                f"image_token {self.vision.image_token} is outside the vocabulary of {self.embedding_rows}",
                key="vision.image_token",
            )
        if isinstance(self.vision, QwenVisionConfig) and len(self.vision.deep_layers) > self.num_layers:
            raise ConfigError(
                f"are added to {len(self.vision.deep_layers)} layers, there are {self.num_layers}",
                key="vision.deep_layers",
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
        pattern: tuple[str, ...] = (self.attention.kind,)
        if isinstance(self.attention, SlidingAttentionConfig) and self.attention.pattern:
            pattern = self.attention.pattern
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def rotary_layers(self) -> tuple[bool, ...]:
        """Whether each layer has rotary positions."""
        if not isinstance(self.position, RopeConfig):
            return (False,) * self.num_layers
        pattern = self.position.layers or (True,)
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def has_mlp_norm(self) -> bool:
        """Whether the MLP reads the stream by a norm of its own."""
        return self.pre_norms and (self.parallel_norms or not self.parallel)

    @property
    def dense_layers(self) -> int:
        """First layers that have an MLP although later ones have experts."""
        return 0 if self.moe is None else self.moe.first_dense

    @property
    def has_output_bias(self) -> bool:
        return self.attention_bias if self.output_bias is None else self.output_bias

    @property
    def has_vision(self) -> bool:
        return self.vision is not None

    @property
    def has_prefix(self) -> bool:
        """Whether tokens of a prompt with images see each other whatever their order (PaliGemma)."""
        return isinstance(self.vision, ViTConfig) and self.vision.together == "prefix"

    @property
    def language(self) -> "ModelConfig":
        """The same decoder without vision."""
        return dataclasses.replace(self, vision=None)

    @property
    def nsa(self) -> NSAConfig:
        """The attention of a model with NSA; for others, as below, a ConfigError."""
        return _of_kind(self.attention, NSAConfig)

    @property
    def sliding(self) -> SlidingAttentionConfig:
        """The attention of a model with sliding layers."""
        return _of_kind(self.attention, SlidingAttentionConfig)

    @property
    def rope(self) -> RopeConfig:
        """Rotary positions."""
        return _of_kind(self.position, RopeConfig)

    def vision_as[Vision](self, cls: type[Vision]) -> Vision:
        """The vision tower of a model that has one of this class."""
        return _of_kind(self.vision, cls)

    @property
    def image_token(self) -> int:
        """The token of an image in a model with vision."""
        if self.vision is None:
            raise ConfigError("the model has no vision", key="vision")
        return self.vision.image_token


def _of_kind[Group](group: Any, cls: type[Group]) -> Group:
    if not isinstance(group, cls):
        found = "none" if group is None else repr(group.kind)
        raise ConfigError(f"this takes a {cls.__name__}, the model has {found}")
    return group
