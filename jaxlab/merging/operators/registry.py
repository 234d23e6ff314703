"""What a merge operator is: a function whose signature declares it, registered by a decorator.

    @operator("Ilharco et al. 2022, arXiv 2212.04089")
    def task_arithmetic(task_vectors, weights, *, normalize: bool = False, lambda_: Scalar = 1.0, dtype):

The names in the signature say what the operator takes:

    task_vectors    what it merges, float32: x_i - base. It returns the merged task vector, which the caller
                    adds to the base.
    models          or the models' tensors themselves, float32. It returns the merged tensor.
    weights         float32 scalars, one for each.
    mode, dtype     "paper" or "mergekit", and the dtype that intermediate results are rounded to.
    key, masks      random numbers: uint32[2] made of seed and tensor name; or masks given in their place.
    offset          for chunks of a tensor: the index of the first element, an integer or two traced words.
    base            the base's tensor, float32; with the default None it may be absent (operators on models).
    statistics      what was measured on data; the operator's docstring says what.
    layer           the tensor's layer (traced; -1 outside of layers); num_layers, how many there are.
    totals          of operators on whole models (`Gather`): what was gathered over all tensors, or None: then
                    this tensor is the whole model.
    the others      are the operator's parameters under mergekit's names (lambda_ is lambda): their defaults,
                    and in `Annotated` their bounds and markers. bool is a switch and int a count; all else
                    may be traced.

Operators are pure, may be jitted and vmapped, and give the same bits in every such setting. NaN in an input
gives NaN in that element of the output, unless trimming or a mask dropped it; operators that are not element
by element (`Operator.scope`) may spread it over the tensor.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.errors import UserError
from jaxlab.merging.numerics import Mode, multiply, round_to
from jaxlab.merging.operators.declarations import (
    REQUIRED,
    WIDTH,
    Afterwards,
    Gather,
    Injection,
    NotInjected,
    Parameter,
    Vectors,
    Weights,
    parameters_of,
)
from jaxlab.merging.operators.declarations import Scope as Scope


@dataclasses.dataclass(frozen=True)
class Operator:
    """One merge operator, in two stages that a search runs apart from each other."""

    name: str
    source: str
    """Where it was published."""
    function: Callable[..., Any]
    """As declared. Its first argument is what `preparation` returned, if there is one."""
    preparation: Callable[..., Any] | None = None
    injection: Injection = None
    """What the lambdas of an injection are to it; see `operator`."""
    scopes: Mapping[str, Scope] = dataclasses.field(default_factory=dict)
    """By mode; see `Scope`."""
    per_task: bool = False
    """Makes a list: a task vector for each of the models."""
    gather: Gather | None = None
    weighted_first: bool = False
    """As an injection calls it: the weights scale the task vectors before anything else."""
    after: tuple["Afterwards", ...] = ()
    """What is done to the merged task vector."""
    in_float32: bool = False
    """mergekit, too, computes in float32."""
    exact_weights: bool = False
    """mergekit does not round the weights to the tensors' dtype."""
    ranked: bool = False
    """Asks for `ranks`."""

    @property
    def parameters(self) -> dict[str, Parameter]:
        """By mergekit's names, without the weights."""
        return {p.name: p for f in self._signatures for p in parameters_of(f)}

    @property
    def preparation_parameters(self) -> tuple[str, ...]:
        """Those of its first stage."""
        return () if self.preparation is None else tuple(p.name for p in parameters_of(self.preparation))

    @property
    def of_models(self) -> bool:
        """Merges models themselves, not task vectors."""
        return next(iter(inspect.signature(self._stages[0]).parameters)) == "models"

    @property
    def makes_tensor(self) -> bool:
        """In an injection: whether `combine` gives the merged tensor and not the merged task vector."""
        return self.of_models and self.weighted_first

    @property
    def base(self) -> Literal["required", "optional", "unused"]:
        """What a base is to it."""
        if not self.of_models:
            return "required"
        stages = [inspect.signature(stage).parameters for stage in self._stages]
        defaults = [stage["base"].default for stage in stages if "base" in stage]
        if not defaults:
            return "unused"
        return "optional" if all(default is None for default in defaults) else "required"

    @property
    def injected_formula(self) -> str | None:
        """What a function says that takes the operator's place in an injection."""
        return inspect.getdoc(self.injection) if inspect.isfunction(self.injection) else None

    @property
    def random(self) -> bool:
        """Needs a key."""
        return self.takes("key")

    def scope(self, mode: Mode, parameters: Mapping[str, Any] | None = None) -> Scope:
        """What an element of the output depends on, for an engine to decide what it must hold at once."""
        own = self.scopes[mode]
        if own == "cut" and (parameters or {}).get("rescale"):
            own = "tensor"
        return max([own, *(step.scope for step in self.after)], key=WIDTH.index)

    def takes(self, name: str) -> bool:
        """Whether a stage has an argument of this name."""
        if name == "weights" and self.weighted_first:
            return True
        return any(name in inspect.signature(stage).parameters for stage in self._signatures)

    @property
    def needs_statistics(self) -> bool:
        """Whether it cannot do without statistics of data."""
        stages = [inspect.signature(stage).parameters for stage in self._signatures]
        return any(s["statistics"].default is REQUIRED for s in stages if "statistics" in s)

    @property
    def _signatures(self) -> list[Callable[..., Any]]:
        return [*self._stages, *(step.function for step in self.after)]

    @property
    def _stages(self) -> list[Callable[..., Any]]:
        return [*([self.preparation] if self.preparation else []), self.function]

    @property
    def for_injection(self) -> "Operator":
        """The operator as an injection calls it, with a weight for each task vector.

        Raises:
          UserError: it cannot be injected.
        """
        if isinstance(self.injection, NotInjected):
            raise UserError(f"{self.name} cannot be injected: {self.injection.reason}")
        if callable(self.injection):
            return dataclasses.replace(self, function=self.injection)
        first = self.injection in ("models", "pair") or not self.takes("weights")
        return dataclasses.replace(self, weighted_first=True) if first else self

    def rounded(self, weights: Sequence[Any], dtype: jnp.dtype) -> list[Float[Array, ""]]:
        """Weights as the operator takes them."""
        to = jnp.dtype(jnp.float32) if self.exact_weights else dtype
        return [round_to(jnp.asarray(w).astype(jnp.float32), to) for w in weights]

    def resolve(
        self, given: Mapping[str, Any], count: int, mode: Mode, *, plain: bool = False
    ) -> dict[str, Any]:
        """The value of every parameter, from those given and the defaults.

        Args:
          plain: known numbers stay Python's; for who only asks.

        Raises:
          UserError: one that is missing or out of bounds.
        """
        values = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default_in(mode))
            if value is REQUIRED:
                raise UserError(f"{self.name} needs the parameter {name}")
            values[name] = parameter.resolve(value, count, plain=plain)
        return values

    def prepare(self, tensors: Vectors, values: Mapping[str, Any], **supplied: Any) -> Any:
        """What weights have no part in, such as trimming, random masks and angles: a pytree of arrays."""
        if self.after:
            return dataclasses.replace(self, after=()).prepare(tensors, values, **supplied), list(tensors)
        if self.preparation is None or self.weighted_first:
            return list(tensors)
        return _call(self.preparation, (tensors,), values, supplied)

    def combine(self, prepared: Any, weights: Weights, values: Mapping[str, Any], **supplied: Any) -> Any:
        """The merged task vector, or of an operator on models the merged tensor; float32. If the operator is
        `per_task`, a list of them.
        """
        if self.after:
            inner, task_vectors = prepared
            merged = dataclasses.replace(self, after=()).combine(inner, weights, values, **supplied)
            for step in self.after:
                takes_vectors = "task_vectors" in inspect.signature(step.function).parameters
                positional = (merged, task_vectors) if takes_vectors else (merged,)
                merged = _call(step.function, positional, values, supplied)
            return merged
        if self.weighted_first:
            once = dataclasses.replace(self, weighted_first=False)
            dtype = supplied["dtype"]
            vectors = [multiply(d, w, dtype) for d, w in zip(prepared, weights, strict=True)]
            if self.of_models:
                vectors = [supplied["base"] + d for d in vectors]
                if self.injection == "pair":
                    supplied["base"], *vectors = vectors
                elif self.base != "required":
                    supplied["base"] = None
            ones = [jnp.float32(1.0)] * len(vectors)
            return once.combine(once.prepare(vectors, values, **supplied), ones, values, **supplied)
        takes_weights = "weights" in inspect.signature(self.function).parameters
        positional = (prepared, weights) if takes_weights else (prepared,)
        return _call(self.function, positional, values, supplied)

    def measure(self, tensors: Vectors, values: Mapping[str, Any], **supplied: Any) -> Any:
        """One round of what an operator on whole models gathers, for one tensor."""
        assert self.gather is not None
        return _call(self.gather.measure, (tensors,), values, supplied)


