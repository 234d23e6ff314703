"""What a recipe says of an operator's parameters, checked against the operator's declaration."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxlab.config import suggestion, to_plain, yaml_line
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.merging.numerics import Mode
from jaxlab.merging.operators import OPERATORS, Operator, operator_named
from jaxlab.merging.operators.declarations import REQUIRED, Parameter
from jaxlab.merging.schedules import check_kind, kind_of, scalars_of

FIXED_BY_INJECTION = {"lambda": 1.0, "normalize": False}
"""Parameters of operators that an injection does not leave open."""
_FOR_MERGEKIT = ("int8_mask",)
"""Keys of mergekit that say how, not what."""


def named_operator(name: str, *, injected: bool) -> Operator:
    """The operator that a recipe names.

    Raises:
      ConfigError: there is none, or none that can be injected.
    """
    try:
        known = operator_named(name, "operator")
        return known.for_injection if injected else known
    except UserError as error:
        raise ConfigError(str(error), key="operator") from None


def open_parameters(operator: Operator, *, injected: bool) -> dict[str, Parameter]:
    """Those that a recipe may give, beside weights."""
    closed: Collection[str] = FIXED_BY_INJECTION if injected else ()
    return {name: p for name, p in operator.parameters.items() if name not in closed}


def used_of_recipe(
    operator: Operator,
    mode: Mode,
    given: Mapping[str, Any],
    models: Sequence[str],
    *,
    injected: bool,
    fields: Collection[str] = (),
) -> dict[str, Any]:
    """The parameters that the operator uses, of those given; in mode mergekit others are left out with a
    note.

    Args:
      given: by name: a number of a recipe, or of parameters with a value for each model {model: number}.
      models: what the models, without the base, are called there.
      injected: as an injection uses it.
      fields: the recipe's other keys, for hints.

    Raises:
      ConfigError: one that the operator does not use, that is missing or cannot have this value.
    """
    known = open_parameters(operator, injected=injected)
    used = {}
    for name, value in given.items():
        if name in known:
            check_parameter(operator, known[name], value, models)
            used[name] = value
        else:
            _refuse(operator, mode, name, known, injected=injected, fields=fields)
    for name, parameter in known.items():
        if name in used:
            continue
        if parameter.default_in(mode) is REQUIRED or (injected and parameter.asked):
            each = f": one value, or one for each of {', '.join(models)}" if parameter.per_model else ""
            raise ConfigError(f"{operator.name} needs it{each}", key=name)
    return used


def _refuse(
    operator: Operator,
    mode: Mode,
    name: str,
    known: Mapping[str, Parameter],
    *,
    injected: bool,
    fields: Collection[str],
    place: str = "",
) -> None:
    key = place + name
    if injected and name == "weight":
        own = "an expert's weight is its lambda" if place else "the weights are lambda_v and lambda_e"
        raise ConfigError(f"an injection has no such key; {own}", key=key)
    if injected and name in FIXED_BY_INJECTION and name in operator.parameters:
        fixed = FIXED_BY_INJECTION[name]
        raise ConfigError(
            f"an injection has it fixed at {str(fixed).lower()}; its weights are lambda_v and lambda_e",
            key=key,
        )
    if injected and name not in operator.parameters and name in operator_named(operator.name).parameters:
        formula = operator.injected_formula
        raise ConfigError(f"an injection has it from lambda_v and lambda_e; give these: {formula}", key=key)
    somewhere = name in _FOR_MERGEKIT or any(name in other.parameters for other in OPERATORS.values())
    if not somewhere and name != "weight":
        hint = suggestion(name, [*fields, *known])
        raise ConfigError("unknown key" + (hint or f"; {_takes(operator, known)}"), key=key)
    if mode == "paper":
        raise ConfigError(f"{operator.name} does not use it; {_takes(operator, known)}", key=key)
    if name not in _FOR_MERGEKIT:
        warnings.warn(f"{operator.name} does not use {name}", UserNote, stacklevel=2)


def _takes(operator: Operator, known: Mapping[str, Parameter]) -> str:
    if known:
        return f"{operator.name} takes {', '.join(known)}"
    fixed = [name for name in operator.parameters if name in FIXED_BY_INJECTION]
    return f"{operator.name} takes no parameters" + (f" ({' and '.join(fixed)} fixed)" if fixed else "")


def described_operator(operator: Operator, mode: Mode, used: Mapping[str, Any], *, injected: bool) -> str:
    """The operator with all its parameters, those that the recipe does not give too, on a line."""
    fixed = FIXED_BY_INJECTION if injected else {}
    said = []
    for name, parameter in operator.parameters.items():
        value = fixed[name] if name in fixed else used.get(name, parameter.default_in(mode))
        origin = " (fixed)" if name in fixed else "" if name in used else " (default)"
        said.append(f"{name} {yaml_line(to_plain(value))}{origin}")
    return f"{operator.name}: {', '.join(said)}" if said else operator.name


def check_task(operator: Operator, task: str | None, models: Sequence[str]) -> None:
    """Whether a recipe names a task where there are several, and only there.

    Raises:
      ConfigError: it does not.
    """
    if not operator.per_task and task is not None:
        raise ConfigError(f"{operator.name} makes one model for all tasks", key="task")
    if operator.per_task and task not in models:
        found = "missing" if task is None else f"no task {task!r}"
        listed = ", ".join(models)
        raise ConfigError(
            f"{found}; {operator.name} makes a model for each task: one of {listed} (all of them: "
            f"--sweep 'task=[{listed}]')",
            key="task",
        )


def check_statistics(operator: Operator, data: Any, statistics: str | None) -> None:
    """Whether a recipe says where the statistics of its operator come from, if it takes any.

    Raises:
      ConfigError: it does not, or does without need.
    """
    given = [key for key, value in (("data", data), ("statistics", statistics)) if value is not None]
    if len(given) == 2:
        raise ConfigError("data is given too; one of them is enough", key="statistics")
    if given and not operator.takes("statistics"):
        raise ConfigError(f"{operator.name} takes no statistics of data", key=given[0])
    if not given and operator.needs_statistics:
        raise ConfigError(
            f"missing; {operator.name} takes statistics of data: a group data: {{text: file}}, or "
            "statistics: a file that such a group saved",
            key="data",
        )


def refuse_weight(operator: Operator, mode: Mode, key: str) -> None:
    """Refuses a weight for an operator that has none; in mode mergekit it is a note.

    Raises:
      ConfigError: in mode paper.
    """
    if mode == "paper":
        raise ConfigError(f"{operator.name} has no weights; {_takes(operator, operator.parameters)}", key=key)
    warnings.warn(f"{operator.name} does not use weight", UserNote, stacklevel=2)


def given_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are null."""
    return {name: value for name, value in parameters.items() if value is not None}


