"""From a file of mergekit to a plan: for every tensor that mergekit 0.1.5 would write the tensors that it is
merged from, and the numbers that it has there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxlab.checkpoints import head_name
from jaxlab.errors import UserError
from jaxlab.merging.account import AccountLine
from jaxlab.merging.mergekit.file import (
    MergekitMerge,
    ModelReference,
    Module,
    OutputSlice,
    SliceSource,
    sources_of,
)
from jaxlab.merging.mergekit.parts import (
    HEADS,
    TABLE,
    Key,
    Named,
    PartName,
    Stack,
    called_by_mergekit,
    is_table,
    part_of,
    parts_of,
)
from jaxlab.merging.mergekit.resolving import Numbers, Place
from jaxlab.merging.mergekit.tokens import Rows
from jaxlab.merging.plan import Input, MergePlan, Merging, PlannedTensor, Source

_PARTS: Mapping[str, PartName] = {
    **dict.fromkeys(("default", "text_decoder", "decoder", "language_model"), "language"),
    **dict.fromkeys(("vision_tower", "vision_model", "vision_encoder", "encoder"), "vision"),
    **dict.fromkeys(("multi_modal_projector", "projector"), "projector"),
}
"""What mergekit calls the parts of vision-language models."""
_BEFORE = ("embedding", "position")
"""First words of leaves that stand before the layers."""


@dataclass(frozen=True)
class StackedLayer:
    """Where a layer of the output's language model comes from first."""

    input: int
    layer: int


@dataclass(frozen=True)
class FilePlan:
    """A plan, and what config.json has to say of the output."""

    plan: MergePlan
    layers: tuple[StackedLayer, ...]
    """Of the language model."""
    stacked: bool
    """They are not the first input's, one by one."""
    tied: bool
    """Its head is its embedding."""
    dtype: str
    """Of the output's largest tensor."""
    notes: tuple[str, ...]


def plan_file(
    merge: MergekitMerge,
    references: Sequence[ModelReference],
    inputs: Sequence[Input],
    rows: Rows | None = None,
) -> FilePlan:
    """The plan of one merge.

    Args:
      references: what the file calls the inputs. The first one gives its names and config.json.
      rows: where the rows of tables come from, where the file asks for a vocabulary.

    Raises:
      UserError: models that cannot be merged so, a number that is missing or out of bounds.
    """
    planner = _Planner(merge, references, inputs, rows)
    layers = planner.all_parts()
    planner.finish()
    tensors = tuple(planner.planned.values())
    plan = MergePlan(tensors, tuple(planner.refused()), merge.seed, len(layers))
    largest = max(tensors, key=lambda tensor: tensor.nbytes, default=None)
    dtype = "float32" if largest is None else largest.dtype
    own = planner.parts[0].language
    stacked = own is not None and [one.layer for one in layers] != sorted(own.layers)
    return FilePlan(plan, tuple(layers), stacked, planner.tied, dtype, tuple(planner.notes))


