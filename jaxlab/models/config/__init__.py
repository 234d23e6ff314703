"""What a model is: groups that are unions by `kind`, each valid by itself, and ModelConfig over them."""

from jaxlab.models.config.attention import (
    BRANCHES,
    AttentionConfig,
    Branch,
    FullAttentionConfig,
    LatentConfig,
    LayerKind,
    NSAConfig,
    SlidingAttentionConfig,
)
from jaxlab.models.config.model import ModelConfig
from jaxlab.models.config.moe import MoEConfig
from jaxlab.models.config.position import LearnedPositions, NoPositions, PositionConfig, RopeConfig
from jaxlab.models.config.sparsity import (
    H2O,
    BlockSparsity,
    ExactBlocks,
    ExactTokens,
    InfLLM,
    Quest,
    SparsityConfig,
)
from jaxlab.models.config.vision import (
    MllamaVisionConfig,
    PlainVisionConfig,
    QwenVisionConfig,
    ResamplerConfig,
    VisionConfig,
    ViTConfig,
)

__all__ = [
    "BRANCHES",
    "H2O",
    "AttentionConfig",
    "BlockSparsity",
    "Branch",
    "ExactBlocks",
    "ExactTokens",
    "FullAttentionConfig",
    "InfLLM",
    "LatentConfig",
    "LayerKind",
    "LearnedPositions",
    "MllamaVisionConfig",
    "MoEConfig",
    "ModelConfig",
    "NSAConfig",
    "NoPositions",
    "PlainVisionConfig",
    "PositionConfig",
    "Quest",
    "QwenVisionConfig",
    "ResamplerConfig",
    "RopeConfig",
    "SlidingAttentionConfig",
    "SparsityConfig",
    "ViTConfig",
    "VisionConfig",
]
