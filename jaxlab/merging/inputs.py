"""The models of a merge, loaded and compared."""

import dataclasses
from typing import NamedTuple

from tokenizers import Tokenizer

from jaxlab.checkpoints import OpenModel, common_prefix, language_differences
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


def load_trio(vlm: OpenModel, expert: OpenModel, base: OpenModel) -> Trio:
    """Reads the three. Raises UserError where one is damaged or their language models differ in kind."""
    for other in (expert, base):
        same_architecture(str(vlm.path), vlm.config, str(other.path), other.config)
    return Trio(
        config=vlm.config,
        tokenizer=vlm.tokenizer,
        vlm=vlm.read(),
        expert=expert.read(),
        base=base.read(),
        common_rows=common_prefix([vlm.tokenizer, expert.tokenizer, base.tokenizer]),
        expert_config=expert.config,
        base_config=base.config,
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
