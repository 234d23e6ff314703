"""Recipes, what a merge file says, and carrying one out: opened models in, a model with its account out."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from tokenizers import Tokenizer

from jaxlab import config as configs
from jaxlab.checkpoints import NotFinite, OpenModel, SameTokens, same_tokens
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import shipped
from jaxlab.merging.account import MergeAccount
from jaxlab.merging.architecture import check_same_architecture
from jaxlab.merging.injection import inject
from jaxlab.merging.merge_data import MergeData
from jaxlab.merging.parameters import (
    check_statistics,
    check_task,
    described_operator,
    given_of,
    named_operator,
    refuse_weight,
    used_of_recipe,
    with_own_values,
)
from jaxlab.merging.schedules import Number, check_kind
from jaxlab.models import ModelConfig, Params

if TYPE_CHECKING:
    from jaxlab.merging.mergekit.file import MergekitFile

ACCOUNT = "account.json"
"""Beside the model in its folder."""


Parameters = dict[str, Number | dict[str, Number] | None]
"""Of an operator, by name: a number, or one for each model by what it is called; null is like absent."""


@dataclass(frozen=True)
class Expert:
    """One of several experts; in a list also its model alone."""

    ALONE: ClassVar[str] = "model"

    model: str
    """As `expert` of the recipe."""
    lambda_: Number | None = None
    """Weight of its task vector; by default the recipe's lambda_e."""
    parameters: Annotated[dict[str, Number | None], configs.OTHERS] = field(default_factory=dict)
    """Its own values of the operator's parameters, such as density."""


@dataclass(frozen=True)
class InjectRecipe:
    """Experts into the language model of a VLM."""

    kind: Literal["inject"] = "inject"
    """What the recipe does."""
    vlm: str = ""
    """A model folder, a run folder, or the config of a finished train run."""
    expert: str = ""
    """A language model fine-tuned from the base; model+adapter for one with a LoRA adapter."""
    experts: tuple[Expert, ...] = ()
    """Instead of one expert several, [{model, lambda, density}, ...]."""
    base: str = ""
    """The language model that all come from."""
    operator: str = "task_arithmetic"
    """Its name in docs/operators.md; name+svc, say, does something to its result."""
    lambda_v: Number = 1.0
    """Weight of the VLM's task vector: a number, a gradient over layers, or a list of {pattern, value}, the
    first match deciding."""
    lambda_e: Number = 1.0
    """Weight of the expert's task vector."""
    embeddings: Literal["vlm", "merge_common_rows", "merge"] = "vlm"
    """Embedding and head: the VLM's; merged where the tokenizers agree; merged as far as all have rows."""
    differences: dict[str, Literal["vlm"]] = field(default_factory=dict)
    """Settings without an average, such as rope.theta, in which the models may differ: whose counts."""
    mode: Literal["paper", "mergekit"] = "paper"
    """The operator as published, or as mergekit computes it."""
    seed: int = 0
    """Of random masks."""
    task: str | None = None
    """Of operators that make a model for each task (emr, tall): whose model is written, vlm or expert."""
    data: MergeData | None = None
    """Texts on which the statistics of operators with data (fisher, regmean, ...) are measured."""
    statistics: str | None = None
    """Instead of data: a file that `data.save` wrote."""
    parameters: Annotated[Parameters, configs.OTHERS] = field(default_factory=dict)
    """The operator's parameters, each a key of its own beside the others: density, gamma, k, ..."""

    def __post_init__(self) -> None:
        for name in ("vlm", "expert", "base"):
            if not getattr(self, name) and not (name == "expert" and self.experts):
                raise ConfigError("missing; an injection needs vlm, expert and base", key=name)
        if self.expert and self.experts:
            raise ConfigError("expert is given too; one of them is enough", key="experts")
        operator = named_operator(self.operator, injected=True)
        check_task(operator, self.task, self.models_with_tasks())
        check_statistics(operator, self.data, self.statistics)
        for name in ("lambda_v", "lambda_e"):
            check_kind(getattr(self, name), "number", name)
        for i, expert in enumerate(self.experts):
            if expert.lambda_ is not None:
                check_kind(expert.lambda_, "number", f"experts.{i}.lambda")
        self.options()

    def options(self) -> dict[str, Any]:
        """The operator's parameters.

        Raises:
          ConfigError: one that it does not use, that is missing or cannot have its value.
        """
        operator, models = named_operator(self.operator, injected=True), self.models_with_tasks()
        own = [{}, *(given_of(expert.parameters) for expert in self.experts)]
        own += [{}] * (len(models) - len(own))
        own_keys: Any = {"mode": self.mode, "injected": True, "fields": _keys(Expert)}
        return used_of_recipe(
            operator,
            self.mode,
            with_own_values(operator, given_of(self.parameters), own, models, "experts", 1, **own_keys),
            models,
            injected=True,
            fields=_keys(type(self)),
        )

    def lambdas(self) -> dict[str, Number]:
        """The weights by what they are called, in the order of the models."""
        if not self.experts:
            return {"lambda_v": self.lambda_v, "lambda_e": self.lambda_e}
        own = [self.lambda_e if expert.lambda_ is None else expert.lambda_ for expert in self.experts]
        return {"lambda_v": self.lambda_v} | {
            f"the lambda of expert {i}": number for i, number in enumerate(own, 1)
        }

    def references(self) -> list[str]:
        """The models that it names: the VLM, the experts, the base."""
        return [self.vlm, *([expert.model for expert in self.experts] or [self.expert]), self.base]

    def models_with_tasks(self) -> list[str]:
        """What the models other than the base are to it."""
        return self.roles()[:-1]

    def roles(self) -> list[str]:
        """What they are to it, in this order."""
        several = [f"expert {i}" for i in range(1, 1 + len(self.experts))]
        return ["vlm", *(several or ["expert"]), "base"]


