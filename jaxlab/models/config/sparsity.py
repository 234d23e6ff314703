"""Full attention that reads a part of the text only, on a model that was trained with all of it."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError


@dataclass(frozen=True)
class _Budget:
    block_size: int = 64
    """Tokens in a block."""
    num_blocks: int = 16
    """Blocks that a query reads, the forced ones included; where tokens are chosen, as many as these hold."""

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)

    @property
    def budget(self) -> int:
        """Tokens that a query reads at most."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True)
class _Blocks(_Budget):
    num_init: int = 1
    """Blocks at the start of the text that are always read."""
    num_local: int = 2
    """Blocks ending at the query's own that are always read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_local < 1:
            raise ConfigError(f"must be at least 1, is {self.num_local}", key="num_local")
        if self.num_init < 0:
            raise ConfigError(f"must not be negative, is {self.num_init}", key="num_init")
        if self.num_init + self.num_local > self.num_blocks:
            raise ConfigError(
                f"{self.num_blocks} blocks cannot hold the forced {self.num_init} first "
                f"and {self.num_local} local ones; raise num_blocks",
                key="num_blocks",
            )


@dataclass(frozen=True)
class ExactTokens(_Budget):
    """The tokens with the largest scores: what all the others stand for."""

    kind: Literal["exact_tokens"] = "exact_tokens"


@dataclass(frozen=True)
class ExactBlocks(_Blocks):
    """The blocks to which full attention gives most."""

    kind: Literal["exact_blocks"] = "exact_blocks"


@dataclass(frozen=True)
class Quest(_Blocks):
    """Blocks by the bound of their scores (Quest, arXiv 2406.10774)."""

    kind: Literal["quest"] = "quest"


@dataclass(frozen=True)
class InfLLM(_Blocks):
    """Blocks by the keys of a few tokens that stand for them (InfLLM, arXiv 2402.04617)."""

    kind: Literal["infllm"] = "infllm"
    representatives: int = 4
    """Tokens that stand for a block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.representatives < 1:
            raise ConfigError(f"must be at least 1, is {self.representatives}", key="representatives")
        if self.num_local < 2:
            raise ConfigError("infllm rates tokens by the block after theirs; raise it to 2", key="num_local")


@dataclass(frozen=True)
class H2O(_Budget):
    """Tokens that had most attention so far, and the newest ones (H2O, arXiv 2306.14048)."""

    kind: Literal["h2o"] = "h2o"
    num_local: int = 2
    """So many blocks of the newest tokens stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_local <= self.num_blocks:
            raise ConfigError(
                f"must be from 1 to num_blocks {self.num_blocks}, is {self.num_local}", key="num_local"
            )


BlockSparsity = ExactBlocks | Quest | InfLLM
SparsityConfig = ExactTokens | BlockSparsity | H2O
"""How a query chooses what it reads (jaxlab/models/sparse_inference.py)."""
