"""From a recipe to a plan: for every tensor of every input whether it is merged, copied or refused, and with
which numbers, from headers alone.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxlab.checkpoints import EMBEDDING, HEAD, LeafPath, SameTokens, TensorKind
from jaxlab.errors import UserError
from jaxlab.merging.account import AccountLine
from jaxlab.merging.merge import check_sum
from jaxlab.merging.numbers import Setting
from jaxlab.merging.numerics import Mode
from jaxlab.merging.operators import operator_named
from jaxlab.merging.plan import Input, MergePlan, Merging, PlannedTensor, Source
from jaxlab.merging.schedules import Place, check_rules, kind_of, value_at
from jaxlab.merging.vocabulary import CommonRows, common_rows, table_of_rows

_TABLES: tuple[LeafPath, ...] = (EMBEDDING, HEAD, ("head", "bias"))
"""Leaves whose rows stand for tokens."""
_POLICIES = "; say what to do about it with embeddings: merge_common_rows, merge or first"


@dataclass(frozen=True)
class _Rules:
    """What a recipe says of the tensors that are merged."""

    operator: str
    mode: Mode
    injected: bool
    base: int | None
    """Which input is the base."""
    parameters: Mapping[str, Setting | Mapping[str, Setting]]
    """By name: one for all models, or one for each, {role: setting}."""
    weights: Mapping[str, Setting]
    """One for each input that is merged, by what it is called; none: the operator has no weights."""
    embeddings: str
    """What becomes of rows of embedding and head; all: merged, and equally many in all models."""
    tokens: SameTokens | int | None
    """Which ids stand for the same token; see `common_rows`."""
    task: str | None
    """The role of the model whose task it is, for operators that make one for each."""
    reason: str

    def at(self, place: Place, roles: Sequence[str]) -> tuple[tuple[float, ...] | None, dict[str, Any]]:
        """Weights and parameters of one tensor."""
        known = operator_named(self.operator).parameters
        weights = tuple(value_at(what, setting, place) for what, setting in self.weights.items())
        values: dict[str, Any] = {}
        for name, setting in self.parameters.items():
            kind = kind_of(known[name])
            if isinstance(setting, Setting):
                values[name] = value_at(name, setting, place, kind)
            else:
                each = (value_at(f"{name} of {role}", setting[role], place, kind) for role in roles)
                values[name] = tuple(each)
        return weights or None, values

    def settings(self) -> list[tuple[str, Setting]]:
        """All of them, with what they are called."""
        found = list(self.weights.items())
        for name, setting in self.parameters.items():
            if isinstance(setting, Setting):
                found.append((name, setting))
            else:
                found += [(f"{name} of {role}", own) for role, own in setting.items()]
        return found


def _settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a recipe as settings, also where each model has its own."""
    return {
        name: _settings(number) if isinstance(number, Mapping) else Setting.of(number)
        for name, number in parameters.items()
    }


def plan_injection_of(
    inputs: Sequence[Input],
    *,
    operator: str,
    mode: Mode,
    parameters: Mapping[str, Any],
    lambdas: Mapping[str, Any],
    embeddings: str,
    seed: int,
    tokens: SameTokens | int | None = None,
    task: str | None = None,
) -> MergePlan:
    """Experts into a VLM; the inputs are the VLM, the experts and the base.

    Args:
      parameters: numbers of the recipe by name; {role: number} where each model has its own.
      lambdas: a number for the VLM and for each expert, by what it is called.
      embeddings: vlm: embedding and head stay the VLM's. merge: they are merged as far as all have rows.
        merge_common_rows: the rows of tokens that all have, which `tokens` says. Other rows stay the VLM's.
      tokens: see `common_rows`.
      task: the role of a model, for operators that make a model for each task: whose is made.

    Raises:
      UserError: language models that differ in more than the rows of their tables; numbers that do not fit.
    """
    if embeddings not in ("vlm", "merge_common_rows", "merge"):
        raise UserError(f"embeddings is vlm, merge_common_rows or merge, not {embeddings!r}")
    base = len(inputs) - 1
    numbers = _settings(parameters), _settings(lambdas)
    rules = _Rules(operator, mode, True, base, *numbers, embeddings, tokens, task, "language model")
    return _plan(inputs, rules, seed)