OPERATORS: dict[str, Operator] = {}
"""All merge operators by name, which is mergekit's where it has the operator."""


def operator(
    source: str,
    *,
    prepare: Callable[..., Any] | None = None,
    inject: Injection = None,
    scope: Scope | Mapping[str, Scope] = "element",
    per_task: bool = False,
    gather: Gather | None = None,
    in_float32: bool = False,
    exact_weights: bool = False,
    ranked: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the merge operator of its name; the function stays what it is.

    Args:
      source: where it was published.
      prepare: a first stage that needs no weights. A search runs it once for many weights.
      inject: what the lambdas of an injection are to it. None: its weights; without weights they scale the
        task vectors, or an operator on models merges the models base + lambda_i d_i. "models": that also with
        weights, which are 1. "pair": the first of these models takes the base's place. A function
        (prepared, weights, ...) -> merged task vector takes the operator's place. `NotInjected`: why it
        cannot be.
      scope: what an element of the output depends on, in both modes or by mode.
      per_task: it returns a list with a task vector for each model.
      gather: what it needs to know of all tensors.
      in_float32: in mode mergekit, too, intermediate results are not rounded to the tensors' dtype.
      exact_weights: nor are weights.
      ranked: it asks for `jaxlab.merging.ranks.ranks` of the task vectors.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        if name in OPERATORS:
            raise ValueError(f"there are two operators named {name}")
        scopes = {mode: scope for mode in ("paper", "mergekit")} if isinstance(scope, str) else scope
        entry = Operator(
            name,
            source,
            function,
            prepare,
            inject,
            scopes,
            per_task,
            gather,
            in_float32=in_float32,
            exact_weights=exact_weights,
            ranked=ranked,
        )
        first = next(iter(inspect.signature(entry._stages[0]).parameters))
        if first not in ("task_vectors", "models"):
            raise TypeError(f"{name}: the first argument is task_vectors or models, not {first}")
        if (gather is not None) != ("model" in scopes.values()):
            raise TypeError(f"{name}: scope model and gather= belong together")
        OPERATORS[name] = entry
        return function

    return register


AFTERWARDS: dict[str, Afterwards] = {}
"""What can follow an operator on task vectors, by name: `ties+svc`. Alone, it follows task_arithmetic."""


def afterwards(
    source: str, *, scope: Scope = "element"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of a merged task vector (and of the task vectors) that any operator on task
    vectors can be followed by: `operator+name`. The function stays what it is.

    Args:
      source: where it was published.
      scope: what an element of the output depends on.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        if name in AFTERWARDS or name in OPERATORS:
            raise ValueError(f"there are two operators named {name}")
        AFTERWARDS[name] = Afterwards(name, source, function, scope)
        return function

    return register


def operator_named(method: str, kind: str = "merge method") -> Operator:
    """An operator by its name, or one followed by something else, as in `ties+svc`.

    Args:
      method: the name.
      kind: what the user calls it.

    Raises:
      UserError: there is no such method.
    """
    first, *following = method.split("+")
    if first in AFTERWARDS:
        first, following = "task_arithmetic", [first, *following]
    if first not in OPERATORS:
        known = ", ".join(sorted([*OPERATORS, *AFTERWARDS]))
        raise UserError(f"no {kind} {first!r}; there are {known}")
    entry = OPERATORS[first]
    if not following:
        return entry
    for name in following:
        if name not in AFTERWARDS:
            article = "an" if kind[0] in "aeiou" else "a"
            what = f"{name!r} cannot follow {article} {kind}" if name else f"{method}: nothing follows the +"
            raise UserError(f"{what}; {', '.join(AFTERWARDS)} can")
    if entry.of_models or entry.per_task:
        kind = "makes a model for each task" if entry.per_task else "merges models, not task vectors"
        raise UserError(f"{first} {kind}: nothing can follow it")
    steps = tuple(AFTERWARDS[name] for name in following)
    sources = "; ".join([entry.source, *(step.source for step in steps)])
    return dataclasses.replace(entry, name=method, source=sources, after=steps)


def _call(
    function: Callable[..., Any],
    positional: tuple[Any, ...],
    values: Mapping[str, Any],
    supplied: Mapping[str, Any],
) -> Any:
    """The function with those of its parameters, and of what is supplied, that it has."""
    wanted = inspect.signature(function).parameters
    named = {name: value for name, value in supplied.items() if name in wanted}
    named |= {name: values[key] for name in wanted if (key := name.removesuffix("_")) in values}
    return function(*positional, **named)
