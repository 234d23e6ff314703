"""Checkpoints in MXFP4 (OCP Microscaling Formats, 2023), as gpt-oss has it: unpacked as they are read.

A matrix of the experts is two tensors: `<name>_blocks` uint8[E, rows, groups, 16], two numbers of 4 bits in a
byte, the lower half first, and `<name>_scales` uint8[E, rows, groups], an exponent of 2 (biased by 127) for
each group of 32. `<name>` is [E, columns, rows]: it lies the other way round.
"""

import dataclasses

import numpy as np

from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.checkpoints.tensor_folder import TensorFolder
from jaxlab.errors import UserError

METHOD = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32
"""Numbers that share an exponent."""
_BIAS = 127
_NO_NUMBER = 255
"""A scale that means NaN."""
_VALUES = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_VALUES, -_VALUES])
"""Of the 16 codes of E2M1; the highest bit is the sign."""


def unpacked(folder: TensorFolder, dtype: np.dtype) -> TensorFolder:
    """The folder with packed tensors as numbers; bfloat16 holds every one of them exactly.

    Raises:
      UserError: blocks without scales or scales without blocks, shapes or dtypes that do not fit each other,
        or a plain tensor of the name that blocks have.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in folder.items():
        if name.endswith(_SCALES):
            if name.removesuffix(_SCALES) + _BLOCKS not in folder:
                raise UserError(f"{folder.path}: the scale {name} has no blocks")
        elif name.endswith(_BLOCKS):
            whole = name.removesuffix(_BLOCKS)
            if whole in folder:
                raise UserError(f"{folder.path}: {whole} stands there twice, packed too")
            if whole + _SCALES not in folder:
                raise UserError(f"{folder.path}: the packed tensor {name} has no scales")
            tensors[whole] = _unpacked(whole, tensor, folder[whole + _SCALES], dtype)
        else:
            tensors[name] = tensor
    return dataclasses.replace(folder, tensors=tensors)


def _unpacked(name: str, blocks: Tensor, scales: Tensor, dtype: np.dtype) -> Tensor:
    bytes_only = blocks.dtype == scales.dtype == np.uint8
    if not bytes_only or len(blocks.shape) != 4 or blocks.shape != (*scales.shape, _GROUP // 2):
        raise UserError(
            f"{blocks.name}: {blocks.dtype.name}{list(blocks.shape)} does not fit {scales.name}, "
            f"{scales.dtype.name}{list(scales.shape)}"
        )
    experts, rows, groups, _ = blocks.shape

    def read_rows(start: int, stop: int) -> np.ndarray:
        packed, exponents = blocks.read_rows(start, stop), scales.read_rows(start, stop)
        if (exponents == _NO_NUMBER).any():
            raise UserError(f"{scales.name} holds NaN")
        values = np.empty((*packed.shape[:3], _GROUP), np.float32)
        values[..., 0::2], values[..., 1::2] = _NUMBERS[packed & 15], _NUMBERS[packed >> 4]
        values = np.ldexp(values, exponents.astype(np.int32)[..., None] - _BIAS)
        return values.astype(dtype).reshape(-1, rows, groups * _GROUP).swapaxes(1, 2)

    return Tensor(name, dtype, (experts, groups * _GROUP, rows), read_rows)
