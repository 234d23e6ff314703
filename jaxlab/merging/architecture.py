"""Whether language models are of one architecture, and what a recipe says where they are not."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from jaxlab.checkpoints import OpenModel, decides_tensors, language_settings_apart
from jaxlab.errors import UserError, UserNote
from jaxlab.merging.plan import Input


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
    apart = [language_settings_apart(models[0].described, other.described) for other in models[1:]]
    every = dict.fromkeys(name for settings in apart for name in settings)
    if not every.keys() <= set(allowed):
        _refuse(models, apart, allowed, first)
    for other, settings in zip(models[1:], apart, strict=True):
        for name, values in settings.items():
            kept.setdefault(name, {"kept": values[0], "others": {}})["others"][str(other.path)] = values[1]
    for name in allowed:
        if name not in kept:
            differ = f"they differ in {', '.join(kept)}" if kept else "they differ in no setting"
            raise UserError(f"differences: the models do not differ in {name!r}; {differ}")
    return kept


def _refuse(
    models: Sequence[OpenModel],
    apart: Sequence[Mapping[str, tuple[Any, Any]]],
    allowed: Collection[str],
    first: str,
) -> NoReturn:
    """Names a setting in which models differ: one that nothing can waive, if there is one."""
    found = [
        (other, *item) for other, settings in zip(models[1:], apart, strict=True) for item in settings.items()
    ]
    one = models[0].described
    fixed = [line for line in found if decides_tensors(line[1], one, line[0].described)]
    other, name, values = next(iter(fixed), None) or next(line for line in found if line[1] not in allowed)
    told = (
        f"{models[0].path} and {other.path} cannot be merged: {name} is {values[0]} in one, {values[1]} in "
        "the other"
    )
    if fixed:
        raise UserError(f"{told}: their tensors do not fit; merge models of one architecture and size")
    listed = ", ".join(f"{key}: {first}" for key in dict.fromkeys(line[1] for line in found))
    unknown = [key for key in allowed if key not in {line[1] for line in found}]
    without = f" (without {', '.join(map(repr, unknown))}, in which they do not differ)" if unknown else ""
    raise UserError(
        f"{told}; where the {first}'s is meant to count for both, say so with "
        f"differences: {{{listed}}}{without}"
    )


def check_vision(first: Input) -> None:
    """Whether the tensors of a vision tower have the sizes that the model's config says; from headers.

    Raises:
      UserError: one has not.
    """
    vision = first.model.described.vision
    if vision is None:
        return
    told = {"d": vision.width, "f": vision.mlp_width, "c": vision.channels}
    told |= {"y": vision.patch_size, "x": vision.patch_size}
    for kind in first.found.kinds:
        if kind.path[0] != "vision":
            continue
        for name in kind.names:
            shape = first[name].shape
            wrong = {a: n for a, n in kind.sizes(shape).items() if told.get(a, n) != n}
            if wrong:
                axis, size = next(iter(wrong.items()))
                raise UserError(
                    f"{first.model.path}: {name} is {list(shape)}: {size} where the config of the vision "
                    f"tower says {told[axis]}"
                )


def note_dequantized(models: Iterable[OpenModel]) -> None:
    """A note for each model whose tensors are not the original ones."""
    for model in models:
        if model.dequantized is not None:
            note = (
                f"{model.path}: its tensors are dequantised from {model.dequantized}, not the original ones"
            )
            warnings.warn(note, UserNote, stacklevel=2)
