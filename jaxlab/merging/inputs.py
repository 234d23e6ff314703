"""The models of a merge, loaded and compared."""

import dataclasses
from typing import NamedTuple

from tokenizers import Tokenizer

from jaxlab.app import model_folder
from jaxlab.checkpoints.comparing import language_differences
from jaxlab.checkpoints.loading import load_model
from jaxlab.checkpoints.tokenizer_files import common_prefix
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params


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
        config=vlm_config,
        tokenizer=tokenizer,
        vlm=vlm_params,
        expert=expert_params,
        base=base_params,
        common_rows=common_prefix([tokenizer, expert_tokenizer, base_tokenizer]),
        expert_config=expert_config,
        base_config=base_config,
    )


def same_architecture(name: str, config: ModelConfig, other_name: str, other: ModelConfig) -> None:
    """Raises UserError if parameters of the two language models mean different functions."""
    for field in language_differences(config, other):
        values = getattr(config, field), getattr(other, field)
        if dataclasses.is_dataclass(values[0]):  # a group: the first of its fields that differs
            inner = [f.name for f in dataclasses.fields(values[0])]
            differs = next(f for f in inner if getattr(values[0], f) != getattr(values[1], f))
            field, values = f"{field}.{differs}", tuple(getattr(value, differs) for value in values)
        raise UserError(
            f"{name} and {other_name} cannot be merged: "
            f"{field} is {values[0]} in one, {values[1]} in the other"
        )
