"""The operator of an injection with its parameters: what is compiled for, and what is traced."""

import dataclasses
from typing import Any

import numpy as np

from jaxlab.errors import ConfigError, UserError
from jaxlab.merging.numerics import Mode, Share
from jaxlab.merging.operators import Operator, operator_named
from jaxlab.merging.operators.declarations import REQUIRED
from jaxlab.merging.parameters import FIXED_BY_INJECTION

Numbers = dict[str, Any]
"""Parameters of an operator that are traced: a scalar, or a `Share` for each of the two task vectors."""


@dataclasses.dataclass(frozen=True)
class Method:
    """An operator with its parameters, all but the lambdas; hashable. Made by `Method.of`."""

    operator: str
    mode: Mode
    parameters: tuple[tuple[str, Any], ...]
    models: int = 2
    """How many task vectors there are: the VLM's and the experts'."""

    @classmethod
    def of(cls, operator: str, mode: Mode = "paper", **parameters: Any) -> "Method":
        """Parameters by name; None is as good as absent, a list has one value for each task vector.

        Raises:
          ConfigError: no such operator; a parameter that it does not have, or must be told, or of a value
            that it cannot have.
        """
        try:
            known = operator_named(operator, "operator").for_injection.parameters
        except UserError as error:
            raise ConfigError(str(error), key="operator") from None
        given = {name: value for name, value in parameters.items() if value is not None}
        for name in given:
            if name not in known or name in FIXED_BY_INJECTION:
                raise ConfigError(f"{operator} has none", key=name)
        for name, parameter in known.items():
            if parameter.asked and name not in given:
                raise ConfigError(
                    f"{operator} needs it: one value, or one for the VLM and one for the expert", key=name
                )
            value = given.get(name)
            if isinstance(value, list | tuple):
                given[name] = value = tuple(value)
                if len(value) not in (1, 2):
                    raise ConfigError(
                        f"one value, or one for the VLM and one for the expert, not {len(value)}", key=name
                    )
            if name in given and (problem := parameter.problem(value)):
                raise ConfigError(problem, key=name)
            if (
                name not in given
                and name not in FIXED_BY_INJECTION
                and parameter.default_in(mode) is REQUIRED
            ):
                raise ConfigError(f"{operator} needs it", key=name)
        return cls(operator, mode, tuple(sorted(given.items())))

    def replace(self, **parameters: Any) -> "Method":
        """The same with other values of parameters; None leaves one as it is."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return Method.of(self.operator, self.mode, **{**dict(self.parameters), **given})

    def check_one_model(self) -> None:
        """Refuses operators that make a model for each task.

        Raises:
          ConfigError: this is one.
        """
        if self.of_injection.per_task:
            raise ConfigError(f"{self.operator} makes a model for each task, not one", key="operator")

    @property
    def switches(self) -> "Method":
        """What a compiled program depends on: the method without its numbers, which are traced."""
        known = self.of_injection.parameters
        kept = tuple((name, value) for name, value in self.parameters if known[name].static)
        return dataclasses.replace(self, parameters=kept)

    @property
    def chosen(self) -> dict[str, Any]:
        """Every parameter, as Python numbers; of each model where they have their own."""
        return self.of_injection.resolve({**dict(self.parameters), **self._fixed}, self.models, self.mode)

    @property
    def _fixed(self) -> dict[str, Any]:
        return {
            name: value for name, value in FIXED_BY_INJECTION.items() if name in self.of_injection.parameters
        }

    @property
    def of_injection(self) -> Operator:
        """The operator as an injection calls it."""
        return operator_named(self.operator).for_injection

    def numbers(self, size: int) -> Numbers:
        """The rest, for tensors of `size` elements."""
        known = self.of_injection.parameters
        numbers: Numbers = {}
        for name, value in self._all_numbers():
            one = (lambda x: Share.of(x, size)) if known[name].counted else np.float32
            if known[name].per_model:
                numbers[name] = [
                    one(x) for x in np.broadcast_to(np.asarray(value, float), self.models).tolist()
                ]
            else:
                numbers[name] = one(float(value))
        return numbers

    def _all_numbers(self) -> list[tuple[str, Any]]:
        """Those given, and the defaults of shares, which are counted too."""
        known, given = self.of_injection.parameters, dict(self.parameters)
        for name, parameter in known.items():
            if parameter.counted and name not in given:
                given[name] = parameter.default_in(self.mode)
        return [(name, value) for name, value in sorted(given.items()) if not known[name].static]

    def values(self, numbers: Numbers) -> dict[str, Any]:
        """Every parameter of the operator, with its traced numbers."""
        given = {**dict(self.parameters), **numbers, **self._fixed}
        return self.of_injection.resolve(given, self.models, self.mode)
