"""What may be named as a model: a model folder, a run folder, or the config of a train run that is done."""

from pathlib import Path

from jaxlab import runs, tasks
from jaxlab.config import load
from jaxlab.errors import UserError


def model_folder(reference: str, outputs: str | Path = "outputs") -> Path:
    """The folder of the model that `reference` names.

    Raises:
      UserError: there is none; where a config was named, the command that makes it.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml"):
        return _trained(path, Path(outputs))
    if not path.is_dir():
        raise UserError(
            f"{reference}: no such model: a model folder, a run folder or the config of a train run"
        )
    return path / "model" if (path / "model").is_dir() else path


def _trained(path: Path, outputs: Path) -> Path:
    task = tasks.find("train")
    module = task.load()
    config = load(module.Config, path)
    folder = outputs / task.name / runs.run_name(task.name, config, path.stem, module.inputs(config))
    if not (folder / "results.json").is_file():
        raise UserError(f"{path}: not trained yet in {outputs}; run: python run.py train {path}")
    return folder / "model"
