"""The plan of a merge: for every tensor that will be written what is done, decided from headers alone.

A plan is plain data under Hugging Face names. planning.py makes it of a recipe of ours; anything else that
knows which tensors it wants can make one too: the sources of a tensor may have any names (a stacked layer has
another number than the one it came from), and models that are not named stay unread.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlab.checkpoints import (
    LeafPath,
    ModelTensors,
    OpenModel,
    Tensor,
    TensorKind,
    hf_family,
    model_tensors,
    tensors_laid_out_as,
)
from jaxlab.files import jsonable
from jaxlab.merging.account import AccountLine, Action, MergeAccount
from jaxlab.merging.numerics import Mode
from jaxlab.merging.vocabulary import CommonRows

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
    rows: tuple[tuple[int, int], ...] | None = None
    """Only these rows are merged, in runs (first row, how many) of what is written; the sources hold them
    first, in this order. None: all."""
    kept: Source | None = None
    """Where the other rows are, at their places."""
    layer: int | None = None
    """For operators that depend on depth; None outside of layers."""
    key: str | None = None
    """The name that random masks come from; None: the tensor's own."""
    task: int | None = None
    """Of operators that make a model for each task: which."""
    read_as: str | None = None
    """The dtype that the sources are rounded to before anything else."""

    def merged_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is merged of a tensor of this shape."""
        return shape if self.rows is None else (sum(count for _, count in self.rows), *shape[1:])

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
    common_rows: CommonRows | None = dataclasses.field(default=None, repr=False)
    """Of a table, those that are merged of every input; None: all, or none is."""

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

    def account(self, family: str = "jaxlab") -> MergeAccount:
        """The account, without digests.

        Args:
          family: whose names the tensors have.
        """
        lines = [
            AccountLine(t.name, t.pattern, t.action, t.models, t.reason, t.shape, t.dtype)
            for t in self.tensors
        ]
        return MergeAccount((*lines, *self.refused), family)

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
