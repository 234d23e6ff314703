"""The models of a merge, loaded and compared."""

from typing import NamedTuple

from tokenizers import Tokenizer

from jaxlab.checkpoints.comparing import differences
from jaxlab.checkpoints.loading import load_model
from jaxlab.checkpoints.reference import model_folder
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params

# What shows in the shapes of parameters and has a policy.
FREE = ("vocab_size", "vision", "tie_embeddings", "extra_embeddings")


class Trio(NamedTuple):
    """A VLM, an expert and their base."""

    config: ModelConfig
    """The VLM's."""
    tokenizer: Tokenizer | None
    """The VLM's."""
    vlm: Params
    expert: Params
    base: Params
    common_rows: int | None
    """How many ids, from 0 on, mean the same token to all three; None: all, since they read bytes."""
    expert_config: ModelConfig
    base_config: ModelConfig


def load_trio(vlm: str, expert: str, base: str) -> Trio:
    """Loads the three. Raises UserError where one is missing or their language models differ in kind."""
    vlm_config, vlm_params, tokenizer = load_model(model_folder(vlm))
    expert_config, expert_params, expert_tokenizer = load_model(model_folder(expert))
    base_config, base_params, base_tokenizer = load_model(model_folder(base))
    same_architecture(vlm, vlm_config, expert, expert_config)
    same_architecture(vlm, vlm_config, base, base_config)
    return Trio(
        config=vlm_config, tokenizer=tokenizer, vlm=vlm_params, expert=expert_params, base=base_params,
        common_rows=common_prefix([tokenizer, expert_tokenizer, base_tokenizer]),
        expert_config=expert_config, base_config=base_config,
    )  # fmt: skip


def same_architecture(name: str, config: ModelConfig, other_name: str, other: ModelConfig) -> None:
    """Raises UserError if parameters of the two language models mean different functions."""
    free = FREE if config.position == "learned" else (*FREE, "max_length")
    for field in differences(config, other, free):
        raise UserError(
            f"{name} and {other_name} cannot be merged: "
            f"{field} is {getattr(config, field)} in one, {getattr(other, field)} in the other"
        )


def common_prefix(tokenizers: list[Tokenizer | None]) -> int | None:
    """How many token ids, from 0 on, stand for the same token in all; None if all read bytes."""
    if all(tokenizer is None for tokenizer in tokenizers):
        return None
    if any(tokenizer is None for tokenizer in tokenizers):
        return 0
    tables = [
        tokenizer.get_vocab(with_added_tokens=True) for tokenizer in tokenizers if tokenizer is not None
    ]
    names = [{index: token for token, index in table.items()} for table in tables]
    rows = 0
    while rows in names[0] and all(other.get(rows) == names[0][rows] for other in names[1:]):
        rows += 1
    return rows
