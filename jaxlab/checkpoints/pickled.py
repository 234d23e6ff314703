"""PyTorch's .bin files without PyTorch and without running code: a pickle that may only describe tensors.

The format is a zip: `<name>/data.pkl` describes tensors as views of storages, `<name>/data/<key>` hold their
bytes. An unpickler that knows nothing but these descriptions reads the first; anything else is refused.
"""

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.errors import UserError

MAX_PICKLE = 100_000_000
STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
    "Float8_e4m3fnStorage": ml_dtypes.float8_e4m3fn, "Float8_e5m2Storage": ml_dtypes.float8_e5m2,
}  # fmt: skip


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that a file's state dict holds, by name; their bytes are read when they are asked for.

    Raises:
      UserError: not such a file, or one that holds anything but a flat dict of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            root = next(
                (name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None
            )
            if root is None:
                raise UserError(f"{path}: not a checkpoint of PyTorch: it holds no data.pkl")
            if members[f"{root}data.pkl"].file_size > MAX_PICKLE:
                raise UserError(f"{path}: its description is too large")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
            if order != b"little":
                raise UserError(f"{path}: its numbers are not little-endian")
            found = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of PyTorch 1.6 or newer ({str(error)[:100]})") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(f"{path}: its description is damaged ({type(error).__name__})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path}: holds no dict of tensors by name")
    return {
        name: _tensor(path, root, members, name, view) for name, view in found.items() if view is not None
    }


class _Unpickler(pickle.Unpickler):
    """Knows how tensors are described, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise UserError(f"refused: it asks for {module}.{name}"[:200])

    def persistent_load(self, identifier: Any) -> _Storage:
        kind, dtype, key, _, size = identifier
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise UserError("refused: it names something that is no storage")
        return _Storage(dtype, key, int(size))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    whole = lambda values: all(type(v) is int and v >= 0 for v in values)  # noqa: E731
    if (
        not isinstance(storage, _Storage)
        or not whole((offset, *shape, *strides))
        or len(shape) != len(strides)
    ):
        raise UserError("refused: a tensor is described wrongly")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _tensor(path: Path, root: str, members: dict[str, zipfile.ZipInfo], name: str, view: Any) -> Tensor:
    where = f"{path}: {name[:80]!r}"
    if not isinstance(view, _View):
        raise UserError(f"{where} is {type(view).__name__}, not a tensor")
    dtype, shape = view.storage.dtype, view.shape
    member = members.get(f"{root}data/{view.storage.key}")
    if member is None or "/" in view.storage.key:
        raise UserError(f"{where}: its storage is missing")
    if member.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{where}: its storage is compressed, which PyTorch never does")
    empty = math.prod(shape) == 0
    last = view.offset + sum((n - 1) * s for n, s in zip(shape, view.strides, strict=True))
    if not empty and (last + 1) * dtype.itemsize > member.file_size:
        raise UserError(f"{where}: its storage is too small for its shape")
    if math.prod(shape) * dtype.itemsize > 64 * max(1, member.file_size):
        raise UserError(f"{where}: its strides blow up a small storage")

    def read_rows(start: int, stop: int) -> np.ndarray:
        if empty:
            return np.empty((stop - start, *shape[1:]) if shape else (), dtype)
        with zipfile.ZipFile(path) as archive:
            raw = np.frombuffer(archive.read(member), np.uint8)
        flat = raw[: raw.size // dtype.itemsize * dtype.itemsize].view(dtype)[view.offset :]
        strides = tuple(stride * dtype.itemsize for stride in view.strides)
        values = np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)
        return np.array(values[start:stop] if shape else values)

    return Tensor(name, dtype, shape, read_rows)
