"""What may be named as a model: a folder, file or hub id (jaxlab/checkpoints), or the config of a finished
train run."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlab.app import runs
from jaxlab.checkpoints import open_model, resolve, split_adapter
from jaxlab.config import load
from jaxlab.errors import UserError
from jaxlab.files import named, shipped

if TYPE_CHECKING:
    from jaxlab.checkpoints import OpenModel
    from jaxlab.training import TrainConfig


def model_folder(reference: str, outputs: str | Path = "outputs") -> Path:
    """The folder, or file, of the model that `reference` names.

    Raises:
      UserError: there is none; where a config was named, the command that makes it.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml"):
        return _trained(path, Path(outputs))
    return resolve(shipped(reference))


def reference_folders(reference: str) -> tuple[Path, Path | None]:
    """The model that `reference` names, and of `model+adapter` its LoRA adapter; neither is opened.

    Raises:
      UserError: there is none.
    """
    model, adapter = split_adapter(reference)
    return model_folder(model), None if adapter is None else model_folder(adapter)


def open_reference(reference: str) -> "OpenModel":
    """The model that `reference` names, opened; `model+adapter` with its LoRA adapter.

    Raises:
      UserError: there is none.
    """
    model, adapter = reference_folders(reference)
    return open_model(model, adapter=adapter)


def train_inputs(config: "TrainConfig") -> dict[str, str]:
    """What a train run depends on besides its config, as digests: its data, and the model that it starts
    from.

    Raises:
      UserError: a mistake that the user can mend.
    """
    from jaxlab.data import make_source
    from jaxlab.training import newest_digests

    identities = {"data": make_source(config.data, model_folder).identity}
    if config.init_from is not None:
        identities["init_from"] = open_model(model_folder(config.init_from)).identity
    if config.continue_from is not None:
        digests = newest_digests(checkpoints_of(config.continue_from))
        identities["continue_from"] = hashlib.sha256(digests.encode()).hexdigest()
    return identities


def checkpoints_of(run: str) -> Path:
    """The folder of the checkpoints of a train run, by the run's folder.

    Raises:
      UserError: it has none.
    """
    folder = named(run) / "checkpoints"
    if not folder.is_dir() or not any(path.name.isdecimal() for path in folder.iterdir()):
        raise UserError(f"continue_from: {run} has no checkpoints; give the folder of a train run")
    return folder


def _trained(path: Path, outputs: Path) -> Path:
    from jaxlab.training import TrainConfig

    config = load(TrainConfig, path)
    folder = outputs / "train" / runs.run_name("train", config, path.stem, train_inputs(config))
    if not (folder / "results.json").is_file():
        raise UserError(f"{path}: not trained yet in {outputs}; run: {runs.command_line('train', str(path))}")
    return folder / "model"
