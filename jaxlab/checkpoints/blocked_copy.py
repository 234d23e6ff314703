"""Copies between arrays whose axes lie in different orders, by blocks that fit a processor's cache."""

import concurrent.futures
import functools
import os

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

BLOCK = 256
"""Rows and columns of a block; each is first gathered, since rows that are a power of two apart share one
set of the cache."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[ndarray, "..."]:
    """An array that jax takes over on a CPU without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def copy_by_blocks(target: Shaped[ndarray, "..."], source: Shaped[ndarray, "..."]) -> None:
    """target[...] = source, for two views of one shape and dtype."""
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(f"{source.dtype}{source.shape} into {target.dtype}{target.shape}")
    if target.size == 0:
        return
    kind = _UNSIGNED[target.dtype.itemsize]  # numpy copies dtypes that are not its own one by one
    _copy(*_merged(target.view(kind), source.view(kind)))


def _merged(target: ndarray, source: ndarray) -> tuple[ndarray, ndarray]:
    """Both with axes of size 1 left out, and axes joined that lie the same way in both."""
    axes: list[tuple[int, int, int]] = []  # size, stride of target, stride of source
    for size, to, of in zip(target.shape, target.strides, source.strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == to * size and axes[-1][2] == of * size:
            axes[-1] = (axes[-1][0] * size, to, of)
        else:
            axes.append((size, to, of))
    shape = tuple(size for size, _, _ in axes)
    view = np.lib.stride_tricks.as_strided
    return (
        view(target, shape, tuple(to for _, to, _ in axes)),
        view(source, shape, tuple(of for _, _, of in axes)),
    )


def _copy(target: ndarray, source: ndarray) -> None:
    if target.ndim > 2:
        for t, s in zip(target, source, strict=True):
            _copy(t, s)
    elif target.ndim < 2 or source.strides[0] >= source.strides[1] or target.size < BLOCK * BLOCK:
        np.copyto(target, source)
    else:
        rows = range(0, target.shape[0], BLOCK)
        list(_pool().map(functools.partial(_copy_rows, target, source), rows))


def _copy_rows(target: ndarray, source: ndarray, start: int) -> None:
    rows = slice(start, start + BLOCK)
    for left in range(0, target.shape[1], BLOCK):
        columns = slice(left, left + BLOCK)
        gathered = np.ascontiguousarray(source[rows, columns].T)  # in the source's order
        target[rows, columns] = gathered.T


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="blocks")