@dataclass
class _Planner:
    merge: MergekitMerge
    references: Sequence[ModelReference]
    inputs: Sequence[Input]
    rows: Rows | None
    planned: dict[str, PlannedTensor] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    used: set[tuple[int, str]] = field(default_factory=set)
    tied: bool = True

    def __post_init__(self) -> None:
        self.parts = [parts_of(one, self.inputs[0]) for one in self.inputs]
        self.numbers = Numbers(self.merge)

    def index(self, source: SliceSource) -> int:
        return self.references.index(source.model)

    def all_parts(self) -> list[StackedLayer]:
        """Plans every part of the output; returns the layers of its language model."""
        layers: list[StackedLayer] = []
        done: dict[PartName, None] = {}
        for module in self.merge.modules:
            places = [self.place(module, one) for one in module.slices]
            for part in self.meant(module):
                if part in done:
                    raise UserError(f"{self.merge.where}: modules: two of them are the {part} model")
                done[part] = None
                found = self.part(part, places)
                layers = found if part == "language" else layers
        for part in ("language", "vision", "projector"):
            if part not in done:
                found = self.copied(part)
                layers = found if part == "language" else layers
        return layers

    def meant(self, module: Module) -> list[PartName]:
        """Which parts of a model a module is."""
        if module.name is not None:
            if module.name not in _PARTS:
                listed = ", ".join(_PARTS)
                raise UserError(f"{self.merge.where}: modules: no module {module.name!r}; there are {listed}")
            return [_PARTS[module.name]]
        kinds = {part_of(kind) for kind in self.inputs[0].found.kinds}
        if kinds != {"language"} and not module.whole:
            raise UserError(
                f"{self.merge.where}: {self.inputs[0].role} has a vision tower, so slices stand under the "
                "module that they are of: modules: {text_decoder: {slices: [...]}}"
            )
        return ["language", "vision", "projector"]

    def place(self, module: Module, part: OutputSlice) -> Place:
        base = part.base_model or self.merge.base_model
        return Place(module, part, tuple(sources_of(self.merge, module, part, base)), base)

    def part(self, part: PartName, places: Sequence[Place]) -> list[StackedLayer]:
        """All tensors of a part: what stands before its layers, the layers of one slice after the other, what
        stands behind them.
        """
        first, last = places[0], places[-1]
        # mergekit reads as many inputs of the last slice as the first one has.
        behind = dataclasses.replace(last, sources=last.sources[: len(first.sources)])
        outside = [self.parts[self.index(s)].outside for s in (*first.sources, *behind.sources)]
        kinds = {key: named.kind for found in outside for key, named in found.items()}
        keys = [key for key, kind in kinds.items() if part_of(kind) == part]
        for key in keys:
            if key[0][0][0] in _BEFORE:
                self.outside(key, first)
        layers: list[StackedLayer] = []
        for index, stack in enumerate(s for s in self.parts[0].stacks if s.part == part):
            found = self.stack(stack, index, places)
            layers = layers or found
        for key in keys:
            if key[0][0][0] not in _BEFORE:
                self.outside(key, behind)
        return layers

    def outside(self, key: Key, place: Place) -> None:
        """A tensor outside of layers. A gradient has its first value there."""
        mine = self.parts[0].outside.get(key)
        name = mine.name if mine is not None else self.name_of(key)
        named: list[Named] = []
        for source in place.sources:
            parts = self.parts[self.index(source)]
            found = parts.head(name) if key == HEADS else parts.outside.get(key)
            if found is None:
                self.problem(f"{source.model} has no {name}")
                return
            named.append(found)
        self.tensor(name, named, place, depth=0.0, layer=None)
        if key == HEADS:
            tied = dict.fromkeys(str(s.model) for s, n in zip(place.sources, named, strict=True) if n.tied)
            if tied and not all(one.tied for one in named):
                self.notes.append(
                    f"{self.merge.where}: {name} is made from heads and, of {', '.join(tied)}, from the "
                    "embedding, which is its head; the output has a head of its own"
                )
            self.decide_tie(name, all(one.tied for one in named))

    def name_of(self, key: Key) -> str:
        """What a tensor is called that the first input does not have."""
        own = head_name(self.inputs[0].found.family) if key == HEADS else None
        return own or next(parts.outside[key].name for parts in self.parts if key in parts.outside)

    def decide_tie(self, name: str, tied: bool) -> None:
        """The head that is written stays the embedding if it is made from all the same, in the same way."""
        head, table = self.planned.get(name), self.planned.get(self.table_name)
        if head is None or table is None or not tied or not _alike(head, table):
            self.tied = False
        elif head.merging is not None:  # random masks, too, are those of the embedding
            merging = dataclasses.replace(head.merging, key=self.table_name)
            self.planned[name] = dataclasses.replace(head, merging=merging)

    @property
    def table_name(self) -> str:
        return self.parts[0].outside[TABLE].name

    def stack(self, stack: Stack, index: int, places: Sequence[Place]) -> list[StackedLayer]:
        """The layers of all slices. A gradient begins at the first and ends at the last layer of a slice."""
        found: list[StackedLayer] = []
        for place in places:
            stacks, ranges = [], []
            for source in place.sources:
                own = self.parts[self.index(source)].stack(stack.part, index)
                if own is None:
                    self.problem(f"{source.model} has no layers like {stack.prefix}")
                    return []
                start, stop = source.layers or (0, own.count)
                if stop > own.count:
                    raise UserError(
                        f"{source.where}: layer_range: {source.model} has {own.count} layers, not {stop}"
                    )
                stacks.append(own)
                ranges.append(range(start, stop))
            if len({len(one) for one in ranges}) > 1:
                pairs = zip(ranges, place.sources, strict=True)
                counts = ", ".join(f"{len(one)} in {source.model}" for one, source in pairs)
                raise UserError(f"{place.part.where}: the numbers of layers differ: {counts}")
            count = len(ranges[0])
            for i in range(count):
                depth = i / (count - 1) if count > 1 else 1.0
                taken = [one[i] for one in ranges]
                self.layer(stack, stacks, taken, place, depth, len(found))
                found.append(StackedLayer(self.index(place.sources[0]), taken[0]))
        return found

    def layer(
        self,
        stack: Stack,
        stacks: Sequence[Stack],
        taken: Sequence[int],
        place: Place,
        depth: float,
        number: int,
    ) -> None:
        """All tensors of one layer of the output."""
        layers = [own.layers.get(layer, {}) for own, layer in zip(stacks, taken, strict=True)]
        for key in dict.fromkeys(key for found in layers for key in found):
            lacking = [i for i, found in enumerate(layers) if key not in found]
            if lacking:
                what = next(found[key].name for found in layers if key in found)
                model = place.sources[lacking[0]].model
                self.problem(f"layer {taken[lacking[0]]} of {model} has nothing like {what}")
                continue
            suffix = (stack if key in stack.suffixes else stacks[0]).suffixes[key]
            named = [found[key] for found in layers]
            self.tensor(f"{stack.prefix}{number}{suffix}", named, place, depth, number)

    def tensor(
        self, name: str, named: Sequence[Named], place: Place, depth: float, layer: int | None
    ) -> None:
        """One tensor of the output."""
        kind = named[0].kind
        indices = [self.index(source) for source in place.sources]
        stored = [self.inputs[i][one.name] for i, one in zip(indices, named, strict=True)]
        self.used |= {(i, one.name) for i, one in zip(indices, named, strict=True)}
        read_as = self.merge.dtype or _promoted([tensor.dtype.name for tensor in stored])
        sources = [Source(i, one.name) for i, one in zip(indices, named, strict=True)]
        if self.rows is not None and is_table(kind):
            base = None if place.base is None else self.references.index(place.base)
            sources = self.rows.sources(sources, base, read_as)
            stored = [self.inputs[source.model][source.name] for source in sources]
        if len({tensor.shape for tensor in stored}) > 1:
            pairs = zip(stored, place.sources, strict=True)
            shapes = ", ".join(f"{list(tensor.shape)} in {source.model}" for tensor, source in pairs)
            hint = "; tokenizer_source: base, or union, matches rows by token" if is_table(kind) else ""
            self.problem(f"{name} is {shapes}{hint}")
            return
        called = [one.called for one in named]
        known = called_by_mergekit(name, self.inputs[0].found.family)
        step = self.numbers.merging(known, called, sources, place, depth, read_as, layer)
        out = self.merge.out_dtype or read_as
        used = step.everything if isinstance(step, Merging) else (step,)
        roles = tuple(dict.fromkeys(self.inputs[source.model].role for source in used))
        tied = dict.fromkeys(str(s.model) for s, one in zip(place.sources, named, strict=True) if one.tied)
        reason = self.merge.method.name + "".join(f", {model}'s is its embedding" for model in tied)
        pattern = name if layer is None else kind.pattern
        copy = merging = None
        if isinstance(step, Merging):
            merging = step
        elif read_as in (out, self.inputs[step.model][step.name].dtype.name):
            copy = step
        else:  # rounded twice
            merging = Merging("passthrough", "mergekit", (step,), layer=layer, read_as=read_as)
        if name in self.planned:
            raise UserError(f"{place.part.where}: two tensors would be called {name}")
        self.planned[name] = PlannedTensor(
            name, out, stored[0].shape, roles, reason, pattern, copy=copy, merging=merging
        )

    def copied(self, part: PartName) -> list[StackedLayer]:
        """A part that no module of the file is about: the first input's, as it is."""
        first, parts = self.inputs[0], self.parts[0]
        found = [named for named in parts.outside.values() if part_of(named.kind) == part]
        stacks = [stack for stack in parts.stacks if stack.part == part]
        found += [named for stack in stacks for layer in stack.layers.values() for named in layer.values()]
        if not found:
            return []
        self.notes.append(
            f"{self.merge.where}: no module is the {part} model: it is copied from {first.role} "
            "(mergekit would leave it out)"
        )
        for name, kind in ((named.name, named.kind) for named in found):
            self.used.add((0, name))
            tensor = first[name]
            self.planned[name] = PlannedTensor(
                name, tensor.dtype.name, tensor.shape, (first.role,), "copied", kind.pattern, Source(0, name)
            )
        if part != "language" or not stacks:
            return []
        self.tied = HEADS not in parts.outside or parts.outside[HEADS].tied
        return [StackedLayer(0, layer) for layer in sorted(stacks[0].layers)]

    def problem(self, text: str) -> None:
        self.problems[text] = None

    def finish(self) -> None:
        """What can only be said at the end.

        Raises:
          UserError: the models do not fit.
        """
        problems = list(self.problems)
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"the models cannot be merged: {'; '.join(problems[:3])}{more}")
        self.notes += self.numbers.notes()

    def refused(self) -> list[AccountLine]:
        """The tensors of inputs that go nowhere."""
        lines = []
        for i, one in enumerate(self.inputs):
            patterns = {name: kind.pattern for kind in one.found.kinds for name in kind.names}
            taken = {name.removesuffix(" (laid out anew)") for j, name in self.used if j == i}
            for name in one.found.tensors:
                if name in taken:
                    continue
                reason = "no slice takes it" if name in patterns else "no parameter"
                lines.append(AccountLine(name, patterns.get(name, name), "refused", (one.role,), reason))
        return lines


def _alike(head: PlannedTensor, table: PlannedTensor) -> bool:
    """Whether two tensors are made in one way, wherever from."""

    def made(tensor: PlannedTensor) -> object:
        if tensor.merging is None:
            return tensor.dtype
        nowhere = [Source(source.model, "") for source in tensor.merging.everything]
        return tensor.dtype, nowhere, dataclasses.replace(tensor.merging, sources=(), base=None)

    models = [{s.model for s in _sources(tensor)} for tensor in (head, table)]
    return made(head) == made(table) and models[0] == models[1]


def _sources(tensor: PlannedTensor) -> tuple[Source, ...]:
    if tensor.merging is not None:
        return tensor.merging.everything
    return () if tensor.copy is None else (tensor.copy,)


def _promoted(dtypes: Sequence[str]) -> str:
    """The dtype that holds the values of all of them; float64 is not computed here."""
    found = dict.fromkeys(dtypes)
    (first, *others) = found
    return first if not others and np.dtype("float64").name != first else "float32"
