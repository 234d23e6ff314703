"""From a recipe to a plan of its models: all that is decided before anything is read or written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxlab import config as configs
from jaxlab.checkpoints import OpenModel, same_tokens
from jaxlab.errors import UserError
from jaxlab.files import named, output_path
from jaxlab.merging.architecture import check_same_architecture, check_vision
from jaxlab.merging.merge_data import read_texts
from jaxlab.merging.operators import operator_named
from jaxlab.merging.plan import Input, MergePlan, open_inputs
from jaxlab.merging.planning import plan_injection_of, plan_merge_of
from jaxlab.merging.recipe import InjectRecipe, MergeRecipe, Recipe

if TYPE_CHECKING:
    from jaxlab.checkpoints import Planned
    from jaxlab.merging.mergekit.file import MergekitFile


@dataclass(frozen=True)
class Beside:
    """What is written beside the tensors."""

    config: Mapping[str, Any]
    """config.json."""
    copy_from: Path | None
    """A folder whose tokenizer and processor files are copied."""
    texts: Mapping[str, str]
    """Files by name, also in place of copied ones."""
    without: frozenset[str] = frozenset()
    """Files that are not copied."""


@dataclass(frozen=True)
class Prepared:
    """A recipe with its inputs opened and everything decided; nothing but headers has been read."""

    recipe: "Recipe | MergekitFile"
    inputs: tuple[Input, ...]
    plan: MergePlan
    shards: "list[list[Planned]]"
    beside: Beside | None = None
    """None: what stands beside the first input."""
    stages: tuple[Mapping[str, Any], ...] = ()
    """What made the inputs that are stages of the same file, for the account."""
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings in which the models differ, with the one that is kept, and the others' by path."""

    @property
    def recipe_text(self) -> str:
        """As it is kept: a file of mergekit as it was."""
        recipe = self.recipe
        return configs.dump(recipe) if isinstance(recipe, InjectRecipe | MergeRecipe) else recipe.text

    @property
    def recipe_tree(self) -> Any:
        """As plain values."""
        recipe = self.recipe
        return configs.to_dict(recipe) if isinstance(recipe, InjectRecipe | MergeRecipe) else recipe.tree


def prepare_merge(
    recipe: Recipe, models: Sequence[OpenModel], *, to: Literal["hf", "orbax"] = "hf"
) -> Prepared:
    """Opens the tensors of the models, in the order of `recipe.references()`, and plans the merge.

    Args:
      to: whose names the tensors of a model of ours get.

    Raises:
      UserError: models that cannot be merged as the recipe says, or whose tensors are not their family's.
    """
    from jaxlab.merging.layout import layout
    from jaxlab.merging.programs import check_operators

    first = "vlm" if isinstance(recipe, InjectRecipe) else "first"
    differences = check_same_architecture(models, recipe.differences, first)
    tokens = None
    if recipe.embeddings == "merge_common_rows":
        tokens = same_tokens([model.tokenizer for model in models])
        _check_tokenizers(models, recipe.roles())
    inputs = open_inputs(models, recipe.roles(), own_names=to == "orbax")
    check_vision(inputs[0])
    if isinstance(recipe, InjectRecipe):
        plan = plan_injection_of(
            inputs,
            operator=recipe.operator,
            mode=recipe.mode,
            parameters=recipe.options(),
            lambdas=recipe.lambdas(),
            embeddings=recipe.embeddings,
            tokens=tokens,
            task=recipe.task,
            seed=recipe.seed,
        )
    else:
        plan = plan_merge_of(
            inputs,
            operator=recipe.operator,
            mode=recipe.mode,
            parameters=recipe.options(),
            weights=recipe.weights(),
            with_base=recipe.base is not None,
            embeddings=recipe.embeddings,
            tokens=tokens,
            task=recipe.task,
            seed=recipe.seed,
        )
    if not operator_named(recipe.operator).needs_statistics:  # the others once they are measured
        check_operators(plan)
    if recipe.statistics is not None:
        from jaxlab.merging.statistics_file import check_statistics_file

        check_statistics_file(named(recipe.statistics), recipe.operator, inputs, plan)
    if recipe.data is not None:
        for role in recipe.models_with_tasks():
            read_texts(recipe.data.file_of(role), 1)
    return Prepared(recipe, tuple(inputs), plan, layout(plan, inputs), differences=differences)


def prepared_statistics(prepared: Prepared) -> Mapping[str, Any] | None:
    """What the recipe's operator takes of data, measured or read; None: nothing.

    Raises:
      UserError: data, or a file, that cannot be read or does not fit.
    """
    recipe = prepared.recipe
    if not isinstance(recipe, InjectRecipe | MergeRecipe) or recipe.data is recipe.statistics is None:
        return None
    from jaxlab.merging.measuring import measure_statistics
    from jaxlab.merging.programs import check_operators
    from jaxlab.merging.statistics_file import check_new, load_statistics, save_statistics

    if recipe.data is None:
        assert recipe.statistics is not None
        found: Mapping[str, Any] = load_statistics(
            named(recipe.statistics), recipe.operator, prepared.inputs, prepared.plan
        )
    else:
        if recipe.data.save is not None:
            check_new(output_path(recipe.data.save))
        found = measure_statistics(recipe, prepared.plan, prepared.inputs, recipe.data)
        if recipe.data.save is not None:
            path = output_path(recipe.data.save)
            save_statistics(path, recipe.operator, prepared.inputs, prepared.plan, found)
    check_operators(prepared.plan, found)
    return found


def _check_tokenizers(models: Sequence[OpenModel], roles: Sequence[str]) -> None:
    """Whether tokens can be matched: all models have a tokenizer, or all read bytes.

    Raises:
      UserError: they cannot.
    """
    without = [role for role, model in zip(roles, models, strict=True) if model.tokenizer is None]
    if without and len(without) < len(models):
        raise UserError(
            f"embeddings: merge_common_rows matches tokens, but the {without[0]} has no tokenizer; "
            "embeddings: merge takes rows by their number"
        )
