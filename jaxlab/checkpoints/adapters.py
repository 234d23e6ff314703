"""LoRA adapters of a model in our layout: which matrices can have one, and how PEFT names and stores them.

`lora.py` reads adapters that PEFT wrote; both go by the same names.
"""

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from jaxlab import distributed
from jaxlab.checkpoints import families
from jaxlab.checkpoints.fused_qkv import join_fused
from jaxlab.checkpoints.lora import CONFIG, PREFIX, TENSORS
from jaxlab.checkpoints.output_folder import write_aside
from jaxlab.checkpoints.tensor_map import Entry, entries, leaf_at, to_hf
from jaxlab.checkpoints.tensor_table import EMBEDDING, HEAD, Layout, LeafPath
from jaxlab.errors import UserError
from jaxlab.files import writing
from jaxlab.models import ModelConfig, Params, abstract_params

ALL_LINEAR = "all-linear"
Kind = Literal["linear", "transposed", "embedding"]
_MEMORY = ("memory_flat", "memory")
"""Variants of a family whose names are those of its modules in transformers, the newest first."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Matrices of one name in all layers, which may have adapters: a leaf of ours, or leaves fused there."""

    entry: Entry
    kind: Kind
    """linear: stored [out, in]. transposed: [in, out] (GPT-2). embedding: a row for each token."""

    @property
    def module(self) -> str:
        """What the module is called, with {i} for the layer."""
        return self.entry.pattern.removesuffix(".weight")

    @property
    def ends(self) -> str:
        """The last word of that, by which targets are told."""
        return self.module.removesuffix(".{branch}").rpartition(".")[2]

    @property
    def part(self) -> str:
        """language, vision or projector."""
        first = self.entry.path[0]
        return first if first in ("vision", "projector") else "language"

    @property
    def ins(self) -> tuple[str, ...]:
        """Axes of our leaf that are the matrix's input."""
        return self.entry.layout.theirs[1 if self.kind == "linear" else 0]

    @property
    def outs(self) -> tuple[str, ...]:
        return self.entry.layout.theirs[0 if self.kind == "linear" else 1]

    def shapes(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a and b (see `jaxlab.models.LowRank`) beside a leaf of `shape`."""
        lead, ins = shape[: self.entry.lead], len(self.ins)
        own = shape[self.entry.lead :]
        return (*lead, *own[:ins], rank), (*lead, rank, *own[ins:])

    def axes(self, axes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The logical axes of a and b beside a leaf with `axes`."""
        lead, ins = axes[: self.entry.lead], len(self.ins)
        own = axes[self.entry.lead :]
        return (*lead, *own[:ins], "rank"), (*lead, "rank", *own[ins:])


def matrices(params: Params, config: ModelConfig) -> tuple[Matrix, ...]:
    """The matrices of a model that can have adapters, by the names of its modules in transformers.

    Experts, routers, tables of positions and what is no matrix have none.

    Args:
      params: its parameters, or their shapes.
    """
    return tuple(m for entry in entries(params, memory_family(config.family)) if (m := _matrix(entry)))


def _matrix(entry: Entry) -> Matrix | None:
    groups, ours = entry.layout.theirs, entry.layout.ours
    unfit = "moe" in entry.path or "position" in entry.path or "{e}" in entry.pattern
    if len(groups) != 2 or unfit or not entry.pattern.endswith(".weight"):
        return None
    if entry.path == EMBEDDING:
        return Matrix(entry, "embedding")
    if ours == groups[1] + groups[0]:
        return Matrix(entry, "linear")
    return Matrix(entry, "transposed") if ours == groups[0] + groups[1] else None


def memory_family(family: str) -> str:
    """The variant of a family whose names are those of transformers' modules."""
    if family == "jaxlab":
        return family
    own = family.partition("/")[0]
    variants = families.find(own).variants
    return next((f"{own}/{word}" for word in _MEMORY if word in variants), own)


def find_targets(found: Sequence[Matrix], targets: Sequence[str], parts: Sequence[str]) -> tuple[Matrix, ...]:
    """The matrices that targets name: the last words of modules, like q_proj, more of their names, like
    self_attn.q_proj, or all-linear for all but embedding and head.

    Args:
      parts: of the model, to which targets are confined: language, vision, projector.

    Raises:
      UserError: a target matches nothing.
    """
    chosen: dict[str, Matrix] = {}
    of_parts = [matrix for matrix in found if matrix.part in parts]
    for target in targets:
        hits = [matrix for matrix in of_parts if _matches(matrix, target)]
        if not hits:
            names = sorted({matrix.ends for matrix in of_parts})
            close = get_close_matches(target.rpartition(".")[2], names, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {ALL_LINEAR}, {', '.join(names)}"
            where = " and ".join(parts)
            raise UserError(f"lora.targets: no matrix of the model's {where} is called {target!r}; {hint}")
        chosen |= {matrix.module: matrix for matrix in hits}
    return tuple(matrix for matrix in found if matrix.module in chosen)


def _matches(matrix: Matrix, target: str) -> bool:
    if target == ALL_LINEAR:
        return matrix.kind != "embedding" and matrix.entry.path != HEAD
    name = matrix.module.removesuffix(".{branch}")
    return name == target or name.endswith(f".{target}")


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What adapter_config.json says of an adapter."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rank stabilisation (arXiv 2312.03732)."""
        return self.alpha / self.rank**0.5 if self.rslora else self.alpha / self.rank


def save_adapter(
    path: str | os.PathLike[str],
    adapters: Mapping[LeafPath, tuple[Any, Any]],
    targets: Sequence[Matrix],
    settings: AdapterSettings,
    shapes: Params,
    *,
    base: str,
    base_identity: str,
    causal_lm: bool = True,
    replaced: Mapping[str, np.ndarray] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> None:
    """Writes a folder that PEFT loads: adapter_config.json and adapter_model.safetensors.

    Where one tensor of theirs holds several leaves of ours, each with an adapter, theirs has all of them side
    by side in a rank that is so many times as large.

    Args:
      adapters: (a, b) by the path of each leaf.
      targets: the matrices that have them.
      shapes: of the whole model.
      base: the model that they are for, as `base_model_name_or_path`.
      base_identity: its digest, kept in the header of the tensors.
      replaced: whole tensors that were trained too, by the names of their modules' parameters in memory
        (PEFT's modules_to_save).
      inputs: what is never replaced (see `write_aside`).

    Raises:
      UserError: `path` may not be written, or the disk is full.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    modules: list[str] = []
    for matrix in targets:
        leaves = [adapters[leaf] for leaf in matrix.entry.paths]
        owns = [leaf_at(shapes, leaf).shape[matrix.entry.lead :] for leaf in matrix.entry.paths]
        for index, name in enumerate(matrix.entry.names):
            module = name.removesuffix(".weight")
            of_one = [tuple(_flat(part, matrix)[index] for part in leaf) for leaf in leaves]
            a, b = _in_their_layout(of_one, owns, matrix)
            infix = "lora_embedding_" if matrix.kind == "embedding" else "lora_"
            ending = "" if matrix.kind == "embedding" else ".weight"
            tensors[f"{PREFIX}{module}.{infix}A{ending}"] = a
            tensors[f"{PREFIX}{module}.{infix}B{ending}"] = b
            modules.append(module)
            if len(leaves) > 1:
                ranks[module] = a.shape[0]
    for name, value in (replaced or {}).items():
        tensors[PREFIX + name] = value
    # Of a module of several leaves alpha grows as the scale needs it.
    grown = {
        module: settings.alpha * (rank / settings.rank) ** (0.5 if settings.rslora else 1)
        for module, rank in ranks.items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal_lm else None,
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": _number(settings.alpha),
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": sorted(modules),
        "rank_pattern": {f"^{module}": rank for module, rank in ranks.items()},
        "alpha_pattern": {f"^{module}": _number(alpha) for module, alpha in grown.items()},
        "modules_to_save": sorted({name.rpartition(".")[0] for name in replaced or {}}) or None,
        "fan_in_fan_out": any(matrix.kind == "transposed" for matrix in targets),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    metadata = {"format": "pt", "base_model": base, "base_identity": base_identity}
    with writing(path), write_aside(path, inputs, overwrite=overwrite) as folder:
        if distributed.is_main():
            save_file(tensors, folder / TENSORS, metadata)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def whole_tensors(
    trained: Params, leaves: Collection[LeafPath], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Tensors by their names in transformers of leaves that are trained whole, on the host.

    Raises:
      UserError: a tensor of theirs holds other leaves too.
    """
    found = {}
    shapes = abstract_params(config)
    for entry in entries(shapes, memory_family(config.family)):
        ours = [path for path in entry.paths if path in leaves]
        if not ours:
            continue
        if len(ours) < len(entry.paths):
            raise UserError(f"lora.also: {entry.pattern} is trained in part only; name all of it")
        for name, value in zip(entry.names, np.asarray(to_hf(trained, entry)), strict=True):
            found[name] = np.ascontiguousarray(value)
    return found


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _flat(leaf: Any, matrix: Matrix) -> np.ndarray:
    """The leaf with one axis for all that count matrices."""
    lead = matrix.entry.lead
    return np.asarray(leaf).reshape(len(matrix.entry.names), *leaf.shape[lead:])


def _in_their_layout(
    leaves: Sequence[tuple[np.ndarray, ...]], owns: Sequence[tuple[int, ...]], matrix: Matrix
) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r] of one module from a and b of its leaves."""
    rank = leaves[0][0].shape[-1]
    total = rank * len(leaves)
    of_a = Layout((("rank",), matrix.ins), (*matrix.ins, "rank"))
    of_b = Layout((matrix.outs, ("rank",)), ("rank", *matrix.outs))
    parts_a = [np.asarray(of_a.to_theirs(a)) for a, _ in leaves]
    wide = []
    for index, (_, b) in enumerate(leaves):
        padded = np.zeros((total, *b.shape[1:]), b.dtype)
        padded[index * rank : (index + 1) * rank] = b
        wide.append(padded)
    parts_b = [np.asarray(of_b.to_theirs(b)) for b in wide]
    shapes = [(total, *own[len(matrix.ins) :]) for own in owns]
    joined = join_fused(parts_b, of_b, 0, shapes, runs=matrix.entry.runs, module=np)
    return np.ascontiguousarray(np.concatenate(parts_a)), np.ascontiguousarray(joined)
