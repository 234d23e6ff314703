"""The families of checkpoints, by the name that `ModelConfig.family` holds.

"llama" is a family; "llava+qwen2" a vision-language family around a language model of another one; "gpt2/hub"
a family under other names; "mllama+llama@3,8" one whose layers 3 and 8 are not the language model's.
docs/families.md tells how to add one.
"""

import dataclasses
import functools
import importlib
import pkgutil
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxlab.checkpoints.families import jaxlab as own
from jaxlab.checkpoints.families.base import Family, Json, interleaved, renamed
from jaxlab.checkpoints.families.language import layer_types
from jaxlab.checkpoints.families.settings import IGNORED_KEYS, reading
from jaxlab.checkpoints.families.table import MODULES
from jaxlab.checkpoints.tensor_table import HEAD, Rows
from jaxlab.errors import UserError, UserNote
from jaxlab.models import ModelConfig

if TYPE_CHECKING:
    from jaxlab.processing import ProcessorKind

__all__ = [
    "IGNORED_KEYS",
    "Family",
    "all_families",
    "declared",
    "find",
    "find_by_model_type",
    "head_name",
    "ignored",
    "image_word",
    "layer_types",
    "names_of",
    "processor_kinds",
    "read_config",
    "recorded",
    "rows_of",
    "with_image_token",
]


_COMMON = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
"""Of the families that can describe a model of our own these are the first choice: most tools read them."""


@functools.cache
def all_families() -> dict[str, Family]:
    """Every family, by name: each module of this package that has a FAMILY or FAMILIES; common ones first."""
    found = {
        name: f for module in pkgutil.iter_modules(__path__) for name, f in declared(module.name).items()
    }
    return {name: found[name] for name in (*_COMMON, *found)}


def declared(module: str) -> dict[str, Family]:
    """The families of a module of this package, by name."""
    loaded = importlib.import_module(f"{__name__}.{module}")
    families = getattr(loaded, "FAMILIES", ()) or filter(None, [getattr(loaded, "FAMILY", None)])
    return {family.name: family for family in families}


_MODULE_OF = {name: module for module, families in MODULES.items() for name in families}
_NAME_OF = {kind: name for families in MODULES.values() for name, kinds in families.items() for kind in kinds}


def find(name: str) -> Family:
    """The family that a name begins with.

    Raises:
      UserError: there is none.
    """
    first = name.partition("/")[0].partition("+")[0]
    if first in _MODULE_OF:
        return declared(_MODULE_OF[first])[first]
    if first not in all_families():
        raise UserError(f"no family of checkpoints {first!r}; there are {', '.join(sorted(all_families()))}")
    return all_families()[first]


def find_by_model_type(model_type: str) -> Family:
    """The family whose config.json says `model_type`.

    Raises:
      UserError: there is none; the line lists what is supported.
    """
    if model_type in _NAME_OF:
        return find(_NAME_OF[model_type])
    by_type = {kind: family for family in all_families().values() for kind in family.model_types}
    if model_type not in by_type:
        raise UserError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(by_type))}"
        )
    return by_type[model_type]


def read_config(config: Json, where: object, *, ignore_keys: Iterable[str] = ()) -> ModelConfig:
    """The model that a config.json describes. Keys that it holds and that are not applied are warned of.

    Args:
      ignore_keys: keys to leave out although nobody knows them, besides those under IGNORED_KEYS.

    Raises:
      UserError: something in it is wrong, or not known; or one of `ignore_keys` is not there, or is read.
    """
    asked = tuple(ignore_keys)
    with reading((*asked, *recorded(config))) as now:
        found = _read(config, where)
    idle = [key for key in asked if key not in now.ignored]
    if idle:
        raise UserError(f"{where}: --ignore-keys {idle[0]}: config.json lacks it, or {found.family} reads it")
    paths = sorted(now.ignored.values())
    ignored = [f"config.json: {', '.join(paths)} ignored, as you asked"] if paths else []
    for note in (*now.notes, *ignored):
        warnings.warn(f"{where}: {note}", UserNote, stacklevel=2)
    return found


def recorded(config: Json) -> tuple[str, ...]:
    """The keys that were ignored when this config.json was written."""
    found = config.get(IGNORED_KEYS, [])
    if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
        raise UserError(f"config.json: {IGNORED_KEYS} must be a list of keys")
    return tuple(found)


def _read(config: Json, where: object) -> ModelConfig:
    kind = config.get("model_type")
    try:
        if not isinstance(kind, str):
            raise UserError("config.json: model_type is missing")
        return find_by_model_type(kind).read_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: config.json cannot be understood ({problem[:200]})") from error


def processor_kinds(name: str) -> "tuple[ProcessorKind, ...]":
    """The processor of a family by its whole name, and after it those of the others.

    Raises:
      UserError: the family has none.
    """
    family = find(name)
    if family.processor is None:
        known = ", ".join(sorted(f.name for f in all_families().values() if f.processor is not None))
        raise UserError(f"the family {family.name} has no processor of images; those with one: {known}")
    others = (f.processor for f in all_families().values() if f.processor is not None and f is not family)
    return (family.processor(), *(make() for make in others))


def image_word(config: ModelConfig, told: Json) -> str | None:
    """What the placeholder of a model is called, where its config.json does not tell the id; else None."""
    return None if "image_token_id" in told else find(config.family).image_word


def with_image_token(config: ModelConfig, token: int) -> ModelConfig:
    """The model with another placeholder.

    Raises:
      UserError: the token is beyond its embedding.
    """
    vision = None if config.vision is None else dataclasses.replace(config.vision, image_token=token)
    return dataclasses.replace(config, vision=vision)


def names_of(name: str) -> tuple[str, ...]:
    """A family under each of its variants, its own names first; a name that tells the variant stays alone."""
    family = find(name)
    if "/" in name:
        return (name,)
    return (name, *(f"{name}/{word}" for word in (*family.variants, *family.layouts)))


def head_name(name: str) -> str | None:
    """What the head is called, if the family has one."""
    return next((row.name for row in rows_of(name) if row.paths == (".".join(HEAD),)), None)


@functools.cache
def ignored(name: str) -> re.Pattern[str]:
    """What matches the names of tensors that are no parameters, of the family and of the text's inside it."""
    text = name.partition("/")[0].partition("@")[0].partition("+")[2]
    rules = find(name).ignored + (find(text).ignored if text else ())
    return re.compile("|".join(f"(?:{rule})" for rule in rules) or r"(?!)")


@functools.cache
def rows_of(name: str) -> Rows:
    """The rows of a family by its whole name.

    Raises:
      UserError: the family or variant is not known.
    """
    if name == "jaxlab":
        return own.ROWS
    whole, _, variant = name.partition("/")
    whole, _, numbers = whole.partition("@")
    text = whole.partition("+")[2]
    family = find(name)
    own_rows = family.layouts.get(variant, family.rows)
    own_paths = {path for row in own_rows for path in row.paths}  # these stand before the text model's
    text_rows = renamed(find(text).rows, family.text_renames) if text else ()
    rows = own_rows + tuple(row for row in text_rows if own_paths.isdisjoint(row.paths))
    if numbers:
        rows = interleaved(rows, tuple(int(number) for number in numbers.split(",")))
    if not variant or variant in family.layouts:
        return rows
    if variant not in family.variants:
        known = ", ".join((*family.variants, *family.layouts)) or "none"
        raise UserError(f"the family {family.name} has no variant {variant!r}; there are: {known}")
    return renamed(rows, family.variants[variant])
