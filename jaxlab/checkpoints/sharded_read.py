"""Tensors of a folder straight to where the leaves live: each is read once and transposed on the way.

The host holds the buffers of the leaves that one kind of tensor belongs to, and one tensor. On a CPU those
buffers become the parameters themselves; otherwise they are gone once they have been sent.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxlab.checkpoints.blocked_copy import aligned_empty, copy_by_blocks
from jaxlab.checkpoints.formats.base import NotFinite, parameter_dtype, report_not_finite
from jaxlab.checkpoints.fused_qkv import split_fused
from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.checkpoints.tensor_map import Entry, leaf_at, tree_of
from jaxlab.checkpoints.tensor_table import EMBEDDING, LeafPath
from jaxlab.checkpoints.unexpected_tensors import TensorAccount
from jaxlab.errors import UserError
from jaxlab.models import Params

_ROWS_BYTES = 1 << 26


def read_params(
    tensors: Mapping[str, Tensor],
    account: TensorAccount,
    template: Params,
    *,
    shardings: Params | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    not_finite: NotFinite = "take",
) -> Params:
    """The parameters that an account without problems describes.

    Args:
      shardings: a tree like the parameters of `jax.sharding.Sharding`. None: the default device.
      dtype: of all parameters, instead of the one they are stored in.
      not_finite: what to do about NaN and infinities.

    Raises:
      UserError: a tied head that is not the embedding, stored dtypes that one leaf cannot hold, a file that
        cannot be read, or numbers that are not finite.
    """
    leaves: dict[LeafPath, Any] = {}
    dtypes = {entry.pattern: leaf_dtype(tensors, entry, dtype) for entry in account.entries}
    for entry in account.entries:
        targets = []
        for path in entry.paths:
            where = _default() if shardings is None else leaf_at(shardings, path)
            targets.append(_Target(leaf_at(template, path).shape, dtypes[entry.pattern], where, entry))
        for index, name in enumerate(entry.names):
            whole = entry.path == EMBEDDING and account.copies
            rows = _rows_here(entry, index, targets, tensors[name].shape, whole=bool(whole))
            if rows is None:  # of devices of other hosts
                continue
            values = tensors[name].read_rows(*rows)
            report_not_finite(name, values, not_finite)
            if whole:
                _check_copies(tensors, account, name, values)
            _fill(entry, index, values, targets, rows[0])
        leaves |= {path: target.place() for path, target in zip(entry.paths, targets, strict=True)}
    return tree_of(leaves)


def leaf_dtype(
    tensors: Mapping[str, Tensor], entry: Entry, wanted: jax.typing.DTypeLike | None = None
) -> np.dtype:
    """Of the leaves of an entry.

    Raises:
      UserError: tensors differ, or jax has no such dtype.
    """
    if wanted is not None:
        return parameter_dtype(wanted)
    stored = {tensors[name].dtype for name in entry.names}
    first = next(iter(stored))
    if len(stored) > 1 or first.itemsize not in (2, 4):
        names = ", ".join(sorted(dtype.name for dtype in stored))
        raise UserError(
            f"{entry.pattern} is stored in {names}; convert the model with --dtype float32 or bfloat16 first"
        )
    return first


class _Target:
    """One leaf on its way: a buffer for each different part of it that devices here hold."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, entry: Entry) -> None:
        self.shape, self.dtype, self.sharding, self.lead = shape, dtype, sharding, entry.lead
        self.own = shape[entry.lead :]
        self.devices = sharding.addressable_devices_indices_map(shape)
        self.parts = {self._ranges(index) for index in self.devices.values()}
        self.buffers = {
            part: aligned_empty(tuple(stop - start for start, stop in part), dtype) for part in self.parts
        }

    def _ranges(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        slices = index if index is not None else (slice(None),) * len(self.shape)
        return tuple(s.indices(size)[:2] for s, size in zip(slices, self.shape, strict=True))

    def here(self, index: int) -> list[tuple[np.ndarray, tuple[tuple[int, int], ...]]]:
        """Of tensor number `index`: the buffers for parts of it on this host, and which parts."""
        at = np.unravel_index(index, self.shape[: self.lead]) if self.lead else ()
        found = []
        for part, buffer in self.buffers.items():
            leading, own = part[: self.lead], part[self.lead :]
            if all(start <= i < stop for i, (start, stop) in zip(at, leading, strict=True)):
                place = tuple(int(i) - start for i, (start, _) in zip(at, leading, strict=True))
                found.append((buffer[place], own))
        return found

    def fill(self, index: int, values: np.ndarray, axis: int = 0, first: int = 0) -> None:
        """What of tensor number `index` is on this host.

        Args:
          values: of the tensor, in our layout, from number `first` of `axis` on.
        """
        for buffer, own in self.here(index):
            starts = [first if i == axis else 0 for i in range(len(own))]
            cut = (slice(start - at, stop - at) for (start, stop), at in zip(own, starts, strict=True))
            copy_by_blocks(buffer, values[tuple(cut)])

    def place(self) -> jax.Array:
        """The array, on its devices; the buffers are given away."""
        arrays = [
            jax.device_put(self.buffers[self._ranges(index)], device)
            for device, index in self.devices.items()
        ]
        jax.block_until_ready(arrays)  # the buffers may go
        self.buffers = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def _rows_here(
    entry: Entry, index: int, targets: list[_Target], shape: tuple[int, ...], *, whole: bool
) -> tuple[int, int] | None:
    """The rows of tensor number `index` that devices of this host hold a part of; None: of no row."""
    parts = [own for target in targets for _, own in target.here(index)]
    height = shape[0] if shape else 1
    if whole or (parts and (len(targets) > 1 or not _row_axis(entry))):
        return 0, height
    if not parts:
        return None
    axis = entry.layout.ours.index(_row_axis(entry))
    each = height // max(targets[0].own[axis], 1)
    return min(own[axis][0] for own in parts) * each, max(own[axis][1] for own in parts) * each


def _row_axis(entry: Entry) -> str:
    """The axis of ours that the rows of theirs are counted by first; "": there is none."""
    return next(iter(entry.layout.theirs[0] if entry.layout.theirs else ()), "")


def _fill(entry: Entry, index: int, values: np.ndarray, targets: list[_Target], row: int) -> None:
    """One tensor, from `row` on, into the leaves that it holds."""
    if len(targets) == 1 and _row_axis(entry):
        target, axis = targets[0], entry.layout.ours.index(_row_axis(entry))
        each = math.prod(target.own[entry.layout.ours.index(inner)] for inner in entry.layout.theirs[0][1:])
        shape = (*target.own[:axis], len(values) // max(each, 1), *target.own[axis + 1 :])
        cast = values if values.dtype == target.dtype else values.astype(target.dtype)
        target.fill(index, np.asarray(entry.layout.to_ours(cast, shape)), axis, row // max(each, 1))
        return
    own = [target.own for target in targets]
    parts = split_fused(values, entry.layout, entry.join, own, runs=entry.runs)
    for target, part in zip(targets, parts, strict=True):
        if part.dtype != target.dtype:
            part = part.astype(target.dtype)
        target.fill(index, np.asarray(entry.layout.to_ours(part, target.own)))


def _check_copies(
    tensors: Mapping[str, Tensor], account: TensorAccount, name: str, table: np.ndarray
) -> None:
    """Whether a tied head that is written out is the embedding.

    Raises:
      UserError: it is not, bit for bit.
    """
    for copy in account.copies:
        head = tensors[copy]
        rows = max(1, _ROWS_BYTES // max(1, head.nbytes // head.shape[0]))
        same = head.dtype == table.dtype and all(
            head.read_rows(i, min(i + rows, len(table))).tobytes() == table[i : i + rows].tobytes()
            for i in range(0, len(table), rows)
        )
        if not same:
            raise UserError(
                f"{copy} differs from {name}, but config.json ties the two; set tie_word_embeddings to false "
                f"if the head is one of its own, or pass --ignore-tensors {copy}"
            )


def _default() -> Sharding:
    return SingleDeviceSharding(jax.devices()[0])
