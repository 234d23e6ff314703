"""Recipes: what a merge file says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxlab import config as configs
from jaxlab.config import yaml_text
from jaxlab.config.schema import suggestion
from jaxlab.errors import ConfigError, UserError
from jaxlab.merging.inject import PatternValue
from jaxlab.merging.operators import OPERATORS
from jaxlab.merging.stages import Method


@dataclass(frozen=True)
class InjectRecipe:
    """An expert into the language model of a VLM."""

    kind: Literal["inject"] = "inject"
    """What the recipe does."""
    vlm: str = ""
    """A model folder, a run folder, or the config of a finished train run."""
    expert: str = ""
    """A language model fine-tuned from the base."""
    base: str = ""
    """The language model that both come from."""
    operator: str = "task_arithmetic"
    """linear, task_arithmetic, ties, dare_linear, dare_ties or slerp."""
    lambda_v: float | tuple[float, ...] | tuple[PatternValue, ...] = 1.0
    """Weight of the VLM's task vector: a number, a list over layers, or a list of {pattern, value}, the first
    match deciding."""
    lambda_e: float | tuple[float, ...] | tuple[PatternValue, ...] = 1.0
    """Weight of the expert's task vector."""
    density: float | tuple[float, ...] | None = None
    """Share of each task vector that ties and dare_* keep; one value, or one for the VLM and one for the
    expert.
    """
    rescale: bool | None = None
    """Scale up what was kept; by default dare_* do."""
    embeddings: Literal["vlm", "merge_common_rows", "merge"] = "vlm"
    """Embedding and head: the VLM's; merged where the tokenizers agree; merged as far as all have rows."""
    mode: Literal["paper", "mergekit"] = "paper"
    """The operator as published, or as mergekit computes it."""
    seed: int = 0
    """Of random masks."""

    def __post_init__(self) -> None:
        for name in ("vlm", "expert", "base"):
            if not getattr(self, name):
                raise ConfigError("missing; an injection needs vlm, expert and base", key=name)
        self.method()

    def method(self) -> Method:
        return Method(self.operator, self.density, self.rescale, self.mode)


@dataclass(frozen=True)
class WeightedModel:
    """A model of a merge."""

    model: str
    """A model folder, a run folder, or the config of a finished train run."""
    weight: float = 1.0
    """Its weight."""
    density: float = 1.0
    """Share of its task vector that ties and dare_* keep."""


@dataclass(frozen=True)
class MergeRecipe:
    """Models of one architecture into one."""

    kind: Literal["merge"] = "merge"
    """What the recipe does."""
    models: tuple[WeightedModel, ...] = ()
    """The models, without the base."""
    base: str | None = None
    """What task vectors are taken from; none for linear and slerp."""
    operator: str = "task_arithmetic"
    """linear, task_arithmetic, ties, dare_linear, dare_ties or slerp."""
    lambda_: float | None = None
    """Of the merged task vector."""
    t: float | None = None
    """Where between its two models slerp lands."""
    normalize: bool | None = None
    """Divide by the sum of the weights; the default is the operator's."""
    rescale: bool | None = None
    """Scale up what was kept; by default dare_* do."""
    mode: Literal["paper", "mergekit"] = "paper"
    """The operator as published, or as mergekit computes it."""
    seed: int = 0
    """Of random masks."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("missing; a merge needs a list of models", key="models")
        if self.operator not in OPERATORS:
            raise ConfigError(
                f"no operator {self.operator!r}; there are {', '.join(OPERATORS)}", key="operator"
            )
        operator = OPERATORS[self.operator]
        if operator.of_models != (self.base is None):
            raise ConfigError(
                f"{self.operator} {'takes no' if operator.of_models else 'needs a'} base", key="base"
            )
        for key, value in self._options().items():
            if value is not None and key not in operator.parameters:
                raise ConfigError(f"{self.operator} has none", key=key)
            if value is None and key == "t" and key in operator.parameters:
                raise ConfigError(f"{self.operator} needs it", key=key)

    def _options(self) -> dict[str, Any]:
        options = {"lambda": self.lambda_, "t": self.t, "normalize": self.normalize, "rescale": self.rescale}
        thin = any(model.density != 1.0 for model in self.models)
        return options | {"density": [model.density for model in self.models] if thin else None}

    def parameters(self) -> dict[str, Any]:
        """The parameters of `merge_tensors`."""
        given = {key: value for key, value in self._options().items() if value is not None}
        return given if self.operator == "slerp" else {"weight": [m.weight for m in self.models], **given}


Recipe = InjectRecipe | MergeRecipe
KINDS: dict[str, type[InjectRecipe] | type[MergeRecipe]] = {"inject": InjectRecipe, "merge": MergeRecipe}


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Raises UserError for a mistake in it, and for a mergekit file, which has no
    kind.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such recipe")
    value, _ = yaml_text.parse(Path(path).read_text(encoding="utf-8"), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a recipe; it begins with kind: inject or kind: merge")
    if "kind" not in value:
        raise UserError(f"{path}: no kind: (inject or merge), and mergekit's own files are not supported yet")
    kind = value["kind"]
    if kind not in KINDS:
        hint = suggestion(str(kind), KINDS) or "; there are inject and merge"
        raise UserError(f"{path}: kind: no such kind of recipe, {kind!r}{hint}")
    return configs.load(KINDS[kind], path)
