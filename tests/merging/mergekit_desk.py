"""A folder with the models that the files of tests/golden/mergekit_files name."""

import importlib.util
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit_files"


def models_module():
    spec = importlib.util.spec_from_file_location("mergekit_models", GOLDEN / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(name):
    """The path of a file, by its number."""
    return next((GOLDEN / "cases").glob(f"{name}*.yaml"))
