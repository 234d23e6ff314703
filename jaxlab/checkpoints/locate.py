"""Where a model is, by its name, and of what kind."""

import os
import re
from pathlib import Path
from typing import Literal

from jaxlab.checkpoints.folder import CONFIG
from jaxlab.errors import UserError

OWN_CONFIG, OWN_PARAMS = "config.yaml", "params"
"""What a model folder of ours holds."""
Kind = Literal["native", "huggingface", "llama2c"]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def resolve(
    path: str | Path, *, revision: str | None = None, offline: bool = False, allow_pickle: bool = False
) -> Path:
    """The file or folder of a model: of a run its model; one on the hub is fetched into the cache.

    Args:
      revision: commit, tag or branch of a hub id that names none.
      offline: take it from the cache alone.
      allow_pickle: fetch PyTorch's .bin files too.

    Raises:
      UserError: there is none, and the name is no hub id.
    """
    if os.path.exists(path):  # not Path.exists, which raises for names that are too long
        path = Path(path)
        is_run = (path / "model").is_dir() and not (path / CONFIG).exists()
        return path / "model" if is_run else path
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(
            f"{path}: no such model: a model folder, a run folder, the config of a train run, a .bin file of "
            "llama2.c, or a hub id owner/name"
        )
    from jaxlab.checkpoints import hub

    try:
        return hub.snapshot(str(path), revision=revision, offline=offline, allow_pickle=allow_pickle)
    except UserError as error:
        raise UserError(f"no such folder here, nor on the hub: {error}") from error


def kind_of(path: Path) -> Kind:
    """What is at `path`. Raises UserError if it is no model."""
    if path.is_file():
        if path.suffix == ".bin":
            return "llama2c"
        raise UserError(f"{path}: not a model: name its folder, or a .bin file of llama2.c")
    if (path / OWN_CONFIG).is_file() or (path / OWN_PARAMS).is_dir():
        return "native"
    if (path / CONFIG).exists():
        return "huggingface"
    if not path.is_dir():
        raise UserError(f"{path}: no such model")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: an adapter, not a model: convert the model it is for, with --adapter {path}"
        )
    raise UserError(
        f"{path}: not a model folder: it needs {OWN_CONFIG} and {OWN_PARAMS}/ (ours), or {CONFIG} and "
        "tensors (Hugging Face)"
    )
