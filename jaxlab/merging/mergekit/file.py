"""mergekit's files as typed values: what each says, and what its methods have against it."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxlab.merging.mergekit.methods import MergeMethod
from jaxlab.merging.numbers import Setting


@dataclass(frozen=True)
class ModelReference:
    """A model as a file names it."""

    path: str
    """A folder or a hub id, with @revision."""
    adapter: str | None = None
    """Of a LoRA adapter that is applied before anything else."""

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class SliceSource:
    """Layers of a model, or with None all of it."""

    model: ModelReference
    layers: tuple[int, int] | None
    parameters: Parameters
    where: str
    misplaced: tuple[str, ...] = ()
    """Keys beside `parameters` that belong into it."""


@dataclass(frozen=True)
class OutputSlice:
    """Layers of the output, and the models that they are merged from."""

    sources: tuple[SliceSource, ...]
    parameters: Parameters
    where: str
    base_model: ModelReference | None = None


@dataclass(frozen=True)
class Module:
    """A part of the models: the language model, a vision tower, a projector; None: every part."""

    name: str | None
    slices: tuple[OutputSlice, ...]
    parameters: Parameters
    whole: bool
    """The only slice is of whole models, to which the base belongs."""


class TokenSource(NamedTuple):
    """Where the row of a token comes from that the file names."""

    kind: Literal["model", "model_token", "zero", "unsaid"]
    model: ModelReference | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    """Also in models that have the token."""


@dataclass(frozen=True)
class TokenizerRule:
    """Which vocabulary the output has."""

    source: Literal["union", "base"] | ModelReference
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class MergekitMerge:
    """One document: a merge."""

    where: str
    name: str | None
    method: MergeMethod
    modules: tuple[Module, ...]
    base_model: ModelReference | None
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerRule | None
    chat_template: str | None
    seed: int

    def references(self) -> list[ModelReference]:
        """All models that it names, each once, in the order of their places; the base where it is a source,
        else last.
        """
        found: dict[ModelReference, None] = {}
        for module in self.modules:
            for part in module.slices:
                found |= dict.fromkeys(source.model for source in part.sources)
        bases = [part.base_model for module in self.modules for part in module.slices]
        found |= dict.fromkeys(model for model in (*bases, self.base_model) if model)
        if self.tokenizer is not None:
            named = [self.tokenizer.source, *(token.model for token in self.tokenizer.tokens.values())]
            found |= dict.fromkeys(model for model in named if isinstance(model, ModelReference))
        return list(found)

    def all_parameters(self) -> Iterator[tuple[str, Setting]]:
        """Every parameter that is written, at every level."""
        yield from self.parameters.items()
        for module in self.modules:
            yield from module.parameters.items()
            for part in module.slices:
                yield from part.parameters.items()
                for source in part.sources:
                    yield from source.parameters.items()


@dataclass(frozen=True)
class MergekitFile:
    """All documents of a file, in an order in which each comes after those whose outputs it reads."""

    text: str
    """As it stands in the file."""
    tree: Any
    """The same as plain values; of several documents a list."""
    stages: tuple[MergekitMerge, ...]
    """The last one makes the output."""
    notes: tuple[str, ...]
    """What mergekit would pass over in silence."""

    def references(self) -> list[ModelReference]:
        """All models that it reads and does not make itself, each once."""
        names = [stage.name for stage in self.stages]
        found = dict.fromkeys(one for stage in self.stages for one in stage.references())
        return [one for one in found if stage_named(one, names) is None]


def stage_named(reference: ModelReference, names: Iterable[str | None]) -> str | None:
    """The stage whose output a reference means: by its name, or by the path of a folder that would be called
    so and is not there.
    """
    if reference.path in names:
        return reference.path
    last = reference.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    local = reference.path.startswith((".", "/", "~"))
    return last if local and last in names and not os.path.exists(reference.path) else None


def sources_of(
    merge: MergekitMerge, module: Module, part: OutputSlice, base: ModelReference | None
) -> list[SliceSource]:
    """Those of a slice; to whole models the base is added where it is not among them."""
    sources = list(part.sources)
    if module.whole and base is not None and all(source.model != base for source in sources):
        sources.append(SliceSource(base, None, {}, merge.where))
    return sources


def problem_with_inputs(
    merge: MergekitMerge, module: Module, part: OutputSlice, base: ModelReference | None
) -> str | None:
    """What the method has against the inputs of a slice; None: nothing."""
    method, models = merge.method, [source.model for source in sources_of(merge, module, part, base)]
    twice = [model for i, model in enumerate(models) if model in models[:i]]
    if twice:
        return f"{twice[0]} is among the inputs twice"
    if method.base != "ignored":
        if base is not None and base not in models:
            return f"the base_model {base} is not among the sources of the slice"
        if base is None and method.base == "required":
            return f"{method.name} needs a base_model"
    others = len(models) - (base in models and method.base != "ignored")
    for count, (least, most), what in (
        (len(models), method.inputs, "models, the base included"),
        (others, method.others, "models besides the base"),
    ):
        if count < least or (most is not None and count > most):
            wanted = (
                f"at least {least}" if most is None else f"{least}" if least == most else f"{least} to {most}"
            )
            return f"{method.name} takes {wanted} {what}; found {count}"
    return None
