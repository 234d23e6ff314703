"""The tensors of a model as mergekit counts them: those outside of layers, and those of each layer.

Layers are counted as the names on disk count them. A tensor is found in every model by what it is, the
leaves of ours that it holds and its place among the tensors of its kind in a layer; so a model whose family
calls a tensor otherwise has it all the same.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxlab.checkpoints import EMBEDDING, HEAD, LeafPath, TensorKind
from jaxlab.errors import UserError
from jaxlab.merging.plan import Input

PartName = Literal["language", "vision", "projector"]
Key = tuple[tuple[LeafPath, ...], int]
"""The leaves that a tensor holds, and which of the tensors of its kind in its layer it is."""
TABLE: Key = ((EMBEDDING,), 0)
HEADS: Key = ((HEAD,), 0)
_DIGITS = re.compile(r"\d+")
_FUSED = ("mixtral", "qwen3_moe", "glm4_moe")
"""Families whose experts mergekit reads as transformers has them in memory: one tensor for all of a layer."""
_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
        (r"\.\w+\.experts\.\d+\.(w1|w3|gate_proj|up_proj)\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.\w+\.experts\.\d+\.(w2|down_proj)\.weight$", ".mlp.experts.down_proj"),
    )
)


@dataclass(frozen=True)
class Named:
    """A tensor of a model."""

    name: str
    """Under which the model's `Input` has it."""
    kind: TensorKind
    called: str
    """What it is called, which settings are for: its name, or that of the head where it is the embedding."""
    tied: bool = False
    """It is the embedding, or the embedding once more, and stands for the head."""


@dataclass(frozen=True)
class Stack:
    """Layers whose names begin in one way, such as `model.layers.`."""

    part: PartName
    prefix: str
    layers: Mapping[int, Mapping[Key, Named]]
    suffixes: Mapping[Key, str]
    """Of names, behind the number of the layer."""

    @property
    def count(self) -> int:
        return max(self.layers) + 1


@dataclass(frozen=True)
class Parts:
    """All tensors of a model."""

    outside: Mapping[Key, Named]
    stacks: tuple[Stack, ...]

    @property
    def language(self) -> Stack | None:
        """The layers of the language model."""
        return next((stack for stack in self.stacks if stack.part == "language"), None)

    def stack(self, part: PartName, index: int) -> Stack | None:
        """The `index`-th of a part."""
        found = [stack for stack in self.stacks if stack.part == part]
        return found[index] if index < len(found) else None

    def head(self, name: str) -> Named | None:
        """The head, called `name` where it is the embedding."""
        if HEADS in self.outside or TABLE not in self.outside:
            return self.outside.get(HEADS)
        return dataclasses.replace(self.outside[TABLE], called=name, tied=True)


def part_of(kind: TensorKind) -> PartName:
    """Which part of a model a tensor belongs to."""
    if kind.is_language:
        return "language"
    return "vision" if kind.path[0] == "vision" else "projector"


def _prefix(kind: TensorKind) -> str:
    """What names begin with, up to the number of the layer."""
    return kind.pattern.partition("{")[0]


def is_table(kind: TensorKind) -> bool:
    """Whether its rows are tokens."""
    return kind.path == EMBEDDING or kind.path[0] == "head"


def parts_of(one: Input, like: Input) -> Parts:
    """The tensors of an input, laid out as those of another one."""
    outside: dict[Key, Named] = {}
    found: dict[tuple[PartName, str], dict[int, dict[Key, Named]]] = {}
    suffixes: dict[tuple[PartName, str], dict[Key, str]] = {}
    of_language = {_prefix(kind) for kind in one.found.kinds if kind.is_language}
    for own in one.found.kinds:
        kind, renamed = _laid_out(one, own, like)
        counts: dict[int, int] = {}
        prefix = _prefix(kind)
        for index, name in enumerate(kind.names):
            known = Named(renamed.get(name, name), kind, called_by_mergekit(name, one.found.family))
            number = None if kind.layers[index] is None else _DIGITS.match(name, len(prefix))
            if number is None:
                outside[kind.paths, index] = known
                continue
            # Layers that read images may stand among those of the language model.
            part: PartName = "language" if prefix in of_language else part_of(kind)
            layer, place = int(number.group()), (part, prefix)
            key = (kind.paths, counts.get(layer, 0))
            counts[layer] = key[1] + 1
            found.setdefault(place, {}).setdefault(layer, {})[key] = known
            suffixes.setdefault(place, {})[key] = name[number.end() :]
    for name in one.found.copies:
        kind = dataclasses.replace(outside[TABLE].kind, paths=(HEAD,), pattern=name, names=(name,))
        outside[HEADS] = Named(name, kind, name, tied=True)
    stacks = [Stack(part, prefix, layers, suffixes[part, prefix]) for (part, prefix), layers in found.items()]
    return Parts(outside, tuple(stacks))


def called_by_mergekit(name: str, family: str) -> str:
    """What mergekit calls a tensor."""
    if re.split(r"[/+@]", family)[0] in _FUSED:
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
    return name


def _laid_out(one: Input, own: TensorKind, like: Input) -> tuple[TensorKind, dict[str, str]]:
    """A kind laid out as another input has it, and the names that its tensors got in the input."""
    theirs = like.holders.get(own.path)
    if one is like or theirs is None or own.lies_as(theirs):
        return own, {}
    try:
        other = one.laid_out_as(like.found.family)
    except UserError:  # it has what that family has no name for; shapes and names will tell
        return own, {}
    kind = next(kind for kind in other.kinds if own.path in kind.paths)
    renamed = {name: f"{name} (laid out anew)" for name in kind.names}
    for name, new in renamed.items():
        one.relaid[new] = other.tensors[name]
    return kind, renamed
