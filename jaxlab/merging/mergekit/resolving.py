"""The numbers of one tensor, from all the levels on which a file may write them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlab.errors import ConfigError, UserError
from jaxlab.merging.mergekit.file import MergekitMerge, ModelReference, Module, OutputSlice, SliceSource
from jaxlab.merging.numbers import Setting
from jaxlab.merging.plan import Merging, Source

_NEAR_ZERO = 1e-8


@dataclass(frozen=True)
class Place:
    """A slice of a module, and the models that it is made from."""

    module: Module
    part: OutputSlice
    sources: tuple[SliceSource, ...]
    base: ModelReference | None


class Numbers:
    """Resolves the parameters of a merge; what is written nearer to a tensor goes before."""

    def __init__(self, merge: MergekitMerge) -> None:
        self.merge, self.method = merge, merge.method
        self._asked: set[str] = set()

    def notes(self) -> list[str]:
        """Filters that fit no tensor."""
        written = {w: None for _, s in self.merge.all_parameters() for w in s.conditions()}
        idle = [word for word in written if not any(word in name for name in self._asked)]
        return [f"{self.merge.where}: the filter {word!r} fits no tensor" for word in idle]

    def merging(
        self,
        name: str,
        called: Sequence[str],
        sources: Sequence[Source],
        place: Place,
        depth: float,
        read_as: str,
        layer: int | None,
    ) -> Merging | Source:
        """What is done for a tensor of the output: a merge, or with a source alone nothing.

        Args:
          name, called: of the tensor in the output, and of that in each of the sources.
          depth: of the layer in its slice; see `Setting.at`.

        Raises:
          UserError: a number is missing, or out of bounds.
        """
        self._asked.update((name, *called))
        method = self.method
        bases = [s.model == place.base and method.base != "ignored" for s in place.sources]
        others = [i for i, is_base in enumerate(bases) if not is_base]
        base = sources[bases.index(True)] if True in bases else None
        shared = (place.part.parameters, place.module.parameters, self.merge.parameters)
        values: dict[str, Any] = {}
        for parameter in method.shared:
            value = self._value(parameter, shared, name, depth, "")
            if value is not None:
                values[parameter] = value
        for parameter in method.per_input:
            found = []
            for i in others:
                own = place.sources[i]
                value = self._value(
                    parameter, (own.parameters, *shared), called[i], depth, str(own.model), own
                )
                found.append(value)
            if any(value is not None for value in found):
                known = method.parameters.get(parameter)
                default = None if known is None else known.default_in("mergekit")
                values[parameter] = tuple(default if value is None else value for value in found)
        if not others:
            assert base is not None
            return base
        alone = sources[others[0]] if len(others) == 1 else None
        if alone is not None and method.name in ("karcher", "multislerp"):
            return alone
        if method.name == "passthrough" and "scale" not in values:
            assert alone is not None
            return alone
        weights = values.pop("weight", None)
        values = self._check(values, weights, name)
        return Merging(
            method.name,
            "mergekit",
            tuple(sources[i] for i in others),
            base,
            weights,
            tuple(sorted(values.items())),
            layer=layer,
            read_as=read_as,
        )

    def _value(
        self,
        parameter: str,
        levels: Sequence[Mapping[str, Setting]],
        name: str,
        depth: float,
        model: str,
        source: SliceSource | None = None,
    ) -> Any:
        where = self.merge.where if source is None else source.where
        for level in levels:
            if parameter in level:
                try:
                    value = level[parameter].at(name, depth, self.method.kind(parameter))
                except ConfigError as error:
                    raise ConfigError(f"{error.message}, for {name}", parameter, where) from None
                if value is not None:
                    known = self.method.parameters.get(parameter)
                    problem = None if known is None else known.problem(value)
                    if problem:
                        raise ConfigError(f"{problem}, for {name}", parameter, where)
                    return value
        if not self.method.required(parameter):
            return None
        of_model = f" for {model}" if model else ""
        misplaced = source is not None and parameter in source.misplaced
        hint = "it stands beside parameters; move it into them, a level deeper" if misplaced else ""
        if not hint:
            fits = any(parameter in level for level in levels)
            hint = (
                "no filter of it fits; end its list with one that has none"
                if fits
                else "put it into parameters"
            )
        raise ConfigError(
            f"{self.method.name} needs it{of_model}, found none for {name}: {hint}", parameter, where
        )

    def _check(self, values: dict[str, Any], weights: tuple[float, ...] | None, name: str) -> dict[str, Any]:
        """The numbers together: nothing is divided by weights that sum to zero."""
        dividing = [
            key
            for key, parameter in self.method.parameters.items()
            if parameter.needs_nonzero_sum and values.get(key, parameter.default_in("mergekit"))
        ]
        if weights is None or not dividing or abs(sum(weights)) >= _NEAR_ZERO:
            return values
        if not self.method.operator.of_models:  # mergekit, too, leaves the sum as it is
            return values | {dividing[0]: False}
        if sum(weights) == 0:
            raise UserError(
                f"{self.merge.where}: the weights {list(weights)} for {name} sum to zero, by which nothing "
                f"can be divided; set {dividing[0]} to false"
            )
        return values
