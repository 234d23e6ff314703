"""The kinds of attention that a decoder is trained with."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError

LayerKind = Literal["full", "sliding"]
DenseImplementation = Literal["auto", "xla", "chunked", "cudnn"]
FASTEST: tuple[tuple[str, str, int, Literal["xla", "chunked", "cudnn"]], ...] = (
    ("cpu", "float32", 512, "chunked"),
)
"""What auto takes for causal texts: by platform and dtype, from so many tokens on; xla for the rest. Measured
on two cores, gradients too, chunked over xla in processor seconds: 256 tokens 1.0, 512 .66, 1024 .48,
2048 .42."""


@dataclass(frozen=True)
class FullAttentionConfig:
    """Every layer reads the whole text."""

    kind: Literal["full"] = "full"
    implementation: DenseImplementation = "auto"
    """auto: what was measured to be the fastest for device, dtype and length; xla: anywhere, all scores at
    once; chunked: anywhere, in memory linear in the length (with a cache as xla); cudnn: on NVIDIA GPUs in
    bf16 with Dk = Dv."""


@dataclass(frozen=True)
class SlidingAttentionConfig:
    """Layers read a window of the text; with a pattern some of them all of it."""

    kind: Literal["sliding"] = "sliding"
    window: int = 512
    """Tokens that a sliding layer sees, the query's own included."""
    pattern: tuple[LayerKind, ...] = ()
    """Kinds of the first layers, repeated over the others; empty: all layers slide."""
    rope_theta: float | None = None
    """Sliding layers turn by plain rotary positions of this base instead (Gemma 3)."""
    implementation: DenseImplementation = "auto"
    """As of full attention."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"must be at least 1, is {self.window}", key="window")
        if self.pattern and "sliding" not in self.pattern:
            raise ConfigError("names no sliding layer; set kind full", key="pattern")
        if self.rope_theta is not None and not 0 < self.rope_theta < float("inf"):
            raise ConfigError(f"must be positive and finite, is {self.rope_theta}", key="rope_theta")


Branch = Literal["compression", "selection", "window"]
BRANCHES: tuple[Branch, ...] = ("compression", "selection", "window")
"""NSA's branches in the order in which parameters and gates have them."""


@dataclass(frozen=True)
class NSAConfig:
    """Native Sparse Attention (ACL 2025, sec. 3); the defaults are the paper's."""

    kind: Literal["nsa"] = "nsa"
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
    compress_kind: Literal["mlp", "linear", "mean"] = "mlp"
    """What makes a key of a block's keys, and another one a value of its values. mlp: the paper's; linear:
    one matrix for each token of the block; mean: no parameters (in published ablations as good for keys)."""
    compress_width: int = 256
    """Hidden width of the MLP."""
    compress_init: Literal["random", "mean"] = "random"
    """How MLPs and matrices start. mean: as the exact mean of the block, so that the choice of blocks means
    something from the first step; takes an MLP 2 hidden units for each dimension of a head, others start
    silent."""
    gate_width: int = 0
    """Hidden width of the gate MLP; 0 makes it one linear layer."""
    selector: Literal["compressed", "min_max", "auxiliary", "indexer"] = "compressed"
    """What rates selection blocks. compressed: attention to compressed keys (eq. 9). The paper rejects two
    (sec. 6.1). min_max: without parameters, the bound of a score by the least and the greatest of each
    channel of a block's keys, after Quest. auxiliary: a scorer trained beside, by the attention that blocks
    get. indexer: heads of its own rate tokens, a block by its best one; trained beside, by the attention
    that tokens get (arXiv 2606.13392)."""
    selector_dim: int = 16
    """auxiliary, indexer: dimension of their queries and keys."""
    selector_heads: int = 4
    """indexer: query heads for each key/value head of the attention; one key serves all of them."""
    selector_score: Literal["relu", "dot"] = "relu"
    """indexer: what a token scores. relu: the sum over heads of relu(q . k), each weighted by the query
    (DeepSeek-V3.2); dot: q . k of one head (MiniMax)."""
    selector_stage: Literal["sparse", "warm_up"] = "sparse"
    """indexer: warm_up reads all blocks, so that it learns from attention to everything; for the first part
    of a training, whose run the second, sparse, takes in init_from."""
    branches: tuple[Branch, ...] = BRANCHES
    """Branches that are there (an ablation); the gates of the others are 0, their parameters stay unused."""
    shared_kv: bool = False
    """One key and one value projection for all branches (an ablation)."""
    gated: bool = True
    """false: the branches that are there are added as they are, without gates."""
    implementation: Literal["auto", "xla", "mosaic_gpu"] = "auto"
    """auto: the best that takes the case; mosaic_gpu: the kernels for Hopper, which take a compute_dtype of
    16 bits, for decoding too."""

    def __post_init__(self) -> None:
        for name in (
            "block_len",
            "stride",
            "block_size",
            "num_blocks",
            "window",
            "compress_width",
            "selector_dim",
            "selector_heads",
        ):
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
        if not self.branches or len({*self.branches}) < len(self.branches):
            raise ConfigError(
                f"name each at most once and at least one: {list(self.branches)}", key="branches"
            )
        if self.selector in ("min_max", "auxiliary") and not (self.num_init and self.num_local):
            raise ConfigError(
                f"{self.selector} rates whole blocks of the past; keep num_init and num_local at 1 or more",
                key="selector",
            )
        self._check_indexer()
        chooses_by = "compression" if self.selector == "compressed" else "selection"
        if "selection" in self.branches and chooses_by not in self.branches:
            raise ConfigError(
                "compressed keys learn to choose through their branch only; add compression or set "
                "another selector",
                key="branches",
            )
        if self.stride > self.block_len:
            raise ConfigError(
                f"stride {self.stride} exceeds block_len {self.block_len}: tokens would be lost", key="stride"
            )

    def _check_indexer(self) -> None:
        if self.selector != "indexer":
            if self.selector_stage != "sparse":
                raise ConfigError(
                    f"{self.selector} has no warm-up; set selector: indexer", key="selector_stage"
                )
            return
        if "selection" not in self.branches:
            raise ConfigError("an indexer learns from the selection branch; add it", key="branches")
        if not self.num_local:
            raise ConfigError("the query's own block is always read; set at least 1", key="num_local")
        if self.selector_score == "dot" and self.selector_heads > 1:
            raise ConfigError(
                "products of several heads add up to one of one head; set 1", key="selector_heads"
            )


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, sec. 2.1): keys and values are projected
    from one narrow latent, and queries may be. The last `position.dim` dimensions of each head turn; in keys
    they are one projection that all heads share."""

    kv_rank: int = 512
    """Width of the latent of keys and values."""
    query_rank: int | None = None
    """Width of the latent of queries; none: they are projected from the stream."""

    def __post_init__(self) -> None:
        for name in ("kv_rank", "query_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)


AttentionConfig = FullAttentionConfig | SlidingAttentionConfig | NSAConfig
