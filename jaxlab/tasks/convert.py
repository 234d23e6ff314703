"""Task `convert`: a model from one form to another, Hugging Face's folders and ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tokenizers import Tokenizer

from jaxlab.app import model_folder
from jaxlab.checkpoints import (
    NotFinite,
    OpenModel,
    check_output,
    huggingface_config,
    open_model,
    save_model,
    verify_logits,
    verify_tensors,
)
from jaxlab.config import POSITIONAL
from jaxlab.costs import bytes_per_device
from jaxlab.errors import UserError
from jaxlab.models import SplitConfig, count_params, model_mesh


@dataclass(frozen=True)
class Arguments:
    """Write a model in another form."""

    in_: Annotated[str, POSITIONAL]
    """A folder of Hugging Face or of ours, a hub id, a run folder, a .gguf file, or a .bin file of
    llama2.c."""
    out: Annotated[str, POSITIONAL]
    """The folder to write."""
    to: Literal["hf", "orbax"] | None = None
    """Hugging Face's form or ours; by default the one that IN has not."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the tensors; by default as they are."""
    verify: bool = False
    """Read OUT again: compare the bytes of every tensor, where the dtype is kept, and logits."""
    adapter: str | None = None
    """A LoRA adapter (PEFT), a folder or a hub id, that is merged into the tensors."""
    revision: str | None = None
    """Of a hub id: commit, tag or branch."""
    offline: bool = False
    """Take a hub id from the cache alone."""
    allow_pickle: bool = False
    """Read PyTorch's .bin files where there are no safetensors."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of config.json that no family knows, to leave out; OUT notes them."""
    ignore_tensors: tuple[str, ...] = ()
    """Tensors to leave out: names, with * and ? for what varies."""
    check_finite: bool = False
    """Refuse tensors with NaN or infinities."""
    mesh: SplitConfig = SplitConfig()
    """Devices over which the model is split, if one of them does not hold it."""
    check: bool = False
    """Make all checks and estimate the memory; read no tensor and write nothing."""
    overwrite: bool = False
    """Replace OUT, if it was written here."""


def run(arguments: Arguments) -> None:
    opened = _open(arguments)
    out = check_output(arguments.out, opened.inputs, overwrite=arguments.overwrite)
    to = arguments.to or ("hf" if opened.form == "orbax" else "orbax")
    if to == "hf":  # before anything is read: can it be written?
        huggingface_config(opened.config, opened.source_files)
    tokenizer = _tokenizer(opened)
    mesh = model_mesh(arguments.mesh)
    shapes = opened.placed(mesh, arguments.dtype)
    print(f"{opened.path}: {opened.summary}")
    if opened.dequantized is not None:
        print(f"{opened.path}: dequantised from {opened.dequantized}")
    size = bytes_per_device(shapes)
    print(f"{opened.config.family}, {count_params(shapes):,} parameters, {size:,} bytes per device")
    if arguments.check:
        return
    config = opened.config_in(arguments.dtype)
    not_finite: NotFinite = "refuse" if arguments.check_finite else "warn" if arguments.verify else "take"
    params = opened.read(mesh=mesh, dtype=arguments.dtype, not_finite=not_finite)
    save_model(
        out,
        config,
        params,
        tokenizer,
        form="huggingface" if to == "hf" else "orbax",
        source_files=opened.source_files,
        inputs=opened.inputs,
        overwrite=arguments.overwrite,
    )
    print(f"written: {out}")
    if arguments.verify:
        written = open_model(out)
        if arguments.dtype is None:
            count = verify_tensors(opened, params, written, mesh=mesh)
            print(f"verified: all {count} tensors are the same bytes")
        print(verify_logits(opened, written, params if arguments.dtype is None else None, mesh=mesh))


def _open(arguments: Arguments) -> OpenModel:
    name = arguments.in_
    options: dict[str, Any] = {
        "adapter": arguments.adapter,
        "allow_pickle": arguments.allow_pickle,
        "ignore_keys": arguments.ignore_keys,
        "ignore_tensors": arguments.ignore_tensors,
    }
    if not Path(name).exists() and not name.endswith((".yaml", ".yml")):
        return open_model(name, revision=arguments.revision, offline=arguments.offline, **options)
    if arguments.revision is not None or arguments.offline:
        raise UserError(
            f"--{'revision' if arguments.revision else 'offline'} is for a hub id; {name} is here"
        )
    return open_model(model_folder(name), **options)


def _tokenizer(opened: OpenModel) -> Tokenizer | None:
    """What can be read of it: a folder with SentencePiece's format alone is copied as it is, and a GGUF file
    is converted even if the way in which its text is cut is not known."""
    try:
        return opened.tokenizer
    except UserError as error:
        if opened.form not in ("huggingface", "gguf"):
            raise
        print(f"note: {error}")
        return None
