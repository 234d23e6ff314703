"""mergekit's merge methods: which inputs each takes, and which of its parameters are for each of them."""

import functools
from dataclasses import dataclass
from typing import Literal

from jaxlab.merging.numbers import Kind
from jaxlab.merging.operators import Operator, operator_named
from jaxlab.merging.operators.declarations import REQUIRED, Parameter
from jaxlab.merging.schedules import kind_of

IGNORED = ("int8_mask",)
"""How mergekit stores masks: of no consequence."""


@dataclass(frozen=True)
class MergeMethod:
    """What mergekit 0.1.5 asks of the inputs of a method, by its name."""

    name: str
    base: Literal["required", "optional", "ignored"] = "required"
    inputs: tuple[int, int | None] = (1, None)
    """Least and most, the base among them."""
    others: tuple[int, int | None] = (0, None)
    """Least and most besides the base."""

    @functools.cached_property
    def operator(self) -> Operator:
        return operator_named(self.name)

    @functools.cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The operator's, by name; without the weights."""
        return self.operator.parameters

    @property
    def of_every_input(self) -> bool:
        """Whether the base, too, has a value of a parameter that each input has."""
        return self.base == "ignored"

    @functools.cached_property
    def per_input(self) -> tuple[str, ...]:
        """Parameters that each input has its own value of."""
        per_model = [name for name, parameter in self.parameters.items() if parameter.per_model]
        return (*(["weight"] if self.operator.takes("weights") else []), *per_model)

    @functools.cached_property
    def shared(self) -> tuple[str, ...]:
        """Parameters with one value for all inputs."""
        return tuple(name for name in self.parameters if name not in self.per_input)

    def kind(self, parameter: str) -> Kind:
        """What the values of a parameter are."""
        known = self.parameters.get(parameter)
        return "number" if known is None else kind_of(known)

    def required(self, parameter: str) -> bool:
        """Whether a parameter has no default."""
        return parameter == "weight" or self.parameters[parameter].default is REQUIRED


METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod("linear", base="ignored"),
        MergeMethod("passthrough", base="ignored", inputs=(1, 1)),
        MergeMethod("karcher", base="ignored"),
        *(
            MergeMethod(name)
            for name in (
                "task_arithmetic",
                "ties",
                "dare_linear",
                "dare_ties",
                "breadcrumbs",
                "breadcrumbs_ties",
                "della",
                "della_linear",
                "sce",
                "ram",
                "ramplus_tl",
            )
        ),
        MergeMethod("model_stock", inputs=(3, None)),
        *(MergeMethod(name, inputs=(2, 2)) for name in ("slerp", "nearswap", "arcee_fusion")),
        MergeMethod("nuslerp", base="optional", others=(2, 2)),
        MergeMethod("multislerp", base="optional", others=(1, None)),
    )
}
