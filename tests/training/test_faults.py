"""Runs by the command line: killed, damaged or short of room, they end in the same bytes or in one line."""

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
from jaxlab.data.text import TextSource
from jaxlab.errors import UserNote
from jaxlab.tasks import main
from tests.training.test_checkpoints import DAMAGE, flip, largest_file

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {{width: 16, num_layers: 2, num_heads: 2, mlp_width: 16, max_length: 16}}
data: {{path: {text}, sequence_length: 16, holdout_every: 4}}
optimizer: {{warmup_steps: 2}}
mesh: {{data: 1}}
steps: 40
batch_size: 4
log_every: 3
eval_every: 10
eval_batches: 1
checkpoint_every: 4
"""
CUT_AT, LAST_SAVED = 18, 16

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, and a whole run of it in `whole`."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(400)))
    (folder / "tiny.yaml").write_text(CONFIG.format(text=folder / "text.py"))
    assert train(folder, "whole") == 0
    return folder


@pytest.fixture(scope="module")
def half(place):
    """A run that ended after CUT_AT steps without a chance to save."""
    batch = TextSource.batch

    def cut(self, seed, step, size, rows=None):
        if step == CUT_AT:
            raise SystemExit
        return batch(self, seed, step, size, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextSource, "batch", cut)
        with pytest.raises(SystemExit):
            train(place, "half")
    return place / "half"


def train(place, outputs, *words):
    """The task in this process; returns the exit status."""
    return main(["train", str(place / "tiny.yaml"), "--outputs", str(place / outputs), *words])


def begin(place, outputs, *words):
    """The task in a process of its own, where compiled programs are kept."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_COMPILATION_CACHE"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(place / "cache")}
    command = [sys.executable, ROOT / "run.py", "train", place / "tiny.yaml", "--outputs", place / outputs]
    return subprocess.Popen(
        [*map(str, command), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_folder(place, outputs):
    (found,) = (place / outputs / "train").iterdir()
    return found


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


def assert_same(place, outputs):
    """The run in `outputs` gave the bytes of the whole one, and nothing is left over."""
    ours, whole = run_folder(place, outputs), run_folder(place, "whole")
    params = [load_model(run / "model")[1] for run in (ours, whole)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert losses(ours) == losses(whole)
    results = [json.loads((run / "results.json").read_text()) for run in (ours, whole)]
    assert results[0]["test"] == results[1]["test"]
    for part in (".", "checkpoints"):
        names = [sorted(path.name for path in (run / part).iterdir()) for run in (ours, whole)]
        assert names[0] == names[1]


def wait_for(condition, process, seconds=900):
    """False if the process ended first."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end
        time.sleep(0.005)
    return True


def env_of(place, outputs):
    return next((path.stat().st_mtime_ns for path in (place / outputs).glob("train/*/env.json")), 0)


def test_kills_at_twenty_random_moments(place):
    """Chains of runs, each killed somewhere between its start and its end, until one comes through."""
    rng = random.Random(0)
    began = time.monotonic()
    process = begin(place, "alone")
    wait_for(lambda: env_of(place, "alone"), process)
    began = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - began
    assert_same(place, "alone")
    kills, chain, seen = 0, 0, set()
    while kills < 20:
        outputs = f"killed{chain}"
        chain += 1
        while True:
            before = env_of(place, outputs)
            process = begin(place, outputs)
            wait_for(lambda: env_of(place, outputs) != before, process)  # noqa: B023
            try:
                process.communicate(timeout=rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                checkpoints = [p.name for p in (place / outputs).glob("train/*/checkpoints/*")]
                seen.add(tuple(sorted(checkpoints)))
                continue
            assert process.returncode == 0
            break
        assert_same(place, outputs)
    assert len(seen) > 3, seen  # the kills met different moments


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint(place, half, damage, capsys):
    outputs = f"damaged-{list(DAMAGE).index(damage)}"
    shutil.copytree(half, place / outputs)
    DAMAGE[damage](run_folder(place, outputs) / "checkpoints" / str(LAST_SAVED))
    with pytest.warns(UserNote, match=f"checkpoints/{LAST_SAVED}: damaged, and passed by"):
        assert train(place, outputs) == 0
    assert f"resuming at step {LAST_SAVED - 4} of 40" in capsys.readouterr().out
    assert_same(place, outputs)


def test_every_checkpoint_damaged(place, half, capsys):
    shutil.copytree(half, place / "all-damaged")
    for path in (run_folder(place, "all-damaged") / "checkpoints").iterdir():
        flip(largest_file(path))
    with pytest.warns(UserNote, match="damaged, and passed by") as notes:
        assert train(place, "all-damaged") == 0
    assert len([note for note in notes if issubclass(note.category, UserNote)]) == 2
    assert "resuming" not in capsys.readouterr().out
    assert_same(place, "all-damaged")


@pytest.mark.parametrize("name", ["env.json", "config.yaml", ".lock"])
@pytest.mark.filterwarnings("ignore:.*env.json. damaged")
def test_damaged_small_files(place, half, name):
    shutil.copytree(half, place / f"small-{name}")
    file = run_folder(place, f"small-{name}") / name
    file.write_bytes(b"\x00\xff" + file.read_bytes()[3:])
    assert train(place, f"small-{name}") == 0
    assert_same(place, f"small-{name}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(place, number, capsys):
    outputs = f"signal-{int(number)}"
    process = begin(place, outputs)
    assert wait_for(lambda: list((place / outputs).glob("train/*/checkpoints/4")), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 128 + number, said
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert last.startswith(f"{word}; step ")
    assert last.endswith(" of 40 is saved; a run is taken up again by the same command")
    assert "Traceback" not in said
    step = last.split()[2]
    process = begin(place, outputs)
    out, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert f"resuming at step {step} of 40" in out
    quiet = [line for line in said.replace("\r", "\n").splitlines() if not line.startswith("train ")]
    assert not any(quiet), quiet  # resuming says nothing else
    assert_same(place, outputs)


def test_ctrl_c_while_compiling(place):
    process = begin(place, "compiling", "--model.width=24", "--model.num_layers=3", "--model.attention=nsa")
    assert wait_for(lambda: list((place / "compiling").glob("train/*/checkpoints")), process)
    time.sleep(1.0)  # the first programs are being compiled
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.strip().endswith("interrupted; a run is taken up again by the same command")


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


@pytest.mark.parametrize("where", ["start", "checkpoint", "model"])
def test_a_full_disk(place, disk, where, capsys):
    """At the start, at a checkpoint, and where the model is written: one line, then the same bytes."""
    whole = run_folder(place, "whole")
    size = lambda folder: sum(-(-p.stat().st_size // 4096) * 4 for p in folder.rglob("*") if p.is_file())
    one = size(whole / "checkpoints" / "40")
    # Two checkpoints and a third under way fit, and not the model beside two.
    room = {"start": 8, "checkpoint": one + one // 2 + 40, "model": 3 * one + 40}[where]
    if where == "model":
        room = 2 * one + max(one + 24, size(whole / "model") // 2)
    outputs = disk(room)
    capsys.readouterr()
    assert train(place, outputs) == 2, (room, one, size(whole / "model"))
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in said if line and not line.startswith("train ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "make room there" in lines[0]
    subprocess.run(["mount", "-o", "remount,size=100m", str(outputs)], check=True)
    assert train(place, outputs) == 0
    shutil.copytree(outputs, place / f"full-{where}")
    assert_same(place, f"full-{where}")
