"""Checkpoints in float8: dequantised as they are read, with the scales that stand beside the weights.

Two forms are known: a scale for each block of a matrix (`<name>_scale_inv`, DeepSeek-V3, arXiv 2412.19437),
and a scale for a tensor or for each of its rows (`<name>_scale`, compressed-tensors and others). MXFP4 stands
in mxfp4.py.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from jaxlab.checkpoints import mxfp4
from jaxlab.checkpoints.foreign_forms import packed_form
from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.checkpoints.tensor_folder import TensorFolder
from jaxlab.errors import UserError

QUANTIZED = "quantization_config"
METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8", mxfp4.METHOD)
_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", ".k_scale", ".v_scale")
"""Scales of activations and of caches of keys and values; ours are not quantised, so they are left out."""
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def dequantized(folder: TensorFolder) -> TensorFolder:
    """The folder with float8 weights as bfloat16 (or the dtype that config.json names), scales consumed.

    Raises:
      UserError: another kind of quantisation; a weight without a scale, or a scale without a weight.
    """
    packed = packed_form(folder, folder.config)
    if packed is not None:
        raise UserError(f"{folder.path}: quantised: {packed}; not read; take a checkpoint in bf16")
    quantized = folder.config.get(QUANTIZED)
    if quantized is None:
        if any(tensor.dtype in _FLOAT8 for tensor in folder.values()):
            raise UserError(f"{folder.path}: holds float8 tensors, but config.json has no {QUANTIZED}")
        return folder
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if method not in METHODS:
        raise UserError(
            f"{folder.path}: quantised with {method!r}; only {', '.join(METHODS)} are read; "
            "take a checkpoint in bf16"
        )
    block = quantized.get("weight_block_size")
    others = {"float32": np.float32, "float16": np.float16}
    dtype = np.dtype(others.get(_stored(folder), ml_dtypes.bfloat16))
    config = {key: value for key, value in folder.config.items() if key != QUANTIZED}
    if method == mxfp4.METHOD:
        return dataclasses.replace(mxfp4.unpacked(folder, dtype), config=config)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in folder.items():
        if name.endswith(("_scale_inv", "_scale")) and name.rpartition("_scale")[0] in folder:
            weight = name.rpartition("_scale")[0]
            if weight in scales:
                raise UserError(f"{folder.path}: {weight} has two scales, {scales[weight].name} and {name}")
            scales[weight] = tensor
        elif not name.endswith(_ACTIVATIONS):
            tensors[name] = tensor
    for name, tensor in tensors.items():
        if name.endswith(("_scale_inv", "weight_scale")):
            raise UserError(f"{folder.path}: the scale {name} has no weight")
        if tensor.dtype in _FLOAT8:
            if name not in scales:
                raise UserError(f"{folder.path}: the float8 tensor {name} has no scale")
            tensors[name] = _scaled(tensor, scales[name], block, dtype)
        elif name in scales:
            raise UserError(f"{folder.path}: {name} has a scale, but is {tensor.dtype.name}")
    return dataclasses.replace(folder, config=config, tensors=tensors)


def _stored(folder: TensorFolder) -> str:
    text = folder.config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    found = (c.get(key) for c in (folder.config, inner) for key in ("dtype", "torch_dtype"))
    return str(next(filter(None, found), "bfloat16"))


def _scaled(tensor: Tensor, scale: Tensor, block: Any, dtype: np.dtype) -> Tensor:
    """The weight times its scale, rounded once."""
    rows, columns = (1, 1) if block is None else _block(tensor, block)
    if not _fits(tensor, scale, block, rows, columns):
        raise UserError(f"{scale.name}: its shape {list(scale.shape)} does not fit {list(tensor.shape)}")

    def read_rows(start: int, stop: int) -> np.ndarray:
        values = tensor.read_rows(start, stop).astype(np.float32)
        factor = scale.read().astype(np.float32)
        if block is not None:
            of_rows = factor[np.arange(start, stop) // rows]
            factor = np.repeat(of_rows, columns, axis=1)[:, : tensor.shape[1]]
        elif factor.size > 1:
            factor = factor.reshape(-1)[start:stop].reshape(-1, *(1,) * (values.ndim - 1))
        else:
            factor = factor.reshape(())
        return (values * factor).astype(dtype)

    return Tensor(tensor.name, dtype, tensor.shape, read_rows)


def _block(tensor: Tensor, block: Any) -> tuple[int, int]:
    whole = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if not whole or len(tensor.shape) != 2:
        raise UserError(f"{tensor.name}: weight_block_size is {block!r} for a tensor {list(tensor.shape)}")
    return block[0], block[1]


def _fits(tensor: Tensor, scale: Tensor, block: Any, rows: int, columns: int) -> bool:
    if block is not None:
        return scale.shape == (-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
    per_row = bool(tensor.shape) and scale.shape in ((tensor.shape[0],), (tensor.shape[0], 1))
    return scale.size == 1 or per_row
