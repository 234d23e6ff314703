"""Recipes, what a merge file says, and carrying one out: opened models in, a model with its account out."""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenizers import Tokenizer

from jaxlab import __version__
from jaxlab import config as configs
from jaxlab.checkpoints import OpenModel, common_prefix, language_differences, open_model
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.files import jsonable, shipped
from jaxlab.merging.account import MergeAccount
from jaxlab.merging.injection import Method, PatternValue, inject
from jaxlab.merging.merge import merge_models
from jaxlab.merging.operators import operator_named
from jaxlab.merging.operators.registry import REQUIRED
from jaxlab.models import ModelConfig, Params

if TYPE_CHECKING:
    from jaxlab.merging.mergekit.file import MergekitFile

ACCOUNT = "account.json"
"""Beside the model in its folder."""


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
    """Its name in docs/merge_operators.md."""
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
        self.method().check_one_model()

    def method(self) -> Method:
        """The operator with its parameters.

        Raises:
          ConfigError: a mistake in it, with its place and the remedy.
        """
        return Method.of(self.operator, self.mode, **self.options())

    def options(self) -> dict[str, Any]:
        """The operator's parameters."""
        return {"density": self.density, "rescale": self.rescale}

    def references(self) -> list[str]:
        """The models that it names: VLM, expert and base."""
        return [self.vlm, self.expert, self.base]


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
    """Its name in docs/merge_operators.md."""
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
        try:
            operator = operator_named(self.operator, "operator")
        except UserError as error:
            raise ConfigError(str(error), key="operator") from None
        if operator.per_task:
            raise ConfigError(f"{self.operator} makes a model for each task, not one", key="operator")
        if operator.base == ("required" if self.base is None else "unused"):
            raise ConfigError(
                f"{self.operator} {'needs a' if self.base is None else 'takes no'} base", key="base"
            )
        given = self._options()
        for key in given:
            if key not in operator.parameters:
                raise ConfigError(f"{self.operator} has none", key=key)
        for key, parameter in operator.parameters.items():
            if key not in given and parameter.default is REQUIRED:
                raise ConfigError(f"{self.operator} needs it", key=key)
            if key in given and (problem := parameter.problem(given[key])):
                raise ConfigError(problem, key=key)

    def _options(self) -> dict[str, Any]:
        thin = any(model.density != 1.0 for model in self.models)
        options = {
            "lambda": self.lambda_,
            "t": self.t,
            "normalize": self.normalize,
            "rescale": self.rescale,
            "density": [model.density for model in self.models] if thin else None,
        }
        return {key: value for key, value in options.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """The parameters of `merge_tensors`."""
        weights = {"weight": [model.weight for model in self.models]}
        return (weights if operator_named(self.operator).takes("weights") else {}) | self._options()

    def references(self) -> list[str]:
        """The models that it names, the base last."""
        return [*(model.model for model in self.models), *([] if self.base is None else [self.base])]


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
    common_rows: int | None
    """How many ids, from 0 on, mean the same token to all three; None: all, since they read bytes."""
    expert_config: ModelConfig
    base_config: ModelConfig


def read_trio(vlm: OpenModel, expert: OpenModel, base: OpenModel) -> Trio:
    """Reads the three.

    Raises:
      UserError: one is damaged or their language models differ in kind.
    """
    check_same_architecture([vlm, expert, base])
    return Trio(
        config=vlm.config,
        tokenizer=vlm.tokenizer,
        vlm=vlm.read(),
        expert=expert.read(),
        base=base.read(),
        common_rows=common_prefix([vlm.tokenizer, expert.tokenizer, base.tokenizer]),
        expert_config=expert.config,
        base_config=base.config,
    )


def check_same_architecture(models: Sequence[OpenModel]) -> None:
    """Checks that parameters of the language models mean the same functions.

    Raises:
      UserError: they do not.
    """
    first, *others = models
    for other in others:
        for field in language_differences(first.described, other.described):
            values = getattr(first.described, field), getattr(other.described, field)
            if dataclasses.is_dataclass(values[0]):  # a group: the first of its fields that differs
                inner = [f.name for f in dataclasses.fields(values[0])]
                differs = next(f for f in inner if getattr(values[0], f) != getattr(values[1], f))
                field, values = f"{field}.{differs}", tuple(getattr(value, differs) for value in values)
            raise UserError(
                f"{first.path} and {other.path} cannot be merged: "
                f"{field} is {values[0]} in one, {values[1]} in the other"
            )


def note_dequantized(models: Iterable[OpenModel]) -> None:
    """A note for each model whose tensors are not the original ones."""
    for model in models:
        if model.dequantized is not None:
            note = (
                f"{model.path}: its tensors are dequantised from {model.dequantized}, not the original ones"
            )
            warnings.warn(note, UserNote, stacklevel=2)


def inject_by_recipe(recipe: InjectRecipe, trio: Trio) -> tuple[Params, MergeAccount]:
    """The VLM with the expert merged into it as the recipe says, and the account."""
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
        **recipe.options(),
    )


def merge_by_recipe(recipe: Recipe, models: Sequence[OpenModel]) -> tuple[Params, MergeAccount]:
    """What a recipe makes of its models, opened in the order of `recipe.references()`, and the account.

    Raises:
      UserError: models that are damaged or cannot be merged.
    """
    if isinstance(recipe, InjectRecipe):
        return inject_by_recipe(recipe, read_trio(*models))
    check_same_architecture(models)
    *read, last = (model.read() for model in models)
    return merge_models(
        recipe.operator,
        [*read, last] if recipe.base is None else read,
        base=None if recipe.base is None else last,
        mode=recipe.mode,
        seed=recipe.seed,
        family=models[0].config.family,
        **recipe.options(),
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
