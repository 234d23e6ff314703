"""The plan of a merge: for every tensor that will be written what is done, decided from headers alone.

A plan is plain data under Hugging Face names. `plan_recipe` makes it of a recipe of ours; anything else that
knows which tensors it wants can make one too: the sources of a tensor may have any names (a stacked layer has
another number than the one it came from), and models that are not named stay unread.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlab.checkpoints import (
    EMBEDDING,
    HEAD,
    LeafPath,
    ModelTensors,
    OpenModel,
    Tensor,
    TensorKind,
    common_prefix,
    hf_family,
    model_tensors,
    tensors_laid_out_as,
)
from jaxlab.errors import UserError
from jaxlab.files import jsonable
from jaxlab.merging.account import AccountLine, Action, MergeAccount
from jaxlab.merging.injection import PatternValue
from jaxlab.merging.merge import check_sum
from jaxlab.merging.numerics import Mode
from jaxlab.merging.operators import operator_named

FORMAT = 1
"""Of plans: another number, other bytes."""


@dataclass(frozen=True)
class Source:
    """A tensor of an input."""

    model: int
    """Which input, in the order of the plan's."""
    name: str


@dataclass(frozen=True)
class Merging:
    """An operator with the numbers that it has for one tensor."""

    operator: str
    mode: Mode
    sources: tuple[Source, ...]
    """What is merged, without the base."""
    base: Source | None = None
    weights: tuple[float, ...] | None = None
    """One for each source; None: the operator has none."""
    parameters: tuple[tuple[str, Any], ...] = ()
    """The others by name: a number, a switch, or a tuple with a number for each source."""
    injected: bool = False
    """As an injection means it: the weights are (lambda_v, lambda_e) on the task vectors."""
    rows: int | None = None
    """Only so many first rows are merged; the others are those of the first source. None: all."""
    layer: int | None = None
    """For operators that depend on depth; None outside of layers."""
    key: str | None = None
    """The name that random masks come from; None: the tensor's own."""
    read_as: str | None = None
    """The dtype that the sources are rounded to before anything else."""

    @property
    def everything(self) -> tuple[Source, ...]:
        """The sources, and the base last."""
        return self.sources if self.base is None else (*self.sources, self.base)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: a copy, or merged."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    models: tuple[str, ...]
    """The inputs that it comes from, by what they are to the merge."""
    reason: str
    pattern: str
    """The name with {i} for the layer."""
    copy: Source | None = None
    merging: Merging | None = None

    @property
    def action(self) -> Action:
        return "copied" if self.merging is None else "merged"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class MergePlan:
    """Everything that is written, and what of the inputs is not."""

    tensors: tuple[PlannedTensor, ...]
    """In the order in which they are read and written."""
    refused: tuple[AccountLine, ...] = ()
    """Tensors of inputs that go nowhere."""
    seed: int = 0
    """Of random masks, which depend on it and on the tensor's name alone."""
    num_layers: int = 0

    def account(self) -> MergeAccount:
        """The account, without digests."""
        lines = [
            AccountLine(t.name, t.pattern, t.action, t.models, t.reason, t.shape, t.dtype)
            for t in self.tensors
        ]
        return MergeAccount((*lines, *self.refused))

    @property
    def nbytes(self) -> int:
        """Of all tensors that are written."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def digest(self) -> str:
        """SHA-256 of all that decides the bytes of the output, but for the inputs' contents."""
        text = json.dumps(jsonable([FORMAT, dataclasses.asdict(self)]), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def dtype_of(name: str) -> np.dtype:
    """The dtype of this name, bfloat16 and float8 among them."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


@dataclass(frozen=True)
class Input:
    """An opened model and its tensors."""

    role: str
    model: OpenModel
    found: ModelTensors
    relaid: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Tensors that had to be laid out anew for another family, by the names that the plan uses."""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of ours, from which random masks come, of tensors that are written under others."""
    views: dict[str, ModelTensors] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def holders(self) -> dict[LeafPath, TensorKind]:
        """For each leaf the kind that holds it."""
        return {path: kind for kind in self.found.kinds for path in kind.paths}

    def laid_out_as(self, family: str) -> ModelTensors:
        """Its tensors as another family has them; see `tensors_laid_out_as`."""
        if family not in self.views:
            self.views[family] = tensors_laid_out_as(self.model, family)
        return self.views[family]

    def __getitem__(self, name: str) -> Tensor:
        return self.relaid.get(name) or self.found.tensors[name]


def open_inputs(models: Sequence[OpenModel], roles: Sequence[str], *, own_names: bool = False) -> list[Input]:
    """The inputs of a plan.

    Args:
      own_names: a first model that is one of ours keeps its names; otherwise it gets those of the family of
        Hugging Face that it will be written as.

    Raises:
      UserError: a model whose tensors are not those of its family.
    """
    first, family = models[0], None
    keys: dict[str, str] = {}
    if (
        first.form not in ("huggingface", "gguf") and not own_names
    ):  # what is written has names of Hugging Face
        family = hf_family(first.config, first.source_files)
        ours = {kind.path: kind for kind in model_tensors(first).kinds}
        for kind in model_tensors(first, family).kinds:
            if kind.lies_as(ours[kind.path]):
                keys |= dict(zip(kind.names, ours[kind.path].names, strict=True))
    inputs = [Input(role, model, model_tensors(model)) for role, model in zip(roles, models, strict=True)]
    if family is not None:
        inputs[0] = Input(roles[0], first, model_tensors(first, family), keys=keys)
    return inputs


@dataclass(frozen=True)
class _Rules:
    """What a recipe says of the tensors that are merged."""

    operator: str
    mode: Mode
    injected: bool
    base: int | None
    """Which input is the base."""
    parameters: tuple[tuple[str, Any], ...]
    lambdas: tuple[Any, ...]
    """For each input that is merged: a number, a list over layers, or a list of patterns."""
    weighted: bool
    embeddings: str
    common_rows: int | None
    reason: str


def plan_injection_of(
    inputs: Sequence[Input],
    *,
    operator: str,
    mode: Mode,
    parameters: Mapping[str, Any],
    lambda_v: Any,
    lambda_e: Any,
    embeddings: str,
    seed: int,
) -> MergePlan:
    """An expert into a VLM; the inputs are VLM, expert and base.

    Raises:
      UserError: language models that differ in more than the rows of their tables; lambdas that do not fit.
    """
    if embeddings not in ("vlm", "merge_common_rows", "merge"):
        raise UserError(f"embeddings is vlm, merge_common_rows or merge, not {embeddings!r}")
    common = None
    if embeddings == "merge_common_rows":
        common = common_prefix([one.model.tokenizer for one in inputs])
    rules = _Rules(
        operator,
        mode,
        True,
        2,
        _plain(parameters),
        (lambda_v, lambda_e),
        True,
        embeddings,
        common,
        "language model",
    )
    return _plan(inputs, rules, seed)


def plan_merge_of(
    inputs: Sequence[Input],
    *,
    operator: str,
    mode: Mode,
    parameters: Mapping[str, Any],
    with_base: bool,
    seed: int,
) -> MergePlan:
    """Models of one architecture into one; the base, if there is one, is the last input.

    Raises:
      UserError: models that differ in names or shapes.
    """
    parameters, known = dict(parameters), operator_named(operator)
    count = len(inputs) - with_base
    if known.per_task:
        raise UserError(f"{operator} makes a model for each task; merge_tensors gives them tensor by tensor")
    values = known.resolve({k: v for k, v in parameters.items() if k != "weight"}, count, mode)
    check_sum(known, values, parameters.get("weight") or [1.0])
    weights = parameters.pop("weight", None)
    rules = _Rules(
        operator,
        mode,
        False,
        len(inputs) - 1 if with_base else None,
        _plain(parameters),
        tuple(weights) if weights is not None else (1.0,) * count,
        known.takes("weights"),
        "merge",
        None,
        operator,
    )
    return _plan(inputs, rules, seed)


def _plain(parameters: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items() if v is not None}
    return tuple(sorted(given.items()))


def _plan(inputs: Sequence[Input], rules: _Rules, seed: int) -> MergePlan:
    """A decision for every tensor of every input."""
    first = inputs[0]
    layers = _num_layers(first)
    planned: dict[str, PlannedTensor] = {}
    problems: list[str] = []
    left = {one.role: _counted(one) for one in inputs}
    kept: dict[LeafPath, str] = {}
    """Leaves of the language model that stay the first model's, and why."""
    for kind in first.found.kinds:
        if not kind.is_language and rules.injected:
            for name in kind.names:
                planned[name] = _copied(first, name, kind.pattern, "not part of the language model")
                left[first.role].pop(name)
            continue
        reason, rows, tied = _decide(inputs, kind, rules, problems)
        if reason is None:
            continue
        for index, name in enumerate(kind.names):
            if rows == 0:
                planned[name] = _copied(first, name, kind.pattern, reason)
                kept[kind.path] = reason
                left[first.role].pop(name)
                continue
            sources = [_source(inputs, i, kind, index, tied) for i in range(len(inputs))]
            planned[name] = _merged(inputs, rules, kind, index, sources, rows, layers, reason)
        if rows != 0:
            _take(inputs, left, kind, tied)
    for name in first.found.copies:
        embedding = next(kind for kind in first.found.kinds if kind.path == EMBEDDING)
        original = planned.get(embedding.names[0])
        if original is not None:  # the head once more, whatever became of the embedding
            reason = f"{original.reason}; the embedding, written as the tied head too"
            planned[name] = dataclasses.replace(original, name=name, pattern=name, reason=reason)
            left[first.role].pop(name)
    for name in first.found.ignored:
        planned[name] = _copied(first, name, name, "no parameter")
        left[first.role].pop(name)
    refused = _refuse(inputs, rules, left, kept, problems)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        what = "the language models" if rules.injected else "the models"
        raise UserError(f"{what} cannot be merged: {'; '.join(problems[:3])}{more}")
    if any(left.values()):
        role, names = next((role, names) for role, names in left.items() if names)
        raise ValueError(f"unaccounted tensors of the {role}: {sorted(names)[:3]}")
    _check_patterns(inputs, rules, [t.name for t in planned.values() if t.merging is not None])
    order = {name: i for i, name in enumerate(first.found.tensors)}
    tensors = sorted(planned.values(), key=lambda t: _place(first, t.name, order))
    return MergePlan(tuple(tensors), tuple(refused), seed, layers)


def _check_patterns(inputs: Sequence[Input], rules: _Rules, names: Sequence[str]) -> None:
    """Whether every pattern of a lambda matches a tensor that is merged.

    Raises:
      UserError: one does not.
    """
    for pattern in dict.fromkeys(p for value in rules.lambdas for p in _patterns(value)):
        if fnmatch.filter(names, pattern):
            continue
        hint = "" if not names else f"; tensors that are merged are named as {names[0]}"
        for one in inputs[1:]:
            if fnmatch.filter(one.found.tensors, pattern):
                hint = f": it has names of the {one.role}; those of the {inputs[0].role} count, as {names[0]}"
                break
        raise UserError(f"the pattern {pattern!r} of a lambda matches no tensor that is merged{hint}")


def _patterns(value: Any) -> list[str]:
    """Of a lambda of a recipe."""
    rules = value if isinstance(value, list | tuple) else ()
    of_mappings = [str(rule["pattern"]) for rule in rules if isinstance(rule, Mapping)]
    return [rule.pattern for rule in rules if isinstance(rule, PatternValue)] + of_mappings


def _place(one: Input, name: str, order: Mapping[str, int]) -> tuple[str, int, int]:
    """Where a tensor lies: by file and offset, else in the order of the model."""
    tensor = one.found.tensors[name]
    return (
        str(tensor.file or ""),
        tensor.offset if tensor.file is not None else order[name],
        order[name],
    )


def _counted(one: Input) -> dict[str, tuple[TensorKind | None, str]]:
    """Every tensor of an input, to be crossed out."""
    counted: dict[str, tuple[TensorKind | None, str]] = {
        name: (kind, "") for kind in one.found.kinds for name in kind.names
    }
    counted |= dict.fromkeys(one.found.copies, (None, "the embedding once more, as a tied head"))
    return counted | dict.fromkeys(one.found.ignored, (None, "no parameter"))


def _num_layers(one: Input) -> int:
    kinds = (kind for kind in one.found.kinds if kind.is_language)
    return 1 + max((i for kind in kinds for i in kind.layers if i is not None), default=-1)


def _decide(
    inputs: Sequence[Input], kind: TensorKind, rules: _Rules, problems: list[str]
) -> tuple[str | None, int | None, tuple[str, ...]]:
    """Why a kind is merged or copied, how many rows are merged (None: all, 0: none), and whose head is tied.

    Models whose tensors do not fit are added to the problems; the reason is None then.
    """
    tied = tuple(one.role for one in inputs if kind.path == HEAD and HEAD not in one.holders)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, one in enumerate(inputs):
        wanted = (EMBEDDING,) if one.role in tied else kind.paths
        if any(path not in one.holders for path in wanted):
            problems.append(f"the {one.role} has no {kind.pattern}")
            continue
        own = _kind(inputs, i, kind, tied)
        if len(own.names) == len(kind.names):
            shapes[one.role] = one[_source(inputs, i, kind, 0, tied).name].shape
        else:
            counts = f"{len(kind.names)} tensors in the {inputs[0].role}, {len(own.names)} in the {one.role}"
            problems.append(f"{kind.pattern} is {counts}")
    if len(shapes) < len(inputs):
        return None, None, tied
    is_table = kind.path in (EMBEDDING, HEAD)
    free = is_table and rules.injected
    if len({shape[1:] if free else shape for shape in shapes.values()}) > 1:
        sizes = ", ".join(f"{list(shape)} in the {role}" for role, shape in shapes.items())
        problems.append(f"{kind.pattern} is {sizes}")
        return None, None, tied
    if not free:
        reason = rules.reason + "".join(f", the {role}'s is its embedding" for role in tied)
        return reason, None, tied
    rows = [shape[0] for shape in shapes.values()]
    shared = min(rows)
    if rules.embeddings == "merge_common_rows" and rules.common_rows is not None:
        shared = min(shared, rules.common_rows)
    if rules.embeddings == "vlm":
        return "embeddings: vlm", 0, tied
    if shared == 0:
        return f"embeddings: {rules.embeddings}, and no row is common", 0, tied
    reason = f"embeddings: {rules.embeddings}"
    reason += "".join(f", the {role}'s is its embedding" for role in tied)
    if shared == rows[0]:
        return reason, None if set(rows) == {shared} else shared, tied
    return f"{reason}, rows from {shared} on the VLM's", shared, tied


def _source(
    inputs: Sequence[Input], model: int, kind: TensorKind, index: int, tied: tuple[str, ...]
) -> Source:
    """The tensor of an input for one of a kind of the first model."""
    one, own = inputs[model], _kind(inputs, model, kind, tied)
    if own.names[0] in one.found.tensors and own in one.found.kinds:
        return Source(model, own.names[index])
    name = f"{own.names[index]} (laid out anew)"
    one.relaid[name] = one.laid_out_as(inputs[0].found.family).tensors[own.names[index]]
    return Source(model, name)


def _kind(inputs: Sequence[Input], model: int, kind: TensorKind, tied: tuple[str, ...]) -> TensorKind:
    """What holds a kind of the first model in another one, laid out as there."""
    one = inputs[model]
    if one.role in tied:
        return one.holders[EMBEDDING]
    own = one.holders[kind.path]
    if model == 0 or own.lies_as(kind):
        return own
    return next(k for k in one.laid_out_as(inputs[0].found.family).kinds if k.paths == kind.paths)


def _take(inputs: Sequence[Input], left: Mapping[str, dict[str, Any]], kind: TensorKind, tied: Any) -> None:
    """Crosses out the tensors that a merged kind takes."""
    for one in inputs:
        if one.role not in tied:
            for name in {name for path in kind.paths for name in one.holders[path].names}:
                left[one.role].pop(name, None)


def _copied(one: Input, name: str, pattern: str, reason: str) -> PlannedTensor:
    tensor = one[name]
    return PlannedTensor(
        name, tensor.dtype.name, tensor.shape, (one.role,), reason, pattern, copy=Source(0, name)
    )


def _merged(
    inputs: Sequence[Input],
    rules: _Rules,
    kind: TensorKind,
    index: int,
    sources: list[Source],
    rows: int | None,
    layers: int,
    reason: str,
) -> PlannedTensor:
    name, layer = kind.names[index], kind.layers[index]
    base = None if rules.base is None else sources[rules.base]
    merged = [source for i, source in enumerate(sources) if i != rules.base]
    weights = None
    if rules.weighted:
        weights = tuple(_at(value, kind, name, layer, layers) for value in rules.lambdas)
    step = Merging(
        rules.operator,
        rules.mode,
        tuple(merged),
        base,
        weights,
        rules.parameters,
        rules.injected,
        rows,
        layer,
        inputs[0].keys.get(name),
    )
    models = tuple(one.role for one in inputs)
    tied = [one.role for one, s in zip(inputs, sources, strict=True) if kind.path == HEAD and _ties(one, s)]
    kept = inputs[0] if rules.injected or base is None else inputs[base.model]
    tensor = kept[(sources[0] if kept is inputs[0] else base or sources[0]).name]
    return PlannedTensor(
        name,
        tensor.dtype.name,
        inputs[0][sources[0].name].shape,
        tuple(role for role in models if role not in tied),
        reason,
        kind.pattern,
        merging=step,
    )


def _ties(one: Input, source: Source) -> bool:
    return HEAD not in one.holders and source.name == one.holders[EMBEDDING].names[0]


def _at(value: Any, kind: TensorKind, name: str, layer: int | None, layers: int) -> float:
    """A lambda of a recipe for one tensor."""
    if not isinstance(value, list | tuple):
        return float(value)
    if value and isinstance(value[0], PatternValue | Mapping):
        for rule in value:
            found = rule if isinstance(rule, PatternValue) else PatternValue(rule["pattern"], rule["value"])
            if fnmatch.fnmatchcase(name, found.pattern):
                return float(found.value)
        raise UserError(f"no pattern of the lambda matches {name}; end the list with the pattern '*'")
    if len(value) != layers:
        raise UserError(f"a lambda lists {len(value)} values for {layers} layers")
    if layer is None:
        return float(value[0] if kind.path[0] in ("embedding", "position") else value[-1])
    return float(value[layer])


def _refuse(
    inputs: Sequence[Input],
    rules: _Rules,
    left: dict[str, dict[str, tuple[TensorKind | None, str]]],
    kept: Mapping[LeafPath, str],
    problems: list[str],
) -> list[AccountLine]:
    """Lines for what is left over; what has no place in the first model is a problem."""
    refused = []
    mine = inputs[0].holders
    for one in inputs:
        for name, (kind, reason) in list(left[one.role].items()):
            pattern = name if kind is None else kind.pattern
            if kind is not None:
                if not kind.is_language and rules.injected:
                    reason = "not part of the language model"
                elif kind.path in kept:
                    reason = kept[kind.path]
                elif kind.path == HEAD and HEAD not in mine:
                    reason = f"the {inputs[0].role}'s head is its embedding"
                else:
                    if not any(path in mine for path in kind.paths):
                        problem = f"only the {one.role} has {pattern}"
                        problems += [] if problem in problems else [problem]
                        del left[one.role][name]
                    continue
            refused.append(AccountLine(name, pattern, "refused", (one.role,), reason))
            del left[one.role][name]
    return refused
