"""Task `evaluate`: loss by position, exact match and needles by depth, of a model on held-out data."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxlab.app import Run, model_folder
from jaxlab.checkpoints import OpenModel, check_same_tree, open_model
from jaxlab.costs import attended_tokens, bytes_per_device, compiled_memory, generation_memory
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
from jaxlab.evaluation import (
    ByDepth,
    QuestionsConfig,
    decoding_reads,
    describe_chosen_blocks,
    prepare_questions,
)
from jaxlab.losses import exact_match, target_losses
from jaxlab.models import (
    Batch,
    ModelConfig,
    Params,
    SparsityConfig,
    SplitConfig,
    abstract_params,
    count_params,
    forward,
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
        "model": open_model(model_folder(config.model)).identity,
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
        memory = compiled_memory(_measure, params, batch, model)
    return {
        "parameters": count_params(params),
        "bytes_per_device": {"parameters": bytes_per_device(params), **memory},
    }


def run(config: Config, run: Run) -> dict[str, Any]:
    if isinstance(config.data, QuestionsConfig):
        return _run_questions(config, config.data)
    opened, model, source, _ = _prepare(config)
    mesh = model_mesh(config.mesh)
    params = opened.read(mesh=mesh)
    losses, counts, matches, blocks = [], [], [], []
    needles = ByDepth()
    for batch in tqdm(
        source.held_out_batches(config.batch_size, config.batches, config.split),
        desc=f"evaluate {run.name}",
        unit="batch",
    ):
        with using(mesh):
            loss, count, match, chosen = _measure(params, batch, model)
        losses.append(np.asarray(loss, np.float64))
        counts.append(np.asarray(count))
        matches.append(np.asarray(match))
        needles.add(batch, matches[-1])
        blocks.append(chosen)
    loss, count = np.sum(losses, axis=0), np.sum(counts, axis=0)
    mean = loss.sum() / max(count.sum(), 1)
    results = {
        "loss": float(mean),
        "perplexity": float(np.exp(mean)),
        "bits_per_token": float(mean / np.log(2)),
        "exact_match": float(np.mean(np.concatenate(matches))),
        "sequences": int(sum(len(m) for m in matches)),
        "targets": int(count.sum()),
        "attended_tokens": attended_tokens(model, len(loss) + 1),
        "by_position": by_position(loss, count, config.position_buckets),
    }
    if (found := needles.results()) is not None:
        results["needle"] = found
    if blocks[0] is not None:
        described = describe_chosen_blocks(np.asarray(blocks[0]), model.nsa)
        results["nsa"] = described | {"decoding": decoding_reads(model, len(loss) + 1)}
    return results


def _check_questions(config: Config, data: QuestionsConfig) -> dict[str, Any]:
    opened = open_model(model_folder(config.model))
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
    opened = open_model(model_folder(config.model))
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


def by_position(
    loss: Float[np.ndarray, " places"], count: Int[np.ndarray, " places"], buckets: int
) -> list[dict[str, Any]]:
    """Mean loss in ranges of positions from summed losses of the tokens at positions 1 ... T-1."""
    ranges = []
    for part in np.array_split(np.arange(len(loss)), min(buckets, len(loss))):
        targets = int(count[part].sum())
        mean = float(loss[part].sum() / targets) if targets else None
        ranges.append(
            {"first": int(part[0]) + 1, "last": int(part[-1]) + 1, "targets": targets, "loss": mean}
        )
    return ranges


def _prepare(
    config: Config, *, for_shapes: bool = False
) -> tuple[OpenModel, ModelConfig, Source, dict[str, jax.ShapeDtypeStruct]]:
    """The model, its config, the data and the shapes of a batch; UserError if they do not fit together."""
    assert not isinstance(config.data, QuestionsConfig)
    opened = open_model(model_folder(config.model))
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


@partial(jax.jit, static_argnames="model")
def _measure(
    params: Params, batch: Batch, model: ModelConfig
) -> tuple[Array, Array, Array, Int[Array, "L Hkv T n"] | None]:
    """Summed losses and numbers of targets at positions 1 ... T-1, right rows, and NSA's choice in row 0."""
    logits, intermediates = forward(params, batch, model)
    losses, mask = target_losses(logits, batch)
    chosen = intermediates["chosen_blocks"][:, 0] if "chosen_blocks" in intermediates else None
    return jnp.sum(losses, axis=0, where=mask), jnp.sum(mask, axis=0), exact_match(logits, batch), chosen
