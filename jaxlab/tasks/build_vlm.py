"""Task `build-vlm`: a vision-language model to train, from a language model and a vision tower."""

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlab.app import model_folder
from jaxlab.checkpoints import TowerConfig, assemble, check_output, open_model, plan_vlm, save_model
from jaxlab.config import POSITIONAL
from jaxlab.errors import ConfigError
from jaxlab.models import abstract_params, count_params


@dataclass(frozen=True)
class Arguments:
    """Put a vision tower and a new projector before a language model."""

    language_model: Annotated[str, POSITIONAL]
    """The language model: a folder, a hub id, a run, a .gguf file."""
    out: Annotated[str, POSITIONAL]
    """The folder to write, of Hugging Face."""
    family: Literal["llava", "idefics3"] = "llava"
    """In whose form it is, with a new tower."""
    tower: TowerConfig = TowerConfig()
    """The new tower, whose parameters are random."""
    tower_from: str | None = None
    """A vision-language model whose tower and form are taken instead of a new one."""
    seed: int = 0
    """Of random parameters."""
    check: bool = False
    """Make all checks and say what the model will be; read no tensor and write nothing."""
    overwrite: bool = False
    """Replace OUT, if it was written here."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"must be from 0 to 2^32 - 1, is {self.seed}", key="seed")


def run(arguments: Arguments) -> None:
    language = open_model(model_folder(arguments.language_model))
    tower_of = None if arguments.tower_from is None else open_model(model_folder(arguments.tower_from))
    inputs = (*language.inputs, *(() if tower_of is None else tower_of.inputs))
    out = check_output(arguments.out, inputs, overwrite=arguments.overwrite)
    plan = plan_vlm(language, family=arguments.family, tower=arguments.tower, tower_of=tower_of)
    shapes = abstract_params(plan.config)
    sizes = {part: count_params(shapes[part]) for part in ("vision", "projector")}
    print(
        f"{plan.config.family}: {count_params(shapes):,} parameters, {sizes['vision']:,} of them in the "
        f"tower and {sizes['projector']:,} in the projector"
    )
    if plan.added:
        print(f"new tokens: {' '.join(plan.added)}; the vocabulary has {plan.config.vocab_size} rows")
    if arguments.check:
        return
    params = assemble(plan, language, tower_of, arguments.seed)
    save_model(
        out,
        plan.config,
        params,
        plan.tokenizer,
        form="huggingface",
        extra_files=plan.files,
        inputs=inputs,
        overwrite=arguments.overwrite,
    )
    print(f"written: {out}; train it with init_from: {out}")