def plan_merge_of(
    inputs: Sequence[Input],
    *,
    operator: str,
    mode: Mode,
    parameters: Mapping[str, Any],
    weights: Mapping[str, Any],
    with_base: bool,
    seed: int,
    embeddings: str = "all",
    tokens: SameTokens | int | None = None,
    task: str | None = None,
) -> MergePlan:
    """Models of one architecture into one; the base, if there is one, is the last input.

    Args:
      parameters: numbers of the recipe by name; {role: number} where each model has its own.
      weights: a number for each model, by what it is called; none: the operator has no weights.
      embeddings: all: embedding and head are merged as all else. first, merge, merge_common_rows: as vlm,
        merge and merge_common_rows of an injection.
      tokens: see `common_rows`.
      task: the role of a model, for operators that make a model for each task: whose is made.

    Raises:
      UserError: models that differ in names or shapes; numbers that do not fit.
    """
    base = len(inputs) - 1 if with_base else None
    numbers = _settings(parameters), _settings(weights)
    rules = _Rules(operator, mode, False, base, *numbers, embeddings, tokens, task, operator)
    return _plan(inputs, rules, seed)


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
        decision = _decide(inputs, kind, rules, problems)
        if decision is None:
            continue
        for index, name in enumerate(kind.names):
            if decision.copied:
                planned[name] = _copied(first, name, kind.pattern, decision.reason)
                kept[kind.path] = decision.reason
                left[first.role].pop(name)
                continue
            sources = [_source(inputs, i, kind, index, decision.tied) for i in range(len(inputs))]
            planned[name] = _merged(inputs, rules, kind, index, sources, decision, layers)
        if not decision.copied:
            _take(inputs, left, kind, decision.tied)
    for name in first.found.copies:
        embedding = next(kind for kind in first.found.kinds if kind.path == EMBEDDING)
        original = planned.get(embedding.names[0])
        if original is not None:  # the head once more, whatever became of the embedding
            reason = f"{original.reason}; the embedding, written as the tied head too"
            step = original.merging
            if step is not None and step.key is None:  # the same random masks
                step = dataclasses.replace(step, key=original.name)
            planned[name] = dataclasses.replace(
                original, name=name, pattern=name, reason=reason, merging=step
            )
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
    merged = [t.name for t in planned.values() if t.merging is not None]
    copied = {t.name: t.reason for t in planned.values() if t.merging is None}
    others = {one.role: one.found.tensors for one in inputs[1:]}
    for what, setting in rules.settings():
        check_rules(what, setting, merged, copied, others, first.role)
    order = {name: i for i, name in enumerate(first.found.tensors)}
    tensors = sorted(planned.values(), key=lambda t: _place(first, t.name, order))
    return MergePlan(tuple(tensors), tuple(refused), seed, layers)


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


class _Decision(NamedTuple):
    """What becomes of a kind of tensors."""

    reason: str
    tied: tuple[str, ...] = ()
    """The inputs whose embedding stands for the head that they do not have."""
    rows: CommonRows | None = None
    """Only these are merged."""
    copied: bool = False


