"""Task `merge-search`: weights, densities and operators of an injection, searched on the device.

The best point of every operator is chosen on validation splits and measured once on test splits; every
operator has equally many points, unless the config says otherwise.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from jaxlab import config as configs
from jaxlab.app import Run, model_folder
from jaxlab.checkpoints.loading import kept_of, load_model_config, model_identity, stored_shapes
from jaxlab.data import DataConfig, make_source
from jaxlab.errors import ConfigError
from jaxlab.files import write_atomic
from jaxlab.merging.examples import answered
from jaxlab.merging.grid import Measure, Point, evaluate_grid, points
from jaxlab.merging.inputs import Trio, load_trio, same_architecture
from jaxlab.merging.measure import Data, exact_match_of, read_data, text_only
from jaxlab.merging.plan import plan_injection
from jaxlab.merging.recipe import InjectRecipe
from jaxlab.merging.stages import Method
from jaxlab.models import ModelConfig, Params
from jaxlab.tasks.merge import inject_recipe, save_merged


@dataclass(frozen=True)
class Grid:
    """The points at which one operator is tried: all combinations."""

    lambda_v: tuple[float, ...] = (1.0,)
    """Weights of the VLM's task vector."""
    lambda_e: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Weights of the expert's task vector."""
    density: tuple[float, ...] = ()
    """Shares of the task vectors that are kept; for ties and dare_* only."""

    def __post_init__(self) -> None:
        for name in ("lambda_v", "lambda_e"):
            if not getattr(self, name):
                raise ConfigError("an empty list leaves nothing to try", key=name)

    def points(self) -> list[Point]:
        return points(self.lambda_v, self.lambda_e, self.density or (None,))


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
                    self.method(name, density)
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
        return Method(operator, density, mode=self.mode)


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    models = {role: getattr(config, role) for role in ("vlm", "expert", "base")}
    data = {
        f"evaluate.{name}": make_source(data, model_folder).identity for name, data in config.evaluate.items()
    }
    return {role: model_identity(model_folder(reference)) for role, reference in models.items()} | data


def check(config: Config) -> dict[str, Any]:
    """Whether the models fit together, and what the search holds on the device; reads no parameters."""
    folders = [model_folder(reference) for reference in (config.vlm, config.expert, config.base)]
    vlm_config, *others = (load_model_config(folder) for folder in folders)
    for reference, other in zip((config.expert, config.base), others, strict=True):
        same_architecture(config.vlm, vlm_config, reference, other)
    shapes = [stored_shapes(folder) for folder in folders]
    plan = plan_injection(*shapes, embeddings=config.embeddings, family=vlm_config.family)
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
    trio = load_trio(config.vlm, config.expert, config.base)
    validation, test = (
        read_data(config.evaluate, split, config.batch_size, config.batches)
        for split in ("validation", "test")
    )
    operators = search(config, trio, validation, test, exact_match_of(trio.config), run)
    winner = max(operators, key=lambda name: operators[name]["best"]["score"])  # the first of equals
    best = {"operator": winner, **operators[winner]["best"]}
    recipe = recipe_of(config, winner, best)
    write_atomic(run.path / "best.yaml", configs.dump(recipe))
    params, account = inject_recipe(recipe, trio)
    kept = kept_of(model_folder(config.vlm))
    save_merged(run.path / "model", trio.config, params, trio.tokenizer, account, recipe, kept)
    return {
        "operators": operators,
        "best": best,
        "chosen_by": list(config.choose or config.evaluate),
        "unmerged": {
            "vlm": _both_splits(trio.config, trio.vlm, validation, test),
            "expert": _both_splits(trio.expert_config, trio.expert, text_only(validation), text_only(test)),
            "base": _both_splits(trio.base_config, trio.base, text_only(validation), text_only(test)),
        },
        "examples": _examples(config, trio, params),
    }


def _examples(config: Config, trio: Trio, merged: Params) -> list[dict[str, Any]]:
    if trio.tokenizer is None or not config.examples:
        return []
    target = next(iter(config.choose or config.evaluate))
    batch = next(
        iter(
            make_source(config.evaluate[target], model_folder).held_out_batches(config.batch_size, 1, "test")
        )
    )
    models = {"VLM alone": trio.vlm, "injected": merged}
    return answered(models, batch, trio.config, trio.tokenizer, config.examples)


def search(
    config: Config, trio: Trio, validation: Data, test: Data, measure: Measure, run: Run
) -> dict[str, Any]:
    """For every operator: its grid, the measures at every point, and its best point with the measures on
    test.
    """
    plan = plan_injection(
        trio.vlm,
        trio.expert,
        trio.base,
        embeddings=config.embeddings,
        common_rows=trio.common_rows,
        family=trio.config.family,
    )
    operators: dict[str, Any] = {}
    for name, grid in config.operators.items():
        where, method = grid.points(), config.method(name, grid.points()[0].density)
        with tqdm(total=len(where), desc=f"{run.name} {name}", unit="point") as bar:
            measured = evaluate_grid(
                plan,
                method,
                trio,
                where,
                measure,
                validation,
                seed=config.seed,
                chunk=config.chunk,
                progress=bar.update,
            )
        rows = [
            {**point._asdict(), "validation": row, "score": score(config, row)}
            for point, row in zip(where, measured, strict=True)
        ]
        best = max(rows, key=lambda row: row["score"])  # the first of equals
        at_best = Point(best["lambda_v"], best["lambda_e"], best["density"])
        (measured_test,) = evaluate_grid(
            plan, method, trio, [at_best], measure, test, seed=config.seed, chunk=config.chunk
        )
        best = best | {"test": measured_test}
        operators[name] = {"points": rows, "evaluations": len(rows), "best": best}
        run.log(operator=name, validation=best["score"], **{f"test_{k}": v for k, v in best["test"].items()})
    return operators


def score(config: Config, measured: dict[str, float]) -> float:
    """What a point is chosen by: the mean of the measures named in `choose`."""
    return float(np.mean([measured[name] for name in config.choose or config.evaluate]))


def recipe_of(config: Config, operator: str, point: dict[str, Any]) -> InjectRecipe:
    """The recipe with which `run.py merge` makes the model of a point."""
    return InjectRecipe(
        vlm=config.vlm,
        expert=config.expert,
        base=config.base,
        operator=operator,
        lambda_v=point["lambda_v"],
        lambda_e=point["lambda_e"],
        density=point["density"],
        embeddings=config.embeddings,
        mode=config.mode,
        seed=config.seed,
    )


def evaluate(measure: Measure, params: Params, data: Data) -> dict[str, float]:
    """The measures of one model."""
    return {name: float(value) for name, value in jax.jit(measure)(params, data).items()} if data else {}


def _both_splits(config: ModelConfig, params: Params, validation: Data, test: Data) -> dict[str, Any]:
    measure = exact_match_of(config)
    return {"validation": evaluate(measure, params, validation), "test": evaluate(measure, params, test)}
