"""PyTorch's .bin files without PyTorch and without running code: a pickle that may only describe tensors.

The format is a zip: `<name>/data.pkl` describes tensors as views of storages, `<name>/data/<key>` hold their
bytes. An unpickler that knows nothing but these descriptions reads the first, once it is clear that it asks
for memory and time in proportion to its size; anything else is refused.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlab.checkpoints.safetensors_file import Tensor, check_rows, read_into
from jaxlab.errors import UserError

MAX_PICKLE = 16_000_000
"""Bytes of a description, which needs about 150 for a tensor; its objects may take sixty times as much."""
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}


MAX_WEIGHT = 250
"""Of a tuple: all that is in it, and in the tuples in it; a parameter's holds two results of calls."""
OF_TENSOR = 100
"""Weight of what a call makes, at most a tensor of 32 axes: its storage, shape and strides are 71 objects."""
_PUT, _GET = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
_LEAVES = (
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "EMPTY_TUPLE",
    "EMPTY_LIST",
    "EMPTY_DICT",
    "GLOBAL",
)
_TAKES = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "REDUCE": 2,
    "BUILD": 2,
    "BINPERSID": 1,
    "STACK_GLOBAL": 2,
    "APPEND": 2,
    "SETITEM": 3,
}
"""Objects that an opcode takes from the stack, to put one back."""
_TAKES_TO_MARK = {"TUPLE": 0, "APPENDS": 1, "SETITEMS": 1}
"""The same, for those that take all down to the last mark, the mark, and so many below it."""


class _Kind(NamedTuple):
    """Stands for a class of storages. Like all that a pickle gets hold of, it has nothing that can be set."""

    dtype: np.dtype


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
            if len(members) < len(archive.infolist()):
                raise UserError("two of its members have one name")
            found_roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
            if len(found_roots) != 1:
                told = "more than one" if found_roots else "no"
                raise UserError(f"not a checkpoint of PyTorch: it holds {told} data.pkl")
            root = found_roots[0]
            if members[f"{root}data.pkl"].file_size > MAX_PICKLE:
                raise UserError("its description is too large")
            if members[f"{root}data.pkl"].compress_type != zipfile.ZIP_STORED:
                raise UserError("its description is compressed, which PyTorch never does")
            order = members.get(f"{root}byteorder")
            if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
                raise UserError("its numbers are not little-endian")
            description = archive.read(f"{root}data.pkl")
            _check_proportions(description)
            found = _Unpickler(io.BytesIO(description)).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of PyTorch 1.6 or newer ({str(error)[:100]})") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(f"{path}: its description is damaged ({type(error).__name__})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path}: holds no dict of tensors by name")
    items = dict.items(found)  # a pickle can give the object itself an `items`
    return {name: _tensor(path, root, members, name, view) for name, view in items if view is not None}


def _check_proportions(description: bytes) -> None:
    """Follow what the opcodes do to the stack, with weights (see MAX_WEIGHT) in place of objects.

    A tuple of a tuple that is used twice, and so on, is small in a pickle, but as the key of a dict its hash
    takes time exponential in the depth. A slot of the memo takes memory for all slots before it.

    Raises:
      UserError: an opcode that tensors are not described with, a slot out of reach, a tuple that weighs more
        than MAX_WEIGHT.
      Exception: of any kind, if the pickle is damaged.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(description):
        name = opcode.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUT:
            slot = len(memo) if argument is None else int(argument)
            if slot > max(255, len(description)):
                raise UserError("refused: it asks for more memory than its description can need")
            memo[slot] = stack[-1]
        elif name in _GET:
            stack.append(memo[int(argument)])
        elif name in _LEAVES:
            stack.append(1)
        elif name in _TAKES or name in _TAKES_TO_MARK:
            taken = _take(stack, marks, name)
            weight = OF_TENSOR if name == "REDUCE" else 1
            if name.startswith("TUPLE"):
                weight += sum(taken)
            if weight > MAX_WEIGHT:
                raise UserError("refused: it holds a tuple larger than the description of any tensor")
            stack.append(weight)
        else:
            raise UserError(f"refused: tensors are not described with {name}")


def _take(stack: list[int], marks: list[int], name: str) -> list[int]:
    """Remove what an opcode takes from the stack.

    Raises:
      IndexError: there is less.
    """
    start = marks.pop() - _TAKES_TO_MARK[name] if name in _TAKES_TO_MARK else len(stack) - _TAKES[name]
    if start < 0:
        raise IndexError("the stack holds less than an opcode takes")
    taken = stack[start:]
    del stack[start:]
    return taken


class _Unpickler(pickle.Unpickler):
    """Knows how tensors are described, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _MakeDict()
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if (module == "torch" and name in STORAGES) or (module, name) == ("torch.storage", "UntypedStorage"):
            return _Kind(np.dtype(STORAGES[name]))
        raise UserError(f"refused: it asks for {module}.{name}"[:200])

    def persistent_load(self, identifier: Any) -> _Storage:
        tag, kind, key, _, size = identifier
        if tag != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str):
            raise UserError("refused: it names something that is no storage")
        if type(size) is not int or size < 0:
            raise UserError("refused: a storage has no size")
        return _Storage(kind.dtype, key, size)


