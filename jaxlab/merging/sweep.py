"""Several recipes at once: from several files, or one for each combination of listed values of one."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlab import config as configs
from jaxlab.errors import COMMAND_LINE, ConfigError, UserError
from jaxlab.files import shipped
from jaxlab.merging.recipe import KINDS, Recipe, load_recipe

if TYPE_CHECKING:
    from jaxlab.merging.mergekit.file import MergekitFile


def load_recipes(
    paths: Sequence[str | Path], sweep: Sequence[str] = ()
) -> dict[str, "Recipe | MergekitFile"]:
    """Recipes by the name of the folder that each goes to.

    Args:
      paths: files; each recipe is called as its file.
      sweep: words such as lambda_e=[0.2,0.4], or models.1.weight=[0,1] for something deeper: all combinations
        of one file, each called by its values.

    Raises:
      UserError: a mistake in them, equal names.
    """
    if sweep and len(paths) != 1:
        raise UserError(f"--sweep takes one recipe, not {len(paths)}")
    if not sweep:
        names = [Path(path).stem for path in paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(
                f"two recipes are called {twice}, and folders are called as recipes; rename a file"
            )
        return {name: load_recipe(path) for name, path in zip(names, paths, strict=True)}
    from jaxlab.merging.mergekit.documents import is_mergekit_file

    if is_mergekit_file(shipped(paths[0])):
        raise UserError(
            f"{paths[0]}: --sweep is for recipes with a kind; of mergekit's files write one for each"
        )
    recipes: dict[str, Recipe | MergekitFile] = {}
    for point in _points(sweep):
        source = configs.Source.of_file(paths[0])
        source.tree = copy.deepcopy(source.tree)
        for key, value in point.items():
            _put(source, key, value)
        kind = KINDS.get(str(source.tree.get("kind")))
        if kind is None:
            load_recipe(paths[0])  # says what is wrong
            raise ConfigError("is not one of inject and merge", "kind", COMMAND_LINE)
        recipes[_name(point)] = source.build(kind)
    return recipes


def _points(sweep: Sequence[str]) -> list[dict[str, Any]]:
    axes: dict[str, list[Any]] = {}
    for word in sweep:
        key, equals, text = word.partition("=")
        try:
            values = configs.parse_yaml(text, "")[0] if equals else None
        except ConfigError:
            values = None
        if not isinstance(values, list) or not values:
            raise ConfigError(f"expected key=[a,b], found {word!r}", "sweep", COMMAND_LINE)
        if key in axes:
            raise ConfigError(f"{key} is given twice", "sweep", COMMAND_LINE)
        axes[key] = values
    return [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]


def _put(source: configs.Source, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    place: Any = source.tree
    try:
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        place[int(last) if isinstance(place, list) else last] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise ConfigError(f"the recipe has no {dotted}", "sweep", COMMAND_LINE) from None
    source.origins[tuple(int(part) if part.isdecimal() else part for part in (*parents, last))] = COMMAND_LINE


def _name(point: dict[str, Any]) -> str:
    """A folder's name."""
    text = ",".join(f"{key}={value}" for key, value in point.items())
    return "".join(c if c.isalnum() or c in ".,=-_" else "_" for c in text)
