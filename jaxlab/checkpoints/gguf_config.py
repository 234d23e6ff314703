"""What llama.cpp makes of a model of Hugging Face, undone: config.json from metadata, and tensors."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from jaxlab.checkpoints import families
from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.gguf_architectures import ARCHITECTURES, FACTORS, FREQUENCIES, Architecture, Metadata
from jaxlab.checkpoints.gguf_header import GGUFHeader, QuantizedTensor
from jaxlab.checkpoints.safetensors_file import Tensor, check_rows
from jaxlab.checkpoints.tensor_table import Row
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig

_STACKED = re.compile(r"\{[eh]\}")
"""Experts, or norms of heads, in a name of Hugging Face: with llama.cpp the first axis of one tensor."""
_REFUSED = {
    "clip": "the vision tower of a model (mmproj), no model by itself",
    "imatrix": "the importance matrix of a quantisation, no model",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model of Hugging Face that a header tells of."""

    name: str
    """In ARCHITECTURES."""
    architecture: Architecture
    config: Json
    """The keys of config.json that the metadata tells."""


def origin(header: GGUFHeader, where: object, *, ignore_keys: Sequence[str] = ()) -> Origin:
    """What a file was made from.

    Args:
      ignore_keys: keys of the metadata to leave out although nobody knows them.

    Raises:
      UserError: an architecture or a key that is not known.
    """
    name, kind = (str(header.metadata.get(f"general.{key}", "")) for key in ("architecture", "type"))
    if name in _REFUSED or kind in _REFUSED:
        told = _REFUSED.get(name) or _REFUSED[kind]
        raise UserError(f"{where}: {told}; name the language model's file")
    if kind not in ("", "model"):
        raise UserError(f"{where}: a GGUF file of type {kind[:40]!r}, not a model")
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{where}: the architecture {name[:40]!r} is not supported; supported: {known}")
    metadata, architecture = Metadata(header, name, where, ignore_keys), ARCHITECTURES[name]
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{where}: token_embd.weight is missing, or no matrix")
    config: Json = {"model_type": architecture.model_type, "vocab_size": embedding.shape[0]}
    for theirs, ours in architecture.keys.items():
        config[ours] = metadata.value(theirs)
        if config[ours] is None:
            raise UserError(f"{where}: {metadata.prefix}{theirs} is missing")
    config |= architecture.more(metadata)
    if not metadata.flag("attention.causal", True):
        raise metadata.wrong("attention.causal", "true")
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    metadata.done()
    return Origin(name, architecture, config)


def named_tensors(header: GGUFHeader, found: Origin, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a file under the names of Hugging Face, with the values that they have there.

    One that no name is known for keeps its own, to be refused as not known. Experts, and norms of heads,
    which llama.cpp stacks, are taken apart. If anything is quantised, all is float32: the types of a file
    differ from layer to layer.
    """
    layers = config.num_layers
    if layers > len(header.tensors):
        raise UserError(f"{header.files[0]}: says {layers} layers, and holds {len(header.tensors)} tensors")
    names = _names(found.name, families.rows_of(config.family), layers)
    wide = any(tensor.quantized for tensor in header.tensors.values())
    tensors: dict[str, Tensor] = {}
    for name, stored in header.tensors.items():
        if name in (FREQUENCIES, *FACTORS.values()):  # in the config
            continue
        theirs, row = names.get(name, (name, None))
        tensor = _changed(stored, row, found, config, wide)
        if row is None or not _STACKED.search(theirs):
            tensors[theirs] = dataclasses.replace(tensor, name=theirs)
        else:
            for number in range(tensor.shape[0]):
                one = _STACKED.sub(str(number), theirs)
                tensors[one] = _of_stack(tensor, number, one)
    return tensors


def _names(architecture: str, rows: tuple[Row, ...], layers: int) -> dict[str, tuple[str, Row]]:
    """Hugging Face's name of each of llama.cpp's, by the map of the package `gguf`; {e} and {h} stay."""
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(arch, layers)
    names: dict[str, tuple[str, Row]] = {}
    for row in rows:
        for layer in range(layers) if "{i}" in row.name else (0,):
            theirs = row.name.replace("{i}", str(layer))
            module, _, kind = re.sub(r"(\.norms)?\.\{[eh]\}", "", theirs).rpartition(".")
            ours = known.get_name(module)
            if ours is not None:
                names.setdefault(f"{ours}.{kind}", (theirs, row))
    return names


def _changed(
    stored: QuantizedTensor, row: Row | None, found: Origin, config: ModelConfig, wide: bool
) -> Tensor:
    """The tensor with Hugging Face's values; a change needs the whole of it."""
    path = "" if row is None else row.paths[0]
    change = next(
        (c for pattern, c in found.architecture.changes.items() if re.fullmatch(pattern, path)), None
    )
    dtype = np.dtype(np.float32) if wide and stored.dtype.itemsize == 2 else stored.dtype
    if change is None:
        if dtype == stored.dtype:
            return stored
        cast: Callable[[int, int], np.ndarray] = lambda start, stop: stored.read_rows(start, stop).astype(
            dtype
        )
        return Tensor(stored.name, dtype, stored.shape, cast)
    shape = change.shape(stored.shape)

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        values = change.values(stored.read(), config)[start:stop]
        return np.ascontiguousarray(values.astype(dtype))

    return Tensor(stored.name, dtype, shape, read_rows)


def _of_stack(stacked: Tensor, number: int, name: str) -> Tensor:
    shape = stacked.shape[1:]

    def read_rows(start: int, stop: int) -> np.ndarray:
        check_rows(shape, start, stop)
        return stacked.read_rows(number, number + 1)[0][start:stop]

    return Tensor(name, stacked.dtype, shape, read_rows)
