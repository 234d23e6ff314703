"""Recipes, what a merge file says, and carrying one out: opened models in, a model with its account out."""

import json
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tokenizers import Tokenizer

from jaxlab import __version__
from jaxlab import config as configs
from jaxlab.checkpoints import OpenModel, language_settings_apart, open_model
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.files import jsonable, shipped
from jaxlab.merging.account import MergeAccount
from jaxlab.merging.injection import inject
from jaxlab.merging.parameters import (
    given_of,
    named_operator,
    refuse_weight,
    used_of_recipe,
    with_own_values,
)
from jaxlab.merging.schedules import Number, check_kind
from jaxlab.merging.vocabulary import SameTokens, same_tokens
from jaxlab.models import ModelConfig, Params

if TYPE_CHECKING:
    from jaxlab.merging.mergekit.file import MergekitFile

ACCOUNT = "account.json"
"""Beside the model in its folder."""


Parameters = dict[str, Number | dict[str, Number] | None]
"""Of an operator, by name: a number, or one for each model by what it is called; null is like absent."""


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
    parameters: Annotated[Parameters, configs.OTHERS] = field(default_factory=dict)
    """The operator's parameters, each a key of its own beside the others: density, gamma, k, ..."""

    def __post_init__(self) -> None:
        for name in ("vlm", "expert", "base"):
            if not getattr(self, name):
                raise ConfigError("missing; an injection needs vlm, expert and base", key=name)
        operator = named_operator(self.operator, injected=True)
        if operator.per_task:
            raise ConfigError(f"{self.operator} makes a model for each task, not one", key="operator")
        for name in ("lambda_v", "lambda_e"):
            check_kind(getattr(self, name), "number", name)
        self.options()

    def options(self) -> dict[str, Any]:
        """The operator's parameters.

        Raises:
          ConfigError: one that it does not use, that is missing or cannot have its value.
        """
        return used_of_recipe(
            named_operator(self.operator, injected=True),
            self.mode,
            given_of(self.parameters),
            self.roles()[:-1],
            injected=True,
            fields=_keys(type(self)),
        )

    def lambdas(self) -> dict[str, Number]:
        """The weights by what they are called, in the order of the models."""
        return {"lambda_v": self.lambda_v, "lambda_e": self.lambda_e}

    def references(self) -> list[str]:
        """The models that it names: VLM, expert and base."""
        return [self.vlm, self.expert, self.base]

    def roles(self) -> list[str]:
        """What they are to it, in this order."""
        return ["vlm", "expert", "base"]


