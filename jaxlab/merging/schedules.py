"""Where a tensor is in its model, and what a number of a recipe is there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jaxlab.errors import ConfigError, UserError
from jaxlab.merging.numbers import Kind, Rule, Scalar, Setting
from jaxlab.merging.operators.declarations import Parameter

Number = Scalar | tuple[Scalar, ...] | tuple[Rule, ...]
"""A scalar; a gradient over layers; or rules, of which the first that fits a tensor's name decides."""


class Place(NamedTuple):
    """Where a tensor is in its model."""

    name: str
    layer: int | None
    """None outside of layers."""
    layers: int
    """How many there are."""
    before: bool
    """Outside of layers: an embedding or learned positions, not the final norm or the head."""

    @property
    def depth(self) -> Fraction:
        """0 in the first layer and before it, 1 in the last and after it; exact, so that a list with a value
        for each layer gives just these.
        """
        if self.layer is None:
            return Fraction(0 if self.before else 1)
        return Fraction(self.layer, max(1, self.layers - 1))


def value_at(what: str, setting: Setting, place: Place, kind: Kind = "number") -> Any:
    """A number of a recipe for one tensor.

    Args:
      what: its name, for messages.

    Raises:
      UserError: no rule fits the tensor; a gradient with more values than there are layers.
    """
    for rule in setting.rules:
        if isinstance(rule.value, tuple) and not 0 < len(rule.value) <= max(1, place.layers):
            raise UserError(f"{what} lists {len(rule.value)} values for {place.layers} layers")
    found = setting.at(place.name, place.depth, kind)
    if found is None:
        raise UserError(f"no pattern of {what} matches {place.name}; end the list with the pattern '*'")
    return found


def kind_of(parameter: Parameter) -> Kind:
    """What the values of a parameter are."""
    return "switch" if parameter.is_switch else "count" if parameter.is_count else "number"


def check_kind(number: Any, kind: Kind, key: str) -> Setting:
    """A number of a recipe as a setting, every value of it of this kind.

    Raises:
      ConfigError: one is not; `key` leads to it.
    """
    try:
        setting = Setting.of(number)
        for rule in setting.rules:
            for value in rule.value if isinstance(rule.value, tuple) else (rule.value,):
                if isinstance(value, bool) != (kind == "switch"):
                    wanted = "true or false" if kind == "switch" else "a number"
                    raise ConfigError(f"must be {wanted}, is {str(value).lower()}")
            if kind != "number" and isinstance(rule.value, tuple):
                raise ConfigError("has no values between others: one value, or a list of rules")
        setting.check(kind)
    except ConfigError as error:
        raise error.inside((key,)) from None
    return setting


def scalars_of(setting: Setting) -> Iterator[Any]:
    """Every scalar that it is somewhere, but for what lies between two."""
    for rule in setting.rules:
        yield from rule.value if isinstance(rule.value, tuple) else (rule.value,)


def check_rules(
    what: str,
    setting: Setting,
    names: Sequence[str],
    copied: Mapping[str, str],
    others: Mapping[str, Iterable[str]],
    first: str,
) -> None:
    """Whether every rule of a number decides for a tensor that is merged; one for all tensors need not.

    Args:
      what: its name, for messages.
      names: of the tensors that are merged.
      copied: why the other tensors of the input whose names count are not, by name.
      others: the names of the other inputs' tensors, by role.
      first: the role of the input whose names count.

    Raises:
      UserError: one fits none, or those that it fits have an earlier rule.
    """
    deciding = {next((rule for rule in setting.rules if rule.fits(name)), None) for name in names}
    for rule in setting.rules:
        if rule in deciding or (rule.filter in (None, "*") and rule.pattern in (None, "*")):
            continue
        said = f"the pattern {rule.pattern or rule.filter!r} of {what}"
        if any(map(rule.fits, names)):
            raise UserError(
                f"{said} decides nothing: rules before it fit all that it fits; put it before them"
            )
        hint = "" if not names else f"; tensors that are merged are named as {names[0]}"
        own = next(filter(rule.fits, copied), None)
        if own is not None:
            hint = f": {own} is copied ({copied[own]})"
        else:
            for role, known in others.items():
                if names and any(map(rule.fits, known)):
                    hint = f": it has names of the {role}; those of the {first} count, as {names[0]}"
                    break
        raise UserError(f"{said} matches no tensor that is merged{hint}")
