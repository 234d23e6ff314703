"""Whole runs by the command line that are killed, damaged or short of room end in the same bytes, or in one
line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import load_model
from tests.training.test_checkpoints import DAMAGE, flip, largest_file

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {{width: 16, num_layers: 2, num_heads: 2, mlp_width: 16, max_length: 16}}
data: {{path: {text}, sequence_length: 16, holdout_every: 4}}
optimizer: {{warmup_steps: 2}}
steps: 40
batch_size: 4
log_every: 3
eval_every: 10
eval_batches: 1
checkpoint_every: 4
"""

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, and a whole run of it in `whole`."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(400)))
    (folder / "tiny.yaml").write_text(CONFIG.format(text=folder / "text.py"))
    done = finish(folder, "whole")
    assert done.returncode == 0, done.stderr
    return folder


def begin(folder, outputs, *words, program=(str(ROOT / "run.py"),)):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_COMPILATION_CACHE")
    }
    environment |= {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, *program, "train", "tiny.yaml", "--outputs", str(outputs), *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(folder, outputs, *words, **options):
    process = begin(folder, outputs, *words, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_folder(folder, outputs):
    (found,) = (folder / outputs / "train").iterdir()
    return found


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


def assert_same(folder, outputs):
    """The run in `outputs` gave the bytes of the whole one, and nothing is left over."""
    ours, whole = run_folder(folder, outputs), run_folder(folder, "whole")
    params = [load_model(run / "model")[1] for run in (ours, whole)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert losses(ours) == losses(whole)
    results = [json.loads((run / "results.json").read_text()) for run in (ours, whole)]
    assert results[0]["test"] == results[1]["test"]
    names = lambda run: sorted(path.relative_to(run).as_posix() for path in run.glob("*/"))
    assert names(ours) == names(whole)
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in whole.iterdir())


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def begun(folder, outputs, at_step):
    """A run that was killed as soon as it had saved a step."""
    process = begin(folder, outputs)
    steps = lambda: {
        int(path.name) for path in (folder / outputs).glob("train/*/checkpoints/*") if path.name.isdecimal()
    }
    wait_for(lambda: any(step >= at_step for step in steps()), process)
    process.kill()
    process.communicate()
    return run_folder(folder, outputs)


def test_kills_at_twenty_random_moments(place):
    rng = random.Random(0)
    kills, chain = 0, 0
    while kills < 20:
        outputs = f"killed{chain}"
        chain += 1
        while True:
            process = begin(place, outputs)
            try:
                process.communicate(timeout=rng.uniform(0.5, 9.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0
            break
        assert_same(place, outputs)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint(place, damage):
    outputs = f"damaged-{list(DAMAGE).index(damage)}"
    folder = begun(place, outputs, 8)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    DAMAGE[damage](folder / "checkpoints" / str(steps[-1]))
    done = finish(place, outputs)
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/{steps[-1]}: damaged, and passed by" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"resuming at step {steps[-2]} of" in done.stdout
    assert_same(place, outputs)


def test_every_checkpoint_damaged(place):
    folder = begun(place, "all-damaged", 8)
    for path in (folder / "checkpoints").iterdir():
        if path.name.isdecimal():
            flip(largest_file(path))
    done = finish(place, "all-damaged")
    assert done.returncode == 0, done.stderr
    assert "resuming" not in done.stdout
    assert_same(place, "all-damaged")


@pytest.mark.parametrize("name", ["env.json", "metrics.jsonl", "config.yaml", ".lock"])
def test_damaged_small_files(place, name):
    folder = begun(place, f"small-{name}", 8)
    (folder / name).write_bytes(b"\x00\xff" + (folder / name).read_bytes()[3:])
    done = finish(place, f"small-{name}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if name != "metrics.jsonl":
        assert_same(place, f"small-{name}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(place, number):
    outputs = f"signal-{int(number)}"
    process = begin(place, outputs)
    wait_for(lambda: list((place / outputs).glob("train/*/checkpoints/4")), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert last.startswith(f"{word}; step ")
    assert last.endswith(" of 40 is saved; a run is taken up again by the same command")
    step = int(last.split()[2])
    assert (run_folder(place, outputs) / "checkpoints" / str(step) / "state" / "digests.json").exists()
    assert "Traceback" not in said
    done = finish(place, outputs)
    assert f"resuming at step {step} of 40" in done.stdout
    assert "warn" not in done.stderr.lower()
    assert_same(place, outputs)


def test_ctrl_c_while_compiling(place):
    slow = {"model.num_layers": 2, "model.width": 24}
    process = begin(place, "compiling", *(f"--{key}={value}" for key, value in slow.items()))
    wait_for(lambda: list((place / "compiling").glob("train/*/checkpoints")), process)
    time.sleep(0.5)  # the first program is being compiled
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    assert "Traceback" not in said


@pytest.fixture
def disk(tmp_path):
    """Mounts a small file system of a size, or skips."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk{size}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a file system")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(("where", "room"), [("start", 8), ("checkpoint", 120), ("model", None)])
def test_a_full_disk(place, disk, where, room):
    """At the start, at a checkpoint, and where the model is written: one line, then the same bytes."""
    whole = run_folder(place, "whole")
    size = lambda folder: sum(-(-p.stat().st_size // 4096) * 4 for p in folder.rglob("*") if p.is_file())
    one = size(whole / "checkpoints") // 2
    if where == "model":  # two checkpoints and their successor fit, and not much more
        room = 3 * one + 40
    outputs = disk(room)
    done = finish(place, outputs)
    if done.returncode == 0:
        pytest.fail(f"{room} KiB were enough; a checkpoint has {one}, the model {size(whole / 'model')}")
    assert done.returncode == 2, done.stderr
    lines = [
        line
        for line in done.stderr.replace("\r", "\n").splitlines()
        if line and not line.startswith("train ")
    ]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "make room there" in lines[0]
    subprocess.run(["mount", "-o", "remount,size=100m", str(outputs)], check=True)
    done = finish(place, outputs)
    assert done.returncode == 0, done.stderr
    shutil.copytree(outputs, place / f"full-{where}")
    assert_same(place, f"full-{where}")
