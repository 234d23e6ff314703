"""A Hugging Face folder, config.json and tensors in one file or shards: read without trust, written whole."""

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab import distributed
from jaxlab.checkpoints.foreign_forms import foreign_files
from jaxlab.checkpoints.output_folder import write_aside
from jaxlab.checkpoints.safetensors_file import NAMES, Tensor, parse_json, read_header, refuse_pointer
from jaxlab.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_JSON = 100_000_000
SHARD_BYTES = 5_000_000_000
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""Files that a folder takes over from the one it was made from."""
CHAT_TEMPLATES = "additional_chat_templates"
"""A folder in it with further templates, NAME.jinja."""


@dataclass(frozen=True)
class TensorFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name, none of them read, and its config.json."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def open_folder(
    path: str | os.PathLike[str], *, config: dict[str, Any] | None = None, allow_pickle: bool = False
) -> TensorFolder:
    """Open a folder; only headers are read.

    Args:
      config: its config.json, if that has been read already.
      allow_pickle: where there are no safetensors, read PyTorch's pickles (without running code from them).

    Raises:
      UserError: anything about the folder that is not as it should be.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder")
    config = read_json(inside(path, CONFIG)) if config is None else config
    if _there(path, INDEX):
        return TensorFolder(path, config, _sharded(path, INDEX, SINGLE, read_header))
    if _there(path, SINGLE):
        return TensorFolder(path, config, read_header(inside(path, SINGLE)))
    single, index = _there(path, PICKLED), _there(path, PICKLED_INDEX)
    if not single and not index:
        other = foreign_files(path)
        instead = "" if other is None else f"; it holds {other}"
        raise UserError(f"{path}: holds no {SINGLE} and no {INDEX}{instead}")
    if not allow_pickle:
        raise UserError(
            f"{path}: holds only PyTorch pickles, which can carry code; if you trust their origin, run "
            f"convert {path} OUT --allow-pickle (of code in them none is run)"
        )
    from jaxlab.checkpoints.pickle_file import pickled_tensors

    if index:
        return TensorFolder(path, config, _sharded(path, PICKLED_INDEX, PICKLED, pickled_tensors))
    return TensorFolder(path, config, pickled_tensors(inside(path, PICKLED)))


