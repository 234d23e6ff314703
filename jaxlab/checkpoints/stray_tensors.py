"""Tensors whose names a wrapper changed, or that the user asked to leave out."""

import dataclasses
import fnmatch
import re
import warnings
from collections.abc import Iterable

from jaxlab.checkpoints.tensor_folder import TensorFolder
from jaxlab.errors import UserError, UserNote

_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""Put by torch.compile, FSDP, activation checkpointing and Lightning anywhere into a name."""
_PARALLEL = "module."
"""Put by DistributedDataParallel and DeepSpeed before every name."""


def unwrapped(folder: TensorFolder) -> TensorFolder:
    """The folder with the names of the model itself; a note where they were others.

    Raises:
      UserError: two tensors would have one name.
    """
    parallel = bool(folder.tensors) and all(name.startswith(_PARALLEL) for name in folder)
    strip = lambda name: _WRAPPERS.sub("", name.removeprefix(_PARALLEL) if parallel else name)
    names = {name: strip(name) for name in folder}
    changed = [name for name, bare in names.items() if name != bare]
    if not changed:
        return folder
    tensors = {bare: dataclasses.replace(folder[name], name=bare) for name, bare in names.items()}
    if len(tensors) < len(names):
        bare = next(bare for name, bare in names.items() if name != bare and bare in folder)
        raise UserError(f"{folder.path}: holds {bare} under two names, one of a wrapped model; drop one")
    first = changed[0]
    warnings.warn(
        f"{folder.path}: {len(changed)} tensors have a wrapper's names; {first} is read as {names[first]}",
        UserNote,
        stacklevel=2,
    )
    return dataclasses.replace(folder, tensors=tensors)


def without(folder: TensorFolder, patterns: Iterable[str]) -> TensorFolder:
    """The folder without the tensors that match a pattern: a name, or one with * and ? for what varies.

    Raises:
      UserError: no tensor matches one of them.
    """
    left = dict(folder.tensors)
    for pattern in patterns:
        found = fnmatch.filter(folder, pattern)
        if not found:
            raise UserError(f"{folder.path}: --ignore-tensors {pattern}: it holds no such tensor")
        warnings.warn(
            f"{folder.path}: tensors ignored, as you asked: {pattern} ({len(found)})", UserNote, stacklevel=2
        )
        for name in found:
            left.pop(name, None)  # an earlier pattern may have taken it
    return folder if len(left) == len(folder) else dataclasses.replace(folder, tensors=left)