class _MakeDict:
    __slots__ = ()

    def __call__(self) -> Any:
        """Empty, as PyTorch asks for it; copies of a large dict would fill the memory."""
        return collections.OrderedDict()


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
        whole = lambda values: all(type(v) is int and 0 <= v < 1 << 48 for v in values)
        if (
            not isinstance(storage, _Storage)
            or not whole((offset, *shape, *strides))
            or len(shape) != len(strides)
            or len(shape) > 32
        ):
            raise UserError("refused: a tensor is described wrongly")
        return _View(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> _View:
        if not isinstance(data, _View):
            raise UserError("refused: a parameter is no tensor")
        return data


def _tensor(path: Path, root: str, members: dict[str, zipfile.ZipInfo], name: str, view: Any) -> Tensor:
    where = f"{path}: {name[:80]!r}"
    if not isinstance(view, _View):
        raise UserError(f"{where} is {type(view).__name__}, not a tensor")
    dtype, shape, strides = view.storage.dtype, view.shape, view.strides
    member = members.get(f"{root}data/{view.storage.key}")
    if member is None or "/" in view.storage.key:
        raise UserError(f"{where}: its storage is missing")
    if member.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{where}: its storage is compressed, which PyTorch never does")
    if member.flag_bits & 1:
        raise UserError(f"{where}: its storage is encrypted")
    if not member.compress_size == member.file_size >= view.storage.size * dtype.itemsize:
        raise UserError(f"{where}: its storage has another size than the file says")
    empty = math.prod(shape) == 0
    span = lambda rows: 1 + sum((n - 1) * s for n, s in zip((*rows, *shape[1:]), strides, strict=True))
    if not empty and (view.offset + span(shape[:1])) * dtype.itemsize > member.file_size:
        raise UserError(f"{where}: its storage is too small for its shape")
    if empty and math.prod(n or 1 for n in shape) > 1 << 48:
        raise UserError(f"{where}: its shape is too large")
    if math.prod(shape) * dtype.itemsize > 64 * max(1, member.file_size):
        raise UserError(f"{where}: its strides blow up a small storage")

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        rows = (stop - start,) if shape else ()
        if empty or rows == (0,):
            return np.empty((*rows, *shape[1:]), dtype)
        flat = np.empty(span(rows), dtype)  # all that lies between the first element and the last
        first = view.offset + (start * strides[0] if shape else 0)
        read_into(path, flat, _data_offset(path, member) + first * dtype.itemsize)
        steps = tuple(stride * dtype.itemsize for stride in strides)
        return np.array(np.lib.stride_tricks.as_strided(flat, (*rows, *shape[1:]), steps, writeable=False))

    return Tensor(name, dtype, shape, read_rows)


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: after its own header, whose length the directory does not tell."""
    header = np.empty(30, np.uint8)
    read_into(path, header, member.header_offset)
    raw = header.tobytes()
    if raw[:4] != b"PK\x03\x04":
        raise UserError(f"{path}: {member.filename[:80]!r} is not where the file says")
    lengths = int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little")
    return member.header_offset + 30 + lengths