def _there(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of this name, be it a link to nothing. A name too long is no error."""
    return os.path.lexists(folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: it is none, too large, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path}: too large for a JSON file of a model")
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of its order
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not text.startswith("{"):
        refuse_pointer(text[:64].encode(), path)
    return parse_json(text, str(path))


def inside(folder: Path, name: str, under: str = "") -> Path:
    """The file `name` of a folder, or of the folder `under` in it.

    Raises:
      UserError: the name is a path, or the file is missing, no plain file, or a link that leads out of the
        folder. Links of the Hugging Face cache, from a snapshot to the blobs beside it, stay inside.
    """
    path = folder / under / _file_name(folder, name)
    try:
        real = path.resolve(strict=True)
        plain = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError:
        told = "a link to a file that is missing" if path.is_symlink() else "is missing"
        raise UserError(f"{path}: {told}") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not plain:
        raise UserError(f"{path}: not a plain file")
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise UserError(f"{path}: leads out of the folder; put the file itself there")
    return path


def _file_name(folder: Path, name: str) -> str:
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise UserError(f"{folder}: names a file outside of it: {name[:80]!r}")
    return name


def _roots(folder: Path) -> list[Path]:
    """Where files of a folder may really lie."""
    real = folder.resolve()
    cached = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return [real, real.parent.parent / "blobs"] if cached else [real]


def _sharded(path: Path, index_name: str, single: str, read: Any) -> dict[str, Tensor]:
    """The tensors that an index lists, in its order, each from the shard that it names; then those that it
    does not list. A tensor of two shards is taken from the one that the index names if it is the last of
    them by name, which transformers takes whatever the index says.

    Args:
      single: the file that would hold all of them if there were no index; both at once are refused.
    """
    index = read_json(inside(path, index_name))
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{path / index_name}: its weight_map is not an object from names to files")
    if not places:
        raise UserError(f"{path / index_name}: its weight_map is empty")
    shards = sorted({_file_name(path, shard) for shard in places.values()})
    if single not in shards and _there(path, single):
        raise UserError(
            f"{path}: holds {single} and {index_name}, which does not name it; remove the one that is stale"
        )
    absent = [shard for shard in shards if not os.path.exists(path / shard)]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        listed = ", ".join(shard[:80] for shard in absent[:3])
        raise UserError(f"{path}: shards are missing: {listed}{more}")
    held: dict[str, dict[str, Tensor]] = {shard: read(inside(path, shard)) for shard in shards}
    places = dict(places)
    for shard, tensors in held.items():
        for name in tensors:
            if places.setdefault(name, shard) < shard:
                raise UserError(
                    f"{path / shard}: holds the tensor {name[:80]!r} too, which the index has in "
                    f"{places[name]}; put right which is meant"
                )
    for name, shard in places.items():
        if name not in held[shard]:
            raise UserError(f"{path / index_name}: the tensor {name[:80]!r} is not in {shard}")
    return {name: held[shard][name] for name, shard in places.items()}


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]
    """Its values, in this dtype and shape; asked for once, shard by shard, in each the widest dtype first.

    It is let go when they are written, and with it what it keeps for the tensors after it.
    """

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    path: str | os.PathLike[str],
    tensors: Iterable[Planned],
    *,
    config: Mapping[str, Any],
    copy_from: Path | None = None,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write a folder aside, then rename it.

    Args:
      config: what config.json holds.
      copy_from: a folder whose tokenizer and processor files (COMPANIONS) are copied.
      texts: files besides, by name, where none was copied.
      shard_bytes: most bytes of tensors in one file.
      inputs: what the tensors were made from, which is never replaced (see `write_aside`).
      progress: called with the bytes of each tensor that is written.

    Raises:
      UserError: `path` may not be written, the disk is full, or two tensors have one name.
    """
    shards = in_shards(list(tensors), shard_bytes)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    try:
        with write_aside(path, inputs, overwrite=overwrite) as folder:
            if not distributed.is_main():  # it takes part in what process 0 gets
                for tensor in (tensor for shard in shards for tensor in shard):
                    tensor.get()
                return
            names = shard_names(len(shards))
            if len(shards) > 1:
                _write_text(folder / INDEX, shard_index(shards, names))
            # All files take their space before any is filled: a full disk shows at once.
            starts = [begin_file(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
            for name, shard, start in zip(names, shards, starts, strict=True):
                _fill(folder / name, shard, start, progress)
            _write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            if copy_from is not None:
                copy_companions(copy_from, folder)
            for name, content in (texts or {}).items():
                if not (folder / name).exists():
                    _write_text(folder / name, content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{path}: no room for {total} bytes of tensors; nothing was written") from error
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def shard_names(count: int) -> list[str]:
    """Of files that hold the tensors together."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def in_shards(tensors: Sequence[Planned], shard_bytes: int = SHARD_BYTES) -> list[list[Planned]]:
    """The tensors in their order, cut so that no shard exceeds `shard_bytes` unless one tensor does.

    In a shard wider dtypes come first, as the format's own library has them: then all begin at a multiple of
    their size and can be mapped.
    """
    seen: set[str] = set()
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise UserError(f"two tensors are named {tensor.name}")
        seen.add(tensor.name)
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def shard_index(shards: Sequence[Sequence[Planned]], names: Sequence[str]) -> str:
    """The text of the index of several files."""
    places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    metadata = {
        "total_parameters": sum(math.prod(t.shape) for shard in shards for t in shard),
        "total_size": sum(t.nbytes for shard in shards for t in shard),
    }
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def begin_file(path: Path, shard: Sequence[Planned]) -> int:
    """Write a shard's header and take the space of its tensors, which stay if they are there already; returns
    where they begin.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        span = [end, end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        end = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    start = 8 + len(text)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        if os.fstat(descriptor).st_size > start + end:
            os.ftruncate(descriptor, start + end)
        os.posix_fallocate(descriptor, 0, start + end)
        file.write(len(text).to_bytes(8, "little") + text)
    return start


def _fill(path: Path, shard: list[Planned], start: int, progress: Callable[[int], Any]) -> None:
    """Write the tensors of a shard behind its header; leaves the list empty."""
    shard.reverse()
    with open(path, "r+b") as file:
        file.seek(start)
        while shard:
            tensor = shard.pop()
            values = tensor.get()
            if values.dtype != tensor.dtype or values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} is {values.dtype} {values.shape}, not as planned")
            if values.nbytes:
                file.write(memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8)))
            progress(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def copy_companions(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy the plain files among COMPANIONS; links are followed as far as they stay in the folder."""
    for name in COMPANIONS:
        if name not in without and (source / name).exists():
            shutil.copyfile(inside(source, name), target / name)
    for name in additional_chat_templates(source):
        (target / CHAT_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(inside(source, name, CHAT_TEMPLATES), target / CHAT_TEMPLATES / name)


def additional_chat_templates(folder: Path) -> list[str]:
    """The names of the files of further chat templates."""
    return sorted(path.name for path in (folder / CHAT_TEMPLATES).glob("*.jinja"))
