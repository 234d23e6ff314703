"""The lower bounds of the dependencies are true: in an environment of the lowest versions the tasks run.

Needs `uv`, which resolves to the lowest versions, and a package registry.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"x{i} = {i} * {i}\n" for i in range(400))
TRAIN = """
model: {width: 16, num_layers: 2, num_heads: 2, mlp_width: 16, max_length: 16}
data: {path: text.py, sequence_length: 16, holdout_every: 4}
optimizer: {muon: {}, ema: {decay: 0.9, evaluate: true}}
steps: 4
batch_size: 4
eval_batches: 1
checkpoint_every: 2
"""
MERGE = """
kind: merge
operator: ties
base: {base}
models:
  - model: {a}
  - model: {b}
"""

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def run(*words: str | Path, cwd: Path) -> str:
    """Runs a command without this environment's packages; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def lowest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the lowest versions of what pyproject.toml names, extras of users
    included."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    folder = tmp_path_factory.mktemp("lowest")
    run(uv, "venv", "-q", "--python", sys.executable, folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    what = f"{ROOT}[demo,hf,search]"
    run(uv, "pip", "install", "-q", "--python", python, "--resolution", "lowest-direct", what, cwd=folder)
    return folder / "venv" / "bin"


IMPORTS = """
import importlib, pkgutil, jaxlab, kernels_pallas
for package in (jaxlab, kernels_pallas):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(found.name)
            for name in getattr(module, "__all__", dir(module)):
                getattr(module, name)  # those of packages are imported when they are asked for
        except ModuleNotFoundError as error:
            if error.name not in ("lm_eval", "wandb", "tensorboardX", "pyarrow", "datasets", "tyro"):
                raise
            print(found.name, "needs", error.name)
print("all are imported")
"""


def test_every_module_is_imported(lowest: Path, tmp_path: Path) -> None:
    assert "all are imported" in run(lowest / "python", "-c", IMPORTS, cwd=tmp_path)


def test_train_merge_icl_and_the_rest(lowest: Path, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text(TEXT)
    (tmp_path / "train.yaml").write_text(TRAIN)
    tool = lowest / "jaxlab"
    run(tool, "train", "train.yaml", "--sweep", "seed=[0,1,2]", cwd=tmp_path)
    (sweep,) = (tmp_path / "outputs" / "sweeps").glob("*/sweep.json")
    base, a, b = (f"outputs/{row['run']}/model" for row in json.loads(sweep.read_text())["runs"])
    (tmp_path / "merge.yaml").write_text(MERGE.format(base=base, a=a, b=b))
    run(tool, "merge", "merge.yaml", "--out", "merged", "--verify", cwd=tmp_path)
    run(tool, "convert", "merged", "hf", "--verify", cwd=tmp_path)
    run(tool, "inspect", a, "hf", cwd=tmp_path)
    run(tool, "generate", "jaxlab/assets/icl_model", "--prompt", "red", "--max_new_tokens", "4", cwd=tmp_path)
    few = ["--examples", "8", "--seeds", "[0]"]
    run(tool, "icl", "configs/quickstart/icl_analysis.yaml", *few, cwd=tmp_path)
    digits = ["--steps", "2", "--eval_batches", "1"]
    run(tool, "train", "configs/quickstart/digits_base.yaml", *digits, cwd=tmp_path)
    run(tool, "report", *(tmp_path / "outputs").glob("icl/*"), a.removesuffix("/model"), cwd=tmp_path)