def _decide(
    inputs: Sequence[Input], kind: TensorKind, rules: _Rules, problems: list[str]
) -> _Decision | None:
    """Whether a kind is merged or copied, and why. Models whose tensors do not fit are added to the problems;
    None then.
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
        return None
    is_table = kind.path in _TABLES
    free = is_table and rules.embeddings != "all"
    if len({shape[1:] if free else shape for shape in shapes.values()}) > 1:
        sizes = ", ".join(f"{list(shape)} in the {role}" for role, shape in shapes.items())
        only_rows = is_table and len({shape[1:] for shape in shapes.values()}) == 1
        problems.append(f"{kind.pattern} is {sizes}{_POLICIES if only_rows else ''}")
        return None
    heads = "".join(f", the {role}'s is its embedding" for role in tied)
    if not free:
        return _Decision(rules.reason + heads, tied)
    policy = f"embeddings: {rules.embeddings}"
    if rules.embeddings in ("vlm", "first"):
        return _Decision(policy, tied, copied=True)
    by_token = rules.embeddings == "merge_common_rows"
    rows = common_rows(rules.tokens if by_token else None, [shape[0] for shape in shapes.values()])
    if rows.count == 0:
        return _Decision(f"{policy}, and no row is common", tied, copied=True)
    if rows.is_everything:
        return _Decision(policy + heads, tied)
    return _Decision(f"{policy}{heads}, {rows.described(inputs[0].role)}", tied, rows)


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
    decision: _Decision,
    layers: int,
) -> PlannedTensor:
    name, layer, rows, whole = kind.names[index], kind.layers[index], decision.rows, list(sources)
    if rows is not None:
        sources = [_rows_of(inputs[i], source, rows, i) for i, source in enumerate(sources)]
    base = None if rules.base is None else sources[rules.base]
    merged = [source for i, source in enumerate(sources) if i != rules.base]
    place = Place(name, layer, layers, before=kind.path[0] in ("embedding", "position"))
    roles = [one.role for i, one in enumerate(inputs) if i != rules.base]
    weights, values = rules.at(place, roles)
    if not rules.injected:
        known = operator_named(rules.operator)
        check_sum(known, known.resolve(values, len(merged), rules.mode, plain=True), weights or [1.0])
    step = Merging(
        rules.operator,
        rules.mode,
        tuple(merged),
        base,
        weights,
        tuple(sorted(values.items())),
        rules.injected,
        None if rows is None else rows.of_first,
        None if rows is None else whole[0],
        layer,
        inputs[0].keys.get(name),
        None if rules.task is None else roles.index(rules.task),
    )
    models = tuple(one.role for one in inputs)
    tied = [one.role for one, s in zip(inputs, whole, strict=True) if kind.path == HEAD and _ties(one, s)]
    kept = inputs[0] if rules.injected or base is None else inputs[base.model]
    tensor = kept[whole[0 if kept is inputs[0] else -1].name]
    return PlannedTensor(
        name,
        tensor.dtype.name,
        inputs[0][whole[0].name].shape,
        tuple(role for role in models if role not in tied),
        decision.reason,
        kind.pattern,
        merging=step,
        common_rows=rows,
    )


def _rows_of(one: Input, source: Source, rows: CommonRows, model: int) -> Source:
    """The tensor with just these rows first."""
    if rows.is_prefix(model):
        return source
    digest = hashlib.sha256(repr((rows.runs, rows.sizes)).encode()).hexdigest()[:16]
    name = f"{source.name} ({rows.count:,} rows by token, {digest})"
    if name not in one.relaid:
        one.relaid[name] = table_of_rows(one[source.name], rows.index(model))
    return Source(source.model, name)


def _ties(one: Input, source: Source) -> bool:
    return HEAD not in one.holders and source.name == one.holders[EMBEDDING].names[0]


def reason_of_heads(first: str) -> str:
    """Why the head of another model goes nowhere."""
    return f"the {first}'s head is its embedding"


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
                    reason = reason_of_heads(inputs[0].role)
                else:
                    if not any(path in mine for path in kind.paths):
                        problem = f"only the {one.role} has {pattern}"
                        problems += [] if problem in problems else [problem]
                        del left[one.role][name]
                    continue
            refused.append(AccountLine(name, pattern, "refused", (one.role,), reason))
            del left[one.role][name]
    return refused
