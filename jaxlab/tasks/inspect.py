"""Task `inspect`: what models are, and what can be merged, from configs and headers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from jaxlab.app import model_folder
from jaxlab.checkpoints import ModelReport, OpenModel, compare_for_merging, inspect_model, open_model
from jaxlab.config import POSITIONAL
from jaxlab.errors import ConfigError, UserError


@dataclass(frozen=True)
class Arguments:
    """Tell what models are, and which can be merged."""

    models: Annotated[tuple[str, ...], POSITIONAL]
    """Folders of Hugging Face or of ours, hub ids, run folders, .gguf files, .bin files of llama2.c."""
    allow_pickle: bool = False
    """Look into PyTorch's .bin files where there are no safetensors."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of config.json that no family knows, to leave out."""
    ignore_tensors: tuple[str, ...] = ()
    """Tensors to leave out: names, with * and ? for what varies."""
    scan: bool = False
    """Read all tensors, and tell which hold NaN or infinities."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("which models? name at least one", key="models")


def run(arguments: Arguments) -> None:
    models = [inspect_model(_open(name, arguments), name, scan=arguments.scan) for name in arguments.models]
    for model in models:
        print(model.name)
        for key, value in model.lines:
            print(f"  {key:<16}{value}")
    for first, other in _pairs(models):
        print(f"{first.name} + {other.name}")
        for line in compare_for_merging(first, other):
            print(f"  {line}")
    for model in models:
        if model.problems:
            raise UserError(f"{model.name}: not the family {model.config.family}: {model.problems}")


def _open(name: str, arguments: Arguments) -> OpenModel:
    return open_model(
        model_folder(name),
        allow_pickle=arguments.allow_pickle,
        ignore_keys=arguments.ignore_keys,
        ignore_tensors=arguments.ignore_tensors,
    )


def _pairs(models: Sequence[ModelReport]) -> list[tuple[ModelReport, ModelReport]]:
    """The first model with vision, else the first, beside each of the others."""
    first = next((m for m in models if m.config.has_vision), models[0])
    return [(first, model) for model in models if model is not first]
