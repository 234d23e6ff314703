"""A file of statistics: measured once, for recipes of the same operator and the same models."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.checkpoints import Tensor, read_header, read_metadata
from jaxlab.errors import UserError
from jaxlab.files import write_atomic
from jaxlab.merging.plan import Input, MergePlan, PlannedTensor
from jaxlab.merging.statistics import Statistics

_SAMPLE = 4096
"""Elements of a row that a fingerprint reads."""
_AGAIN = "measure them again with data:, or name the file of these"
_OF_MERGED = ("adamerging", "regmean_plusplus")
"""Operators whose statistics are measured in what their own merge makes."""


def save_statistics(
    path: str | Path, operator: str, inputs: Sequence[Input], plan: MergePlan, statistics: Statistics
) -> None:
    """Writes statistics into a safetensors file, whole or not at all: `model/name` for each model's; with the
    operator and the models that they are of, and the numbers of the merge where they were measured in it.

    Args:
      inputs: the models of the merge, the base last.
      plan: the merge that they were measured for.

    Raises:
      UserError: the file exists or cannot be written.
    """
    from safetensors.numpy import save

    check_new(path)
    tensors = {
        f"{i}/{name}": np.ascontiguousarray(value, np.float32).reshape(np.shape(value))
        for name, own in statistics.items()
        for i, value in enumerate(own)
        if value is not None
    }
    models = [[one.role, str(one.model.path), fingerprint(one)] for one in inputs]
    metadata = {"operator": _measured(operator), "models": json.dumps(models)}
    if _measured(operator) in _OF_MERGED:
        metadata["numbers"] = json.dumps(_numbers(_measured(operator), plan))
    write_atomic(Path(path), save(tensors, metadata=metadata))


def check_new(path: str | Path) -> None:
    """Whether a file of statistics can be made there; to be asked before they are measured.

    Raises:
      UserError: the file exists, or its folder does not.
    """
    if Path(path).exists():
        raise UserError(f"{path}: exists already; a file of statistics is never replaced")
    if not Path(path).parent.is_dir():
        raise UserError(f"{path}: no folder {Path(path).parent} to write statistics into")


def check_statistics_file(
    path: str | Path, operator: str, inputs: Sequence[Input], plan: MergePlan
) -> dict[str, Tensor]:
    """The tensors of a file that `save_statistics` wrote, unread, if they are of this operator and these
    models and fit a plan.

    Raises:
      UserError: they do not.
    """
    stored, metadata = read_header(path), read_metadata(path)
    try:
        models = [
            (str(role), str(name), str(digest)) for role, name, digest in json.loads(metadata["models"])
        ]
        made_for = metadata["operator"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: does not say of which operator and models it holds statistics; {_AGAIN}"
        ) from None
    listed = ", ".join(f"{role} {name}" for role, name, _ in models)
    if made_for != _measured(operator):
        raise UserError(
            f"{path}: holds statistics for {made_for} (of {listed}), not for {operator}; {_AGAIN}"
        )
    if [role for role, _, _ in models] != [one.role for one in inputs]:
        here = ", ".join(one.role for one in inputs)
        raise UserError(f"{path}: holds statistics for {made_for} of {listed}; here are {here}; {_AGAIN}")
    for (role, name, digest), one in zip(models, inputs, strict=True):
        if digest != fingerprint(one):
            raise UserError(
                f"{path}: holds statistics for {made_for} of {listed}; its {role} {name} is another model "
                f"than {one.model.path}; {_AGAIN}"
            )
    if made_for in _OF_MERGED:
        _check_numbers(path, made_for, metadata.get("numbers"), plan)
    for tensor in plan.tensors:
        if tensor.merging is None:
            continue
        for i in range(len(tensor.merging.sources)):
            found = stored.get(f"{i}/{tensor.name}")
            want, needed = _expected(made_for, tensor)
            if found is None and needed:
                raise UserError(f"{path}: has no statistics of {tensor.name} for {inputs[i].role}; {_AGAIN}")
            if found is not None and (found.shape != want or found.dtype != np.float32):
                raise UserError(
                    f"{path}: {found.name}: {found.dtype} {list(found.shape)}; {made_for} takes float32 "
                    f"{list(want)} here; {_AGAIN}"
                )
    return stored


def load_statistics(
    path: str | Path, operator: str, inputs: Sequence[Input], plan: MergePlan
) -> dict[str, list[Any]]:
    """The statistics that `save_statistics` wrote, for the tensors of a plan.

    Raises:
      UserError: it is no such file, or they are of something else; see `check_statistics_file`.
    """
    stored = check_statistics_file(path, operator, inputs, plan)
    result = {}
    for tensor in plan.tensors:
        if tensor.merging is not None:
            own = [stored.get(f"{i}/{tensor.name}") for i in range(len(tensor.merging.sources))]
            result[tensor.name] = [None if x is None else x.read() for x in own]
    return result


def fingerprint(one: Input) -> str:
    """A digest of a model that does not read it whole: of each tensor its name, dtype and shape, and what
    begins its first, middle and last row."""
    digest = hashlib.sha256()
    for name, tensor in sorted(one.found.tensors.items()):
        digest.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
        if tensor.size == 0:
            continue
        count = tensor.shape[0] if tensor.shape else 1
        for row in dict.fromkeys((0, count // 2, count - 1)):
            digest.update(np.ascontiguousarray(tensor.read_rows(row, row + 1).ravel()[:_SAMPLE]).tobytes())
    return digest.hexdigest()


def _numbers(operator: str, plan: MergePlan) -> dict[str, str]:
    """Of statistics that were measured in the merged model: what that is made with besides the models. A
    digest, and lines for people."""
    steps = [(tensor.name, tensor.merging) for tensor in plan.tensors if tensor.merging is not None]
    made: list[Any] = [(name, step.weights, step.rows) for name, step in steps]
    told: dict[str, set[Any]] = {"weights": {step.weights for _, step in steps}}
    if operator != "adamerging":  # its coefficients are learned on sums of task vectors
        made = [
            (*own, step.operator, step.mode, step.parameters)
            for own, (_, step) in zip(made, steps, strict=True)
        ]
        told["parameters"] = {tuple(f"{k} {v}" for k, v in step.parameters) for _, step in steps}
    listed = lambda values: ", ".join(map(str, values)) or "none"
    lines = {
        name: listed(next(iter(values)) or ()) if len(values) == 1 else "that differ from tensor to tensor"
        for name, values in told.items()
    }
    return {"digest": hashlib.sha256(repr(sorted(made)).encode()).hexdigest(), **lines}


def _check_numbers(path: str | Path, operator: str, stored: str | None, plan: MergePlan) -> None:
    """Whether statistics that were measured in the merged model are of a merge with these numbers.

    Raises:
      UserError: they are of other numbers, or it is not known of which.
    """
    here = _numbers(operator, plan)
    try:
        made = json.loads(stored or "")
        digest, told = made["digest"], {name: str(made[name]) for name in here if name != "digest"}
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: does not say of which weights it holds statistics, and those of {operator} depend on "
            f"them; {_AGAIN}"
        ) from None
    if digest != here["digest"]:
        each = [f"{name} {told[name]} (here {here[name]})" for name in told if told[name] != here[name]]
        of = "; ".join(each) or "tensors or rows that are merged otherwise here"
        raise UserError(
            f"{path}: {operator} measures in the merged model, and this holds statistics of {of}; {_AGAIN}"
        )


def _measured(operator: str) -> str:
    """What is done to the result afterwards needs no statistics of its own."""
    return operator.partition("+")[0]


def _expected(operator: str, tensor: PlannedTensor) -> tuple[tuple[int, ...], bool]:
    """The shape of one model's statistics of a tensor, and whether there have to be any."""
    assert tensor.merging is not None
    if operator == "adamerging":
        return (), True
    if operator in ("regmean", "regmean_plusplus"):
        return tensor.shape[-1:] * 2, False
    return tensor.merging.merged_shape(tensor.shape), True
