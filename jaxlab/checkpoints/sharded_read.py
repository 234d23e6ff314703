"""Tensors of a folder straight to where the leaves live: each is read once and transposed on the way.

The host holds the buffers of the leaves that one kind of tensor belongs to, and one tensor. On a CPU those
buffers become the parameters themselves; otherwise they are gone once they have been sent.
"""

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
            values = tensors[name].read()
            report_not_finite(name, values, not_finite)
            if entry.path == EMBEDDING:
                _check_copies(tensors, account, name, values)
            _fill(entry, index, values, targets)
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

    def fill(self, index: int, values: np.ndarray) -> None:
        """The part of tensor number `index` that is this leaf's, in our layout."""
        at = np.unravel_index(index, self.shape[: self.lead]) if self.lead else ()
        for part, buffer in self.buffers.items():
            leading, own = part[: self.lead], part[self.lead :]
            if all(start <= i < stop for i, (start, stop) in zip(at, leading, strict=True)):
                place = tuple(int(i) - start for i, (start, _) in zip(at, leading, strict=True))
                copy_by_blocks(buffer[place], values[tuple(slice(*bounds) for bounds in own)])

    def place(self) -> jax.Array:
        """The array, on its devices; the buffers are given away."""
        arrays = [
            jax.device_put(self.buffers[self._ranges(index)], device)
            for device, index in self.devices.items()
        ]
        jax.block_until_ready(arrays)  # the buffers may go
        self.buffers = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def _fill(entry: Entry, index: int, values: np.ndarray, targets: list[_Target]) -> None:
    """One tensor into the leaves that it holds."""
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