def with_own_values(
    operator: Operator,
    common: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    place: str,
    before: int = 0,
    *,
    mode: Mode,
    injected: bool,
    fields: Collection[str] = (),
) -> dict[str, Any]:
    """Parameters of a recipe together with those that stand at single models, as {model: number}.

    Args:
      own: of each model.
      models: what they are called.
      place: the key of their list, for messages.
      before: how many models stand elsewhere, before that list.
      mode, injected, fields: see `used_of_recipe`; `fields` of what the list holds.

    Raises:
      ConfigError: one that the operator does not use or that is for all models alike, or that some models
        lack and has no default.
    """
    known_here = open_parameters(operator, injected=injected)
    merged, unused = dict(common), set()
    for i, values in enumerate(own):
        for name in values:
            if name not in known_here:
                at = f"{place}.{i - before}."
                _refuse(operator, mode, name, known_here, injected=injected, fields=fields, place=at)
                unused.add(name)
            elif not known_here[name].per_model:
                raise ConfigError(
                    "is one for all models; it belongs beside operator", f"{place}.{i - before}.{name}"
                )
    own = [{name: value for name, value in values.items() if name not in unused} for values in own]
    for name in dict.fromkeys(name for values in own for name in values):
        others = merged.get(name)
        known = operator.parameters.get(name)
        each = {}
        for model, values in zip(models, own, strict=True):
            default = others[model] if isinstance(others, Mapping) and model in others else others
            if default is None and known is not None:
                default = known.default
            each[model] = values.get(name, default)
            if each[model] is REQUIRED:
                raise ConfigError(f"missing for {model}", key=name)
        merged[name] = each
    return merged


def check_parameter(operator: Operator, parameter: Parameter, value: Any, models: Sequence[str]) -> None:
    """Whether every value that a parameter may have somewhere is of its kind and within its bounds.

    Raises:
      ConfigError: one is not.
    """
    name = parameter.name
    if isinstance(value, Mapping):
        if not parameter.per_model:
            raise ConfigError("is one for all models", key=name)
        for model, own in value.items():
            if model not in models:
                raise ConfigError(f"no model {model!r}; there are {', '.join(models)}", key=name)
            check_parameter(operator, parameter, own, models)
        if missing := [model for model in models if model not in value]:
            raise ConfigError(f"missing for {missing[0]}", key=name)
        return
    if operator.gather is not None and isinstance(value, list | tuple):
        raise ConfigError(f"{operator.name} sees all tensors at once: one number, the same for all", key=name)
    for scalar in scalars_of(check_kind(value, kind_of(parameter), name)):
        if problem := parameter.problem(scalar):
            raise ConfigError(problem, key=name)
