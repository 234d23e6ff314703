"""What may be named as a model: folders, hub ids and files, a run folder, or the config of a finished run."""

from pathlib import Path

from jaxlab import runs, tasks
from jaxlab.checkpoints.locate import resolve
from jaxlab.config import load
from jaxlab.errors import UserError


def model_folder(reference: str, outputs: str | Path = "outputs") -> Path:
    """The folder, or file, of the model that `reference` names.

    Raises:
      UserError: there is none; where a config was named, the command that makes it.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml"):
        return _trained(path, Path(outputs))
    path = resolve(reference)
    is_run = (path / "model").is_dir() and not (path / "config.json").exists()
    return path / "model" if is_run else path


def _trained(path: Path, outputs: Path) -> Path:
    task = tasks.find("train")
    module = task.load()
    config = load(module.Config, path)
    folder = outputs / task.name / runs.run_name(task.name, config, path.stem, module.inputs(config))
    if not (folder / "results.json").is_file():
        raise UserError(f"{path}: not trained yet in {outputs}; run: python run.py train {path}")
    return folder / "model"
