"""Points of a sweep one by one, at once, and as an array of SLURM."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.app import sweeps
from jaxlab.errors import UserError
from jaxlab.tasks import main
from tests.app import fake_task

SWEEP = ["fake", "small.yaml", "--sweep", "rate=[0.5,0.25,0.1]", "stop=['',user,'']", "--sweep-mode", "zip"]


def table_of(out):
    return [line.split() for line in out.splitlines() if line.startswith("0.")]


def test_points_of_an_array_and_their_table(capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert main([*SWEEP, "--sweep-index", "auto"]) == 0
    assert main([*SWEEP, "--sweep-index=1"]) == 2
    assert "error: the rate is wrong; lower it" in capsys.readouterr().err
    assert [config.rate for config in fake_task.calls] == [0.5, 0.25]
    assert main([*SWEEP, "--sweep-collect"]) == 1
    out = capsys.readouterr().out
    assert [line[-1] for line in table_of(out)][1:] == ["it", "done"]
    assert "1 of 3 points failed; 1 are not done: --sweep-index 2" in out
    (folder,) = Path("outputs/sweeps").glob("fake-small-*")
    rows = json.loads((folder / "sweep.json").read_text())["runs"]
    assert rows[0]["results"]["loss"] == pytest.approx(0.5**3)
    assert rows[1]["error"] == "the rate is wrong; lower it"
    assert rows[2].keys() == {"values"}
    assert len(fake_task.calls) == 2  # the table runs nothing

    assert main([*SWEEP, "--sweep-index", "2,0"]) == 0
    assert [config.rate for config in fake_task.calls] == [0.5, 0.25, 0.1]  # what is done stays
    (folder / "points" / "0.json").write_text("{")
    assert main([*SWEEP, "--sweep-collect"]) == 1
    out = capsys.readouterr().out
    assert "2 of 3 points failed" in out
    assert "damaged" in out


def test_a_whole_sweep_and_its_points_are_one_table():
    words = ["fake", "small.yaml", "--sweep", "rate=[1,2]"]
    assert main([*words, "--sweep-index", "0"]) == 0
    assert main(words) == 0
    assert len(fake_task.calls) == 2
    assert main([*words, "--sweep-collect"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep-index", "3"], "the sweep has points 0 to 2"),
        (["--sweep-index", "-1"], "the sweep has points 0 to 2"),
        (["--sweep-index", "auto"], "SLURM_ARRAY_TASK_ID is not set"),
        (["--sweep-index", "0", "--sweep-collect"], "one way at a time"),
        (["--sweep-jobs", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert main([*SWEEP, *words]) == 2
    assert said in capsys.readouterr().err
    assert not fake_task.calls


def test_options_of_a_sweep_need_one(capsys):
    assert main(["fake", "small.yaml", "--sweep-index", "0"]) == 2
    assert "is for a sweep; give --sweep" in capsys.readouterr().err


def test_the_script_of_an_array(capsys, tmp_path):
    assert main([*SWEEP, "--sweep-script", "--outputs", "o u t"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in text
    assert text.rstrip().endswith("--outputs 'o u t' --sweep-index auto")
    assert not fake_task.calls
    file = tmp_path / "array.sh"
    file.write_text(text)
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True, check=True).stderr == b""
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(file)], check=True)
    # What it runs in the end is this command line.
    line = text.splitlines()[-1].removeprefix("srun ")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines()[2:] == [*SWEEP, "--outputs", "o u t", "--sweep-index", "auto"]


def test_devices_are_shared_out(monkeypatch):
    assert sweeps.visible_devices({"CUDA_VISIBLE_DEVICES": "3, GPU-x"}) == ["3", "GPU-x"]
    assert sweeps.visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert sweeps.share_devices(["0", "1", "2", "3", "4"], 2) == [["0", "1"], ["2", "3"]]
    assert sweeps.share_devices([], 2) == [None, None]
    with pytest.raises(UserError, match="--sweep-jobs 3 on 2 GPUs"):
        sweeps.share_devices(["0", "1"], 3)


def test_points_at_once_have_devices_of_their_own(tmp_path, monkeypatch, capsys):
    """Of five points, two at a time: no two that run at the same time see the same device; one fails."""
    script = tmp_path / "point.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "index, folder = sys.argv[2], pathlib.Path(sys.argv[0]).parent\n"
        "device = folder / ('on' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "device.mkdir()\n"  # fails if another holds it
        "time.sleep(.3)\n"
        "device.rmdir()\n"
        "print('point', index)\n"
        "sys.exit(2 if index == '3' else 0)\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    todo = [sweeps.Point({"rate": i}, None, "") for i in range(5)]
    status = sweeps.run_at_once(todo, [sys.executable, str(script)], 2, tmp_path / "logs")
    assert status == 2
    assert [(tmp_path / "logs" / f"{i}.log").read_text() for i in range(5)] == [
        f"point {i}\n" for i in range(5)
    ]
    said = capsys.readouterr()
    assert "[1/5] rate: 0 on GPU 4" in said.out.replace("{", "").replace("}", "")
    assert said.err.count("failed: ") == 1
