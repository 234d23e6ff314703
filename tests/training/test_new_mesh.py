"""Another mesh resumes the same run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_device_eight_and_one_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.on_new_meshes", tmp_path / "runs"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("the same")
    assert done.stdout.count("resuming at step") == 2
