"""Twenty steps on meshes of up to eight devices end where one device does: each axis alone, in pairs, in
threes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESHES = {"full": 4 + 6 + 4, "nsa": 4 + 6 + 4, "experts": 5 + 10 + 10, "nsa_experts": 5 + 10 + 10}
"""How many there are."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_twenty_steps_are_those_of_one_device(name, tmp_path):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    run = subprocess.run(
        [sys.executable, "-m", "tests.training.on_eight_devices", name],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["losses"][-1] < 0.98 * found["losses"][0]
    assert len(found["meshes"]) == MESHES[name]
    apart = {mesh: sizes for mesh, sizes in found["meshes"].items() if max(sizes.values()) > 2e-5}
    assert not apart
