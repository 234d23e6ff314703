"""Task `merge-search`: weights, densities and operators of an injection, searched on the device.

The best point of every operator is chosen on validation splits and measured once on test splits; every
operator has equally many points, unless the config says otherwise.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from tqdm import tqdm

from jaxlab import config as configs
from jaxlab.app import Run, model_folder
from jaxlab.checkpoints import OpenModel, open_model
from jaxlab.data import DataConfig, make_source
from jaxlab.errors import ConfigError
from jaxlab.files import write_atomic
from jaxlab.merging import (
    Grid,
    InjectRecipe,
    Method,
    answered,
    check_same_architecture,
    exact_match_of,
    inject_by_recipe,
    measure_model,
    note_dequantized,
    plan_injection,
    read_data,
    read_trio,
    save_merged,
    search_grid,
    text_only,
)


@dataclass(frozen=True)
class Config:
    """Search for the weights, densities and operators with which an expert's skill shows in a VLM."""

    vlm: str = ""
    """A model folder, a run folder, or the config of a finished train run."""
    expert: str = ""
    """A language model fine-tuned from the base."""
    base: str = ""
    """The language model that both come from."""
    operators: dict[str, Grid] = field(default_factory=lambda: {"task_arithmetic": Grid()})
    """Operators to try, each with its grid."""
    equal_points: bool = True
    """Refuse grids of different sizes: an operator tried more often would look better by that alone."""
    evaluate: dict[str, DataConfig] = field(default_factory=dict)
    """Data sets by name; measured is exact match of the answers."""
    choose: tuple[str, ...] = ()
    """Names of the data sets whose mean on the validation split decides; none: all of them."""
    batch_size: int = 64
    """Sequences in a batch."""
    batches: int = 8
    """At most so many batches of each split."""
    chunk: int = 8
    """Points done in one call of the compiled program, one after the other."""
    embeddings: Literal["vlm", "merge_common_rows", "merge"] = "vlm"
    """Embedding and head: the VLM's; merged where the tokenizers agree; merged as far as all have rows."""
    mode: Literal["paper", "mergekit"] = "paper"
    """Operators as published, or as mergekit computes them."""
    seed: int = 0
    """Of random masks."""
    examples: int = 6
    """Questions, of the first data set that decides, which the VLM and the best model answer for people to
    read."""

    def __post_init__(self) -> None:
        for name in ("vlm", "expert", "base", "operators", "evaluate"):
            if not getattr(self, name):
                raise ConfigError(
                    "missing; a search needs the three models, operators and evaluate", key=name
                )
        for name in ("batch_size", "batches", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.examples < 0:
            raise ConfigError(f"must not be negative, is {self.examples}", key="examples")
        for name in self.choose:
            if name not in self.evaluate:
                raise ConfigError(f"no data set {name!r}; there are {', '.join(self.evaluate)}", key="choose")
        for name, grid in self.operators.items():
            try:
                for density in grid.density or (None,):
                    self.method(name, density).check_one_model()
            except ConfigError as error:
                key = f"operators.{name}" + (".density" if error.key == "density" else "")
                raise ConfigError(error.message, key=key) from None
        sizes = {name: len(grid.points()) for name, grid in self.operators.items()}
        if self.equal_points and len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                f"grids of different sizes ({listed}); make them equal, or set equal_points to false",
                key="operators",
            )

    def method(self, operator: str, density: float | None) -> Method:
        return Method.of(operator, self.mode, density=density)


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    models = dict(zip(("vlm", "expert", "base"), _models(config), strict=True))
    data = {
        f"evaluate.{name}": make_source(data, model_folder).identity for name, data in config.evaluate.items()
    }
    return {role: model.identity for role, model in models.items()} | data


def check(config: Config) -> dict[str, Any]:
    """Whether the models fit together, and what the search holds on the device; reads no parameters."""
    models = _models(config)
    check_same_architecture(models)
    shapes = [model.shapes for model in models]
    plan = plan_injection(*shapes, embeddings=config.embeddings, family=models[0].config.family)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    # Three models, the base once more in the checkpoint's shape, two float32 task vectors, one merged model.
    vectors = 8 * sum(leaf.size for leaf in jax.tree.leaves(shapes[2]))
    held = sum(map(size, shapes)) + size(shapes[2]) + vectors + size(shapes[0])
    return {
        "points": {name: len(grid.points()) for name, grid in config.operators.items()},
        "tensors_merged": sum(len(entry.names) for entry in plan.merged),
        "device_bytes": held,
    }


def run(config: Config, run: Run) -> dict[str, Any]:
    models = _models(config)
    note_dequantized(models)
    trio = read_trio(*models)
    sources = {name: make_source(data, model_folder) for name, data in config.evaluate.items()}
    validation, test = (
        read_data(sources, split, config.batch_size, config.batches) for split in ("validation", "test")
    )
    plan = plan_injection(
        trio.vlm,
        trio.expert,
        trio.base,
        embeddings=config.embeddings,
        common_rows=trio.common_rows,
        family=trio.config.family,
    )
    choose, measure = config.choose or tuple(config.evaluate), exact_match_of(trio.config)
    operators: dict[str, Any] = {}
    for name, grid in config.operators.items():
        method = config.method(name, grid.points()[0].density)
        with tqdm(total=len(grid.points()), desc=f"{run.name} {name}", unit="point") as bar:
            operators[name] = search_grid(
                plan,
                method,
                trio,
                grid,
                measure,
                validation,
                test,
                choose=choose,
                seed=config.seed,
                chunk=config.chunk,
                progress=bar.update,
            )
        best = operators[name]["best"]
        run.log(operator=name, validation=best["score"], **{f"test_{k}": v for k, v in best["test"].items()})
    winner = max(operators, key=lambda name: operators[name]["best"]["score"])  # the first of equals
    best = {"operator": winner, **operators[winner]["best"]}
    recipe = recipe_of(config, winner, best)
    write_atomic(run.path / "best.yaml", configs.dump(recipe))
    params, account = inject_by_recipe(recipe, trio)
    save_merged(run.path / "model", recipe, models, params, account, overwrite=True)
    both = lambda measure, params, *data: {
        split: measure_model(measure, params, part)
        for split, part in zip(("validation", "test"), data, strict=True)
    }
    texts = text_only(validation), text_only(test)
    examples = []
    if trio.tokenizer is not None and config.examples:
        batch = next(iter(sources[choose[0]].held_out_batches(config.batch_size, 1, "test")))
        named = {"VLM alone": trio.vlm, "injected": params}
        examples = answered(named, batch, trio.config, trio.tokenizer, config.examples)
    return {
        "operators": operators,
        "best": best,
        "chosen_by": list(choose),
        "unmerged": {
            "vlm": both(measure, trio.vlm, validation, test),
            "expert": both(exact_match_of(trio.expert_config), trio.expert, *texts),
            "base": both(exact_match_of(trio.base_config), trio.base, *texts),
        },
        "examples": examples,
    }


def recipe_of(config: Config, operator: str, point: dict[str, Any]) -> InjectRecipe:
    """The recipe with which `run.py merge` makes the model of a point."""
    return InjectRecipe(
        vlm=config.vlm,
        expert=config.expert,
        base=config.base,
        operator=operator,
        lambda_v=point["lambda_v"],
        lambda_e=point["lambda_e"],
        parameters={"density": point["density"]},
        embeddings=config.embeddings,
        mode=config.mode,
        seed=config.seed,
    )


def _models(config: Config) -> list[OpenModel]:
    return [open_model(model_folder(reference)) for reference in (config.vlm, config.expert, config.base)]