@dataclass(frozen=True)
class WeightedModel:
    """A model of a merge; in a list also its name alone."""

    ALONE: ClassVar[str] = "model"

    model: str
    """A model folder, a run folder, or the config of a finished train run; model+adapter with LoRA."""
    weight: Number | None = None
    """Its weight; by default the recipe's weight, or 1."""
    parameters: Annotated[dict[str, Number | None], configs.OTHERS] = field(default_factory=dict)
    """Its own values of the operator's parameters, such as density."""


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
    """Its name in docs/operators.md; name+svc, say, does something to its result."""
    weight: Number | None = None
    """Of every model that names none."""
    embeddings: Literal["all", "first", "merge_common_rows", "merge", "union"] = "all"
    """Embedding and head: merged as all else, if all have equally many rows; the first model's; merged where
    the tokenizers agree; merged as far as all have rows, the others the first model's. union is refused: only
    a file of mergekit makes a vocabulary of all tokens (tokenizer_source: union)."""
    differences: dict[str, Literal["first"]] = field(default_factory=dict)
    """Settings without an average, such as rope.theta, in which the models may differ: whose counts."""
    mode: Literal["paper", "mergekit"] = "paper"
    """The operator as published, or as mergekit computes it."""
    seed: int = 0
    """Of random masks."""
    task: str | None = None
    """Of operators that make a model for each task (emr, tall): whose model is written, "model 0", say."""
    data: MergeData | None = None
    """Texts on which the statistics of operators with data (fisher, regmean, ...) are measured."""
    statistics: str | None = None
    """Instead of data: a file that `data.save` wrote."""
    parameters: Annotated[Parameters, configs.OTHERS] = field(default_factory=dict)
    """The operator's parameters, each a key of its own beside the others: lambda, t, density, ..."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("missing; a merge needs a list of models", key="models")
        if self.embeddings == "union":
            raise ConfigError(
                "union makes a vocabulary of its own, which kind: merge does not: write a file of "
                "mergekit (merge_method, tokenizer_source: union), or use merge_common_rows",
                key="embeddings",
            )
        operator = named_operator(self.operator, injected=False)
        check_task(operator, self.task, self.models_with_tasks())
        check_statistics(operator, self.data, self.statistics)
        if operator.base == ("required" if self.base is None else "unused"):
            raise ConfigError(
                f"{self.operator} {'needs a' if self.base is None else 'takes no'} base", key="base"
            )
        self.weights()
        self.options()

    def weights(self) -> dict[str, Number]:
        """A weight for each model, by what it is called; none: the operator has no weights.

        Raises:
          ConfigError: weights are given to an operator that has none.
        """
        operator = named_operator(self.operator, injected=False)
        given = {f"models.{i}.weight": m.weight for i, m in enumerate(self.models) if m.weight is not None}
        given |= {} if self.weight is None else {"weight": self.weight}
        for key, weight in given.items():
            check_kind(weight, "number", key)
        if not operator.takes("weights"):
            for key in given:
                refuse_weight(operator, self.mode, key)
            return {}
        common = 1.0 if self.weight is None else self.weight
        return {
            f"the weight of model {i}": common if model.weight is None else model.weight
            for i, model in enumerate(self.models)
        }

    def options(self) -> dict[str, Any]:
        """The operator's other parameters.

        Raises:
          ConfigError: one that it does not use, that is missing or cannot have its value.
        """
        operator, roles = named_operator(self.operator, injected=False), self.models_with_tasks()
        own = [given_of(model.parameters) for model in self.models]
        own_keys: Any = {"mode": self.mode, "injected": False, "fields": _keys(WeightedModel)}
        return used_of_recipe(
            operator,
            self.mode,
            with_own_values(operator, given_of(self.parameters), own, roles, "models", **own_keys),
            roles,
            injected=False,
            fields=_keys(type(self)),
        )

    def references(self) -> list[str]:
        """The models that it names, the base last."""
        return [*(model.model for model in self.models), *([] if self.base is None else [self.base])]

    def models_with_tasks(self) -> list[str]:
        """What the models other than the base are to it."""
        return self.roles()[: len(self.models)]

    def roles(self) -> list[str]:
        """What they are to it, in this order."""
        models = [f"model {i}" for i in range(len(self.models))]
        return models if self.base is None else [*models, "base"]


def described(recipe: "Recipe") -> str:
    """The operator of a recipe with all its parameters, defaults too, on a line."""
    injected = isinstance(recipe, InjectRecipe)
    operator = named_operator(recipe.operator, injected=injected)
    return described_operator(operator, recipe.mode, recipe.options(), injected=injected)


def _keys(recipe: type) -> list[str]:
    return [key for key, known in configs.fields_of(recipe).items() if not known.others]


Recipe = InjectRecipe | MergeRecipe
KINDS: dict[str, type[InjectRecipe] | type[MergeRecipe]] = {"inject": InjectRecipe, "merge": MergeRecipe}


def load_recipe(path: str | Path) -> "Recipe | MergekitFile":
    """The recipe in a YAML file; one without a kind is a file of mergekit.

    Raises:
      UserError: a mistake in it.
    """
    from jaxlab.merging.mergekit.documents import is_mergekit_file

    if is_mergekit_file(shipped(path)):
        from jaxlab.merging.mergekit.reading import read_mergekit_file

        return read_mergekit_file(shipped(path))
    source = configs.Source.of_file(path)
    if source.tree.get("kind") is None:
        found = "missing" if source.tree else "the file holds nothing"
        raise UserError(f"{path}: kind: {found}; a recipe begins with kind: inject or kind: merge")
    kind = str(source.tree["kind"])
    if kind not in KINDS:
        hint = configs.suggestion(kind, KINDS) or "; there are inject and merge"
        raise UserError(f"{path}: kind: no such kind of recipe, {kind!r}{hint}")
    return source.build(KINDS[kind])


class Trio(NamedTuple):
    """A VLM, an expert and their base, read."""

    config: ModelConfig
    """The VLM's."""
    tokenizer: Tokenizer | None
    """The VLM's."""
    vlm: Params
    expert: Params
    base: Params
    common_rows: SameTokens | int | None
    """Which ids mean the same token to all three; None: all, since they read bytes."""
    expert_config: ModelConfig
    base_config: ModelConfig