@dataclass(frozen=True)
class WeightedModel:
    """A model of a merge."""

    model: str
    """A model folder, a run folder, or the config of a finished train run."""
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
    embeddings: Literal["all", "first", "merge_common_rows", "merge"] = "all"
    """Embedding and head: merged as all else, if all have equally many rows; the first model's; merged where
    the tokenizers agree; merged as far as all have rows, the others the first model's."""
    differences: dict[str, Literal["first"]] = field(default_factory=dict)
    """Settings without an average, such as rope.theta, in which the models may differ: whose counts."""
    mode: Literal["paper", "mergekit"] = "paper"
    """The operator as published, or as mergekit computes it."""
    seed: int = 0
    """Of random masks."""
    parameters: Annotated[Parameters, configs.OTHERS] = field(default_factory=dict)
    """The operator's parameters, each a key of its own beside the others: lambda, t, density, ..."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("missing; a merge needs a list of models", key="models")
        operator = named_operator(self.operator, injected=False)
        if operator.per_task:
            raise ConfigError(f"{self.operator} makes a model for each task, not one", key="operator")
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
        operator, roles = named_operator(self.operator, injected=False), self.roles()[: len(self.models)]
        own = [given_of(model.parameters) for model in self.models]
        return used_of_recipe(
            operator,
            self.mode,
            with_own_values(operator, given_of(self.parameters), own, roles, "models"),
            roles,
            injected=False,
            fields=_keys(type(self)),
        )

    def references(self) -> list[str]:
        """The models that it names, the base last."""
        return [*(model.model for model in self.models), *([] if self.base is None else [self.base])]

    def roles(self) -> list[str]:
        """What they are to it, in this order."""
        models = [f"model {i}" for i in range(len(self.models))]
        return models if self.base is None else [*models, "base"]


def _keys(recipe: type) -> list[str]:
    return [key for key, known in configs.fields_of(recipe).items() if not known.others]


Recipe = InjectRecipe | MergeRecipe
KINDS: dict[str, type[InjectRecipe] | type[MergeRecipe]] = {"inject": InjectRecipe, "merge": MergeRecipe}


def load_recipe(path: str | Path) -> "Recipe | MergekitFile":
    """The recipe in a YAML file; one without a kind is a file of mergekit.

    Raises:
      UserError: a mistake in it.
    """
    from jaxlab.merging.mergekit.file import is_mergekit_file, read_mergekit_file

    if is_mergekit_file(shipped(path)):
        return read_mergekit_file(shipped(path))
    source = configs.Source.of_file(path)
    kind = str(source.tree.get("kind"))
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
    vlm: OpenModel, expert: OpenModel, base: OpenModel, *, differences: Collection[str] = ()
) -> Trio:
    """Reads the three.

    Args:
      differences: settings that may differ; see `check_same_architecture`.

    Raises:
      UserError: one is damaged or their language models differ in kind.
    """
    check_same_architecture([vlm, expert, base], differences)
    return Trio(
        config=vlm.config,
        tokenizer=vlm.tokenizer,
        vlm=vlm.read(),
        expert=expert.read(),
        base=base.read(),
        common_rows=same_tokens([vlm.tokenizer, expert.tokenizer, base.tokenizer]),
        expert_config=expert.config,
        base_config=base.config,
    )


def check_same_architecture(
    models: Sequence[OpenModel], allowed: Collection[str] = (), first: str = "vlm"
) -> dict[str, dict[str, Any]]:
    """Checks that parameters of the language models mean the same functions.

    Args:
      allowed: settings that may differ, such as rope.theta: those of the first model are kept.
      first: what the first model is called.

    Returns:
      For each of these settings the value that is kept, and the others' by path.

    Raises:
      UserError: they do not, or do in a setting that is allowed to differ.
    """
    kept: dict[str, dict[str, Any]] = {}
    for other in models[1:]:
        apart = language_settings_apart(models[0].described, other.described)
        for name, values in apart.items():
            if name not in allowed:
                listed = ", ".join(f"{key}: {first}" for key in dict.fromkeys([*allowed, *apart]))
                raise UserError(
                    f"{models[0].path} and {other.path} cannot be merged: {name} is {values[0]} in one, "
                    f"{values[1]} in the other; where the {first}'s is meant to count for both, say so with "
                    f"differences: {{{listed}}}"
                )
            kept.setdefault(name, {"kept": values[0], "others": {}})["others"][str(other.path)] = values[1]
    for name in allowed:
        if name not in kept:
            differ = f"they differ in {', '.join(kept)}" if kept else "they differ in no setting"
            raise UserError(f"differences: the models do not differ in {name!r}; {differ}")
    return kept


def note_dequantized(models: Iterable[OpenModel]) -> None:
    """A note for each model whose tensors are not the original ones."""
    for model in models:
        if model.dequantized is not None:
            note = (
                f"{model.path}: its tensors are dequantised from {model.dequantized}, not the original ones"
            )
            warnings.warn(note, UserNote, stacklevel=2)


def inject_by_recipe(recipe: InjectRecipe, trio: Trio) -> tuple[Params, MergeAccount]:
    """The VLM with the expert merged into it as the recipe says, and the account.

    Raises:
      UserError: parameters that are not the same for all tensors, which only a plan can have.
    """
    options: dict[str, Any] = {}
    for name, value in recipe.options().items():
        options[name] = [value[role] for role in ("vlm", "expert")] if isinstance(value, dict) else value
        if any(isinstance(x, tuple) for x in (value.values() if isinstance(value, dict) else [value])):
            raise UserError(f"{name} is not the same for all tensors; only `merge` can do that, no search")
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


def save_merged(
    out: Path,
    recipe: Recipe,
    models: Sequence[OpenModel],
    params: Params,
    account: MergeAccount,
    *,
    overwrite: bool,
) -> MergeAccount:
    """Writes what a recipe made of `models` as the first of them, the account beside it; whole or not at all.

    Returns:
      The account with digests.

    Raises:
      UserError: `out` may not be written (see `check_output`).
    """
    from jaxlab.checkpoints import save_model  # Orbax and Flax come with it

    account = account.with_hashes(params)
    written = {"version": __version__, "recipe": configs.to_dict(recipe), "tensors": account.to_json()}
    if recipe.differences:
        written["differences"] = check_same_architecture(models, recipe.differences)
    save_model(
        out,
        models[0].config,
        params,
        models[0].tokenizer,
        source_files=models[0].source_files,
        extra_files={ACCOUNT: json.dumps(jsonable(written), indent=2, allow_nan=False) + "\n"},
        inputs=[model.path for model in models],
        overwrite=overwrite,
    )
    return account


def verify_merged(out: Path, account: MergeAccount) -> None:
    """Checks that the model on disk is what the account says.

    Raises:
      RuntimeError: it is not.
    """
    wrong = account.differences(open_model(out).read())
    if wrong:
        raise RuntimeError(f"{out}: {len(wrong)} tensors differ from the account: {', '.join(wrong[:3])}")
