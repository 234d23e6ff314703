"""Numbers of a recipe that are not the same for every tensor: gradients over layers, and rules by name.

A number is a scalar; a gradient, a list of anchors at equal distances from the first layer to the last, with
straight lines between them; or a list of rules, of which the first that fits a tensor's name decides, its
value again a scalar or a gradient.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxlab.errors import ConfigError, UserError

Scalar = bool | int | float


@dataclass(frozen=True, kw_only=True)
class PatternValue:
    """A value for the tensors whose name fits; without pattern and filter for all."""

    pattern: str | None = None
    """Of whole names in a Hugging Face checkpoint, with * and ?, for example "*.mlp.*"."""
    filter: str | None = None
    """Instead of a pattern: a part of such names, as mergekit has it."""
    value: Scalar | tuple[float, ...]
    """The value: a number, or a list over layers."""

    def __post_init__(self) -> None:
        if self.pattern is not None and self.filter is not None:
            raise ConfigError("a rule has a pattern or a filter, not both", key="filter")

    @property
    def condition(self) -> str:
        """The pattern or filter; "*" for neither."""
        return self.pattern or self.filter or "*"

    def fits(self, name: str) -> bool:
        """Whether it is for the tensor of this name."""
        if self.filter is not None and self.filter != "*":
            return self.filter in name
        return self.pattern is None or fnmatch.fnmatchcase(name, self.pattern)


Number = Scalar | tuple[float, ...] | tuple[PatternValue, ...]


class Place(NamedTuple):
    """Where a tensor is in its model."""

    name: str
    layer: int | None
    """None outside of layers."""
    layers: int
    """How many there are."""
    before: bool
    """Outside of layers: an embedding or learned positions, not the final norm or the head."""


def value_at(what: str, number: Any, place: Place) -> Any:
    """The scalar that a number is for one tensor; what is no list, a traced scalar too, is itself.

    Args:
      what: its name, for messages.

    Raises:
      UserError: no rule fits the tensor; a gradient with more anchors than there are layers.
    """
    if not isinstance(number, list | tuple):
        return number
    rules = rules_of(number)
    if not rules:
        return _on_gradient(what, number, place)
    for rule in rules:
        if rule.fits(place.name):
            return value_at(what, rule.value, place)
    raise UserError(f"no pattern of {what} matches {place.name}; end the list with the pattern '*'")


def _on_gradient(what: str, anchors: Sequence[float], place: Place) -> float:
    count = len(anchors)
    if count > max(1, place.layers) or not count:
        raise UserError(f"{what} lists {count} values for {place.layers} layers")
    if place.layer is None:
        return anchors[0 if place.before else -1]
    at, rest = divmod(place.layer * (count - 1), max(1, place.layers - 1))
    if rest == 0:  # exactly on an anchor
        return anchors[at]
    share = rest / (place.layers - 1)
    return (1 - share) * anchors[at] + share * anchors[at + 1]


def rules_of(number: Any) -> list[PatternValue]:
    """The rules of a number; none if it has none."""
    if not isinstance(number, list | tuple):
        return []
    made = [rule if isinstance(rule, PatternValue) else _rule(rule) for rule in number if _is_rule(rule)]
    if made and len(made) < len(number):
        raise UserError(f"a list of numbers, or of rules {{pattern, value}}, not both: {list(number)}")
    return made


def _is_rule(value: Any) -> bool:
    return isinstance(value, PatternValue | Mapping)


def _rule(given: Mapping[str, Any]) -> PatternValue:
    value = given["value"]
    return PatternValue(
        pattern=given.get("pattern"),
        filter=given.get("filter"),
        value=tuple(value) if isinstance(value, list | tuple) else value,
    )


def scalars_of(number: Any) -> Iterator[Any]:
    """Every scalar that a number may be somewhere, but for what lies between anchors."""
    if not isinstance(number, list | tuple):
        yield number
        return
    for item in number:
        yield from scalars_of(rules_of([item])[0].value if _is_rule(item) else item)


def check_rules(
    what: str, number: Any, names: Sequence[str], others: Mapping[str, Iterable[str]], first: str
) -> None:
    """Whether every rule of a number fits a tensor that is merged.

    Args:
      what: its name, for messages.
      names: of the tensors that are merged.
      others: the names of the other inputs' tensors, by role.
      first: the role of the input whose names count.

    Raises:
      UserError: one fits none.
    """
    for rule in rules_of(number):
        if any(map(rule.fits, names)):
            continue
        hint = "" if not names else f"; tensors that are merged are named as {names[0]}"
        for role, known in others.items():
            if names and any(map(rule.fits, known)):
                hint = f": it has names of the {role}; those of the {first} count, as {names[0]}"
                break
        raise UserError(f"the pattern {rule.condition!r} of {what} matches no tensor that is merged{hint}")
