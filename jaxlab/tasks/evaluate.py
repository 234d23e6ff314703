"""Task `evaluate`: loss by position, exact match and needles by depth, of a model on held-out data."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax

from jaxlab.app import Run, model_folder, open_reference
from jaxlab.checkpoints import OpenModel, check_same_tree
from jaxlab.costs import bytes_per_device, compiled_memory, generation_memory
from jaxlab.data import (
    DataConfig,
    Source,
    TextConfig,
    batch_shapes,
    check_all_tokens,
    check_fits,
    check_same_words,
    make_source,
)
from jaxlab.errors import ConfigError, UserError
from jaxlab.evaluation import QuestionsConfig, measure_batch, measure_held_out, prepare_questions
from jaxlab.models import (
    ModelConfig,
    SparsityConfig,
    SplitConfig,
    abstract_params,
    count_params,
    model_mesh,
    using,
)


@dataclass(frozen=True)
class Config:
    """Measure a model on held-out data."""

    HOW_IT_RUNS: ClassVar = ("mesh",)

    model: str = ""
    """A model folder, a run folder, or the config of a finished train run."""
    data: DataConfig | QuestionsConfig = TextConfig()
    """What it is measured on."""
    sparsity: SparsityConfig | None = None
    """Measure it as if it read a part of the text only; for models trained with full attention."""
    split: Literal["validation", "test"] = "test"
    """Which held-out split."""
    batch_size: int = 32
    """Sequences in a batch."""
    batches: int = 16
    """At most so many batches; of questions all."""
    position_buckets: int = 16
    """Into how many equal ranges of positions the loss is split."""
    examples: int = 8
    """Questions that are shown with their answers."""
    mesh: SplitConfig = SplitConfig()
    """Devices over which the model is split, if one of them does not hold it."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("which model? give a folder or the config of a train run", key="model")
        for name in ("batch_size", "batches", "position_buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.examples < 0:
            raise ConfigError(f"must not be negative, is {self.examples}", key="examples")
        if isinstance(self.data, QuestionsConfig) and self.sparsity is not None:
            raise ConfigError("questions are answered with the model's own attention", key="sparsity")


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    data = config.data
    return {
        "model": open_reference(config.model).identity,
        "data": data.identity
        if isinstance(data, QuestionsConfig)
        else make_source(data, model_folder).identity,
    }


def check(config: Config) -> dict[str, Any]:
    """What `--check` reports: whether model and data fit, and the memory of a batch; no parameter is read."""
    if isinstance(config.data, QuestionsConfig):
        return _check_questions(config, config.data)
    opened, model, _, batch = _prepare(config, for_shapes=True)
    mesh = model_mesh(config.mesh)
    params = opened.placed(mesh)
    check_same_tree(params, abstract_params(model), opened.path)
    with using(mesh):
        memory = compiled_memory(measure_batch, params, batch, model)
    return {
        "parameters": count_params(params),
        "bytes_per_device": {"parameters": bytes_per_device(params), **memory},
    }


def run(config: Config, run: Run) -> dict[str, Any]:
    if isinstance(config.data, QuestionsConfig):
        return _run_questions(config, config.data)
    opened, model, source, _ = _prepare(config)
    mesh = model_mesh(config.mesh)
    return measure_held_out(
        opened.read(mesh=mesh),
        model,
        source,
        mesh=mesh,
        split=config.split,
        batch_size=config.batch_size,
        batches=config.batches,
        position_buckets=config.position_buckets,
        title=f"evaluate {run.name}",
    )


def _check_questions(config: Config, data: QuestionsConfig) -> dict[str, Any]:
    opened = open_reference(config.model)
    questions = prepare_questions(data, opened, config.split)
    params = opened.placed(model_mesh(config.mesh))
    lengths = [one.batch["tokens"].shape[1] for one in questions.asked]
    rows, longest = min(len(lengths), config.batch_size), max(lengths)
    budget = min(data.max_new_tokens, opened.config.max_length - longest)
    with using(model_mesh(config.mesh)):
        memory = generation_memory(params, opened.config, rows, longest, max(budget, 1))
    return {
        "questions": len(lengths),
        "longest_prompt": longest,
        "parameters": count_params(params),
        "bytes_per_device": {"parameters": bytes_per_device(params), **memory},
    }


def _run_questions(config: Config, data: QuestionsConfig) -> dict[str, Any]:
    opened = open_reference(config.model)
    questions = prepare_questions(data, opened, config.split)
    mesh = model_mesh(config.mesh)
    params = opened.read(mesh=mesh)
    with using(mesh):
        measured = questions.measure(params, batch_size=config.batch_size)
    examples = [
        {"question": one.question.asked, "expected": one.question.expected, "answer": said, "score": score}
        for one, said, score in zip(questions.asked, measured.answers, measured.each, strict=True)
    ]
    return {
        **measured.measures,
        "questions": len(questions.asked),
        "each": list(measured.each),
        "examples": examples[: config.examples],
    }


def _prepare(
    config: Config, *, for_shapes: bool = False
) -> tuple[OpenModel, ModelConfig, Source, dict[str, jax.ShapeDtypeStruct]]:
    """The model, its config, the data and the shapes of a batch; UserError if they do not fit together."""
    assert not isinstance(config.data, QuestionsConfig)
    opened = open_reference(config.model)
    model, source = opened.config, make_source(config.data, model_folder, for_shapes=for_shapes)
    model = dataclasses.replace(model, sparsity=config.sparsity)
    batch = batch_shapes(source, config.batch_size, config.split)
    if config.sparsity is not None and "segment_ids" in batch:
        raise UserError(
            f"{config.sparsity.kind} reads one whole text a row and the data has segments; set data.kind "
            "to text, episodes or needle"
        )
    check_fits(batch, model)
    check_same_words(opened.tokenizer, source.tokenizer(), opened.path)
    check_all_tokens(source, model)
    return opened, model, source, batch