def read_trio(
    vlm: OpenModel,
    expert: OpenModel,
    base: OpenModel,
    *,
    differences: Collection[str] = (),
    not_finite: NotFinite = "take",
) -> Trio:
    """Reads the three.

    Args:
      differences: settings that may differ; see `check_same_architecture`.
      not_finite: what to do about NaN and infinities.

    Raises:
      UserError: one is damaged, or not finite though that is refused; their language models differ in kind.
    """
    check_same_architecture([vlm, expert, base], differences)
    return Trio(
        config=vlm.config,
        tokenizer=vlm.tokenizer,
        vlm=vlm.read(not_finite=not_finite),
        expert=expert.read(not_finite=not_finite),
        base=base.read(not_finite=not_finite),
        common_rows=same_tokens([vlm.tokenizer, expert.tokenizer, base.tokenizer]),
        expert_config=expert.config,
        base_config=base.config,
    )


def injection_options(recipe: InjectRecipe) -> dict[str, Any]:
    """The operator's parameters of a recipe as `inject` takes them.

    Raises:
      UserError: several experts, or parameters that are not the same for all tensors: only a plan has them.
    """
    if recipe.experts or recipe.task or recipe.data or recipe.statistics:
        raise UserError("several experts, models of a task and statistics are for `merge`, not for a search")
    options: dict[str, Any] = {}
    for name, value in recipe.options().items():
        options[name] = [value[role] for role in ("vlm", "expert")] if isinstance(value, dict) else value
        if any(isinstance(x, tuple) for x in (value.values() if isinstance(value, dict) else [value])):
            raise UserError(f"{name} is not the same for all tensors; only `merge` can do that, no search")
    return options


def inject_by_recipe(recipe: InjectRecipe, trio: Trio) -> tuple[Params, MergeAccount]:
    """The VLM with the expert merged into it as the recipe says, and the account.

    Raises:
      UserError: several experts, or parameters that are not the same for all tensors: only a plan has them.
    """
    options = injection_options(recipe)
    return inject(
        trio.vlm,
        trio.expert,
        trio.base,
        operator=recipe.operator,
        lambda_v=recipe.lambda_v,
        lambda_e=recipe.lambda_e,
        embeddings=recipe.embeddings,
        common_rows=trio.common_rows,
        seed=recipe.seed,
        mode=recipe.mode,
        family=trio.config.family,
        **options,
    )
