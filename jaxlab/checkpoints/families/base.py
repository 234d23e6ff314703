"""What a family of checkpoints is: the names of its tensors, and how its config.json describes a model."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxlab.checkpoints.tensor_table import Row, Rows
from jaxlab.models import ModelConfig

if TYPE_CHECKING:  # `inspect` needs no images
    from jaxlab.processing import ProcessorKind

Json = dict[str, Any]
Renames = tuple[tuple[str, str], ...]
"""(pattern of a regular expression, replacement), applied in order to names or to patterns of names."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Language models, or vision-language models around a language model of another family."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` of its config.json."""
    rows: Rows
    """Of a vision-language model: tower and projector, and the language model where it is its own."""
    read_config: Callable[[Json], ModelConfig]
    """Raises UserError for what the model code does not know."""
    write_config: Callable[[ModelConfig], Json]
    """The keys of config.json that describe `config`; raises UserError for what the family cannot say."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of whole names that are no parameters (masks, tables that the config implies)."""
    text_renames: Renames = ()
    """From the names of the language model's own family to those inside this one."""
    variants: Mapping[str, Renames] = dataclasses.field(default_factory=dict)
    """Other names in the wild, by a word for each: from this family's names to those."""
    layouts: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    """Variants whose tensors lie otherwise, by a word for each: rows in place of the family's."""
    processor: "Callable[[], ProcessorKind] | None" = None
    """How images and text become a batch, of a vision-language model; a function, since it needs Pillow."""
    image_word: str | None = None
    """What stands for a patch in the tokenizer, of a family whose config.json does not tell its id
    (`image_token_id`)."""


def renamed(rows: Rows, renames: Renames) -> Rows:
    """Rows with other names."""

    def rename(name: str) -> str:
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        return name

    return tuple(dataclasses.replace(row, name=rename(row.name)) for row in rows)


def interleaved(rows: Rows, numbers: tuple[int, ...]) -> Rows:
    """Rows of a model some of whose layers, of the given numbers on disk, read the images (Mllama)."""

    def counted(row: Row) -> Row:
        if row.paths[0].startswith("projector.cross_layers."):
            return dataclasses.replace(row, numbers=numbers)
        return dataclasses.replace(row, skips=numbers) if row.paths[0].startswith("layers.") else row

    return tuple(counted(row) for row in rows)
