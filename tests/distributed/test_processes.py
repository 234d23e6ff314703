"""Two processes on this host: what they tell each other, and one run of both."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlab.checkpoints import load_model, save_model
from jaxlab.config import build
from jaxlab.distributed import ClusterConfig, ExplicitConfig
from jaxlab.errors import ConfigError
from jaxlab.models import ModelConfig
from jaxlab.tasks import main
from tests.distributed.launch import ROOT, end, free_port, start
from tests.models.tiny import make_params
from tests.training import vlm_cases

CONFIG = """
model: {{width: 16, num_layers: 2, num_heads: 2, mlp_width: 16, max_length: 16}}
data: {{path: {text}, sequence_length: 16, holdout_every: 4}}
optimizer: {{warmup_steps: 2}}
steps: 60
batch_size: 4
log_every: 3
eval_every: 30
eval_batches: 1
checkpoint_every: 4
"""
HEARTBEAT = 6

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "coordinator: must be HOST:PORT"),
        ({"coordinator": "host"}, "must be HOST:PORT of process 0"),
        ({"coordinator": "host:70000"}, "must be HOST:PORT of process 0"),
        ({"coordinator": "h:1", "num_processes": 0}, "num_processes: must be from 1"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id: must be from 0 to 1 of 2"),
        ({"coordinator": "h:1", "heartbeat_timeout": 1}, "heartbeat_timeout: must be from 2"),
        ({"coordinator": "h:1", "local_device_ids": [0, 0]}, "local_device_ids: must be different"),
    ],
)
def test_wrong_fields(fields, said):
    with pytest.raises(ConfigError, match=said):
        build(ExplicitConfig, fields)


def test_a_wrong_port():
    with pytest.raises(ConfigError, match="port: must be from 1 to 65535"):
        build(ClusterConfig, {"port": 0})


def test_two_processes_talk_and_end_together():
    port = free_port()
    (status, _, said), (other, _, others) = end(
        start(lambda process: [ROOT / "tests/distributed/talk.py", port, process])
    )
    assert "all is as it should be" in said, said
    assert (status, other) == (2, 2)
    assert "error: process 1: no such disk" in others
    assert re.fullmatch(
        r"error: process 1 on \S+ has ended: no such disk; so this one ends; "
        "the same command goes on from the newest checkpoint",
        said[-1],
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, and a whole run of one process in `whole`."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "text.py").write_text("".join(f"x{i} = {i} * {i}\n" for i in range(400)))
    (folder / "tiny.yaml").write_text(CONFIG.format(text=folder / "text.py"))
    words = ["train", str(folder / "tiny.yaml"), "--outputs", str(folder / "whole"), "--mesh", "{data: 1}"]
    assert main(words) == 0
    return folder


def train(
    place, outputs, number=2, *, words=lambda process: [], address="127.0.0.1", config="tiny.yaml", **how
):
    """Processes of one run of a config."""
    port = free_port()
    told = f"coordinator: '{address}:{port}', num_processes: {number}, heartbeat_timeout: {HEARTBEAT}"

    def command(process):
        told_here = f"{{kind: explicit, {told}, process_id: {process}, start_timeout: 60}}"
        return [
            ROOT / "run.py",
            "train",
            place / config,
            *("--outputs", place / outputs),
            *(("--distributed", told_here) if number > 1 else ()),
            *words(process),
        ]

    return start(command, number, cache=place / "cache", **how)


def folder_of(place, outputs):
    (found,) = (place / outputs / "train").iterdir()
    return found


def assert_same(place, outputs):
    """The run gave the whole run's losses and parameters, to the rounding of other sums."""
    ours, whole = folder_of(place, outputs), folder_of(place, "whole")
    assert ours.name == whole.name  # neither mesh nor processes make another run
    losses = [
        {
            (r["step"], name): r[name]
            for r in map(json.loads, lines)
            for name in ("loss", "eval_loss")
            if name in r
        }
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in (ours, whole))
    ]
    assert losses[0].keys() == losses[1].keys()
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=2e-6)
    trees = [load_model(run / "model")[1] for run in (ours, whole)]
    for name in trees[0]["layers"]["attention"]:
        a, b = (np.asarray(tree["layers"]["attention"][name]) for tree in trees)
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in whole.iterdir())


def wait_for(condition, processes, seconds=300):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.01)


def newest(place, outputs):
    return max(int(path.name) for path in saved(place, outputs, "[0-9]*"))


def saved(place, outputs, step):
    return list((place / outputs).glob(f"train/*/checkpoints/{step}"))


@pytest.mark.slow
def test_two_processes_train_like_one(place):
    (status, out, said), (other, quiet, errors) = end(train(place, "two"))
    assert (status, other) == (0, 0), (said, errors)
    assert_same(place, "two")
    assert "loss " in out
    assert not any("loss" in line or "train" in line for line in [*quiet.splitlines(), *errors]), errors
    before = {path: path.stat().st_mtime_ns for path in folder_of(place, "two").rglob("*")}
    again = end(train(place, "two"))
    assert [status for status, _, _ in again] == [0, 0]
    if "already done" in again[0][1]:  # of committed code
        assert before == {path: path.stat().st_mtime_ns for path in folder_of(place, "two").rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_all_at_one_step(place, asked):
    """Two processes, then one, then two again."""
    outputs = f"asked{asked}"
    processes = train(place, outputs)
    wait_for(lambda: saved(place, outputs, 4), processes)
    processes[asked].send_signal(signal.SIGTERM)
    found = end(processes)
    assert [status for status, _, _ in found] == [143, 143], found
    steps = [re.search(r"terminated; step (\d+) of 60 is saved", said[-1])[1] for _, _, said in found]
    assert steps[0] == steps[1]
    assert saved(place, outputs, steps[0])
    assert found[1][2][-1].startswith("process 1: terminated")
    (one,) = train(place, outputs, 1, words=lambda _: ["--mesh", "{data: 1}"])
    wait_for(lambda: newest(place, outputs) > int(steps[0]), [one])
    one.send_signal(signal.SIGTERM)
    ((status, out, said),) = end([one])
    assert f"resuming at step {steps[0]} of 60" in out
    assert status == 143, said
    found = end(train(place, outputs))
    assert [status for status, _, _ in found] == [0, 0], found
    assert "resuming at step" in found[0][1]
    assert_same(place, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(place, killed):
    outputs = f"killed{killed}"
    processes = train(place, outputs)
    wait_for(lambda: saved(place, outputs, 4), processes)
    processes[killed].kill()
    found = end(processes, seconds=120)
    status, _, said = found[1 - killed]
    assert status == 1, said
    who = "process 1: " if killed == 0 else ""
    assert re.search(rf"^error: {who}process {killed} on \S+ (is gone|has ended)", said[-1]), said
    found = end(train(place, outputs))
    assert [status for status, _, _ in found] == [0, 0], found
    assert_same(place, outputs)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_by(place):
    outputs = "damaged"
    processes = train(place, outputs)
    wait_for(lambda: saved(place, outputs, 8), processes)
    for process in processes:
        process.kill()
    end(processes)
    step = newest(place, outputs)
    files = [
        path
        for path in (saved(place, outputs, step)[0] / "state").rglob("*")
        if path.is_file() and path.stat().st_size > 64
    ]
    largest = max(files, key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 255
    largest.write_bytes(raw)
    found = end(train(place, outputs))
    assert [status for status, _, _ in found] == [0, 0], found
    assert any(f"checkpoints/{step}: damaged, and passed by" in line for line in found[0][2])
    assert_same(place, outputs)


@pytest.mark.slow
def test_what_a_run_leaves_of_parameters_that_are_spread(place):
    """Adapters, the merged model in both forms and samples, of tensors that no process has whole."""
    model = ModelConfig(width=16, num_layers=2, num_heads=2, mlp_width=16, max_length=16, vocab_size=256)
    save_model(place / "base", model, make_params(model, jax.random.key(0)), form="huggingface")
    more = ["--init_from", place / "base", "--steps", 6, "--export", "hf"]
    more += ["--lora", "{rank: 2, targets: [q_proj, down_proj], also: [final_norm], merge: true}"]
    more += ["--samples", "{prompts: [x1], max_new_tokens: 3}"]
    found = end(train(place, "spread", words=lambda _: [*more, "--mesh", "{data: 1, fsdp: 2}"]))
    assert [status for status, _, _ in found] == [0, 0], found
    words = ["train", place / "tiny.yaml", "--outputs", place / "together", *more, "--mesh", "{data: 1}"]
    assert main(list(map(str, words))) == 0
    ours, alone = folder_of(place, "spread"), folder_of(place, "together")
    for file in ("adapter/adapter_model.safetensors", "hf/model.safetensors"):
        one, other = load_file(ours / file), load_file(alone / file)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            np.testing.assert_allclose(tensor, other[name], atol=2e-5)
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert (ours / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()


@pytest.mark.slow
def test_conversations_about_images(place):
    """Of a family whose images are numbered over all rows; each batch has shapes of its own."""
    data, model = vlm_cases.write_data(place / "images"), vlm_cases.make(place / "vlm", "qwen2_vl")
    (place / "vlm.yaml").write_text(
        f"init_from: {model}\n"
        f"data: {{kind: image_chats, path: {data}, model: {model}, sequence_length: 64, holdout_every: 3}}\n"
        "steps: 3\nbatch_size: 2\nlog_every: 1\n"
    )
    found = end(train(place, "images2", config="vlm.yaml"))
    assert [status for status, _, _ in found] == [0, 0], found
    ((status, _, said),) = end(
        train(place, "images1", 1, config="vlm.yaml", words=lambda _: ["--mesh", "{data: 1}"])
    )
    assert status == 0, said
    losses = [
        [row.get("loss", row.get("eval_loss")) for row in map(json.loads, (run / "metrics.jsonl").open())]
        for run in (folder_of(place, "images2"), folder_of(place, "images1"))
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


@pytest.mark.slow
def test_evaluations_and_samples_of_two_processes_are_those_of_one(place):
    """Over parameters and rows that are spread over both."""
    rows = [{"prompt": f"x{i} =", "choices": [" 1", " 22"], "answer": 0} for i in range(6)]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = f"{{kind: text, path: {place / 'text.py'}, sequence_length: 16}}"
    asked = f"{{kind: questions, path: {place / 'questions.jsonl'}, measure: multiple_choice}}"
    (place / "evaluated.yaml").write_text(
        CONFIG.format(text=place / "text.py").replace("steps: 60", "steps: 4")
        + "samples: {prompts: ['x1 ='], max_new_tokens: 3}\n"
        + f"evaluations: [{{name: own, data: {own}}}, {{name: asked, data: {asked}}}]\n"
    )
    found = []
    for number, mesh in ((2, "{data: 1, fsdp: 2}"), (1, "{data: 1}")):
        words = lambda process, mesh=mesh: ["--mesh", mesh]
        ended = end(train(place, f"evaluated{number}", number, config="evaluated.yaml", words=words))
        assert [status for status, _, _ in ended] == [0] * number, ended
        run = folder_of(place, f"evaluated{number}")
        results = json.loads((run / "results.json").read_text())
        found.append((results["evaluations"], (run / "samples.jsonl").read_text()))
    (two, samples), (one, alone) = found
    assert samples == alone
    assert two["own"]["loss"] == pytest.approx(one["own"]["loss"], rel=2e-6)
    assert two["own"]["by_position"] == [pytest.approx(row, rel=2e-5) for row in one["own"]["by_position"]]
    assert two["asked"] == pytest.approx(one["asked"], rel=2e-5)


@pytest.mark.slow
def test_three_processes(place):
    """One of them is killed; then all go on."""
    more = lambda _: ["--batch_size", 6, "--steps", 24]
    processes = train(place, "three", 3, words=more)
    wait_for(lambda: saved(place, "three", 4), processes)
    processes[2].kill()
    found = end(processes, seconds=120)
    assert [status for status, _, _ in found] == [1, 1, -9], found
    for _, _, said in found[:2]:
        assert re.search(r"process 2 on \S+ has ended", said[-1]), said
    found = end(train(place, "three", 3, words=more))
    assert [status for status, _, _ in found] == [0, 0, 0], found
    assert "resuming at step" in found[0][1]
    words = [
        "train",
        place / "tiny.yaml",
        "--outputs",
        place / "three-alone",
        "--mesh",
        "{data: 1}",
        *more(0),
    ]
    assert main(list(map(str, words))) == 0
    losses = [
        [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in row]
        for run in (folder_of(place, "three"), folder_of(place, "three-alone"))
    ]
    assert len(losses[0]) > 2
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


def alone_of_two(process):
    told = f"coordinator: '127.0.0.1:{free_port()}', num_processes: 2, process_id: 0, start_timeout: 3"
    return ["--distributed", f"{{kind: explicit, {told}}}"]


@pytest.mark.slow
def test_mistakes_of_a_launch(place):
    """Folders of their own, another config, a process that never comes."""
    found = end(train(place, "own0", words=lambda p: ["--outputs", place / f"own{p}"]))
    assert [status for status, _, _ in found] == [2, 2], found
    assert "here it is not the folder of process 0; all processes need one disk" in found[1][2][-1]
    assert "process 1 on" in found[0][2][-1]
    assert not (place / "own1").exists()
    found = end(train(place, "other", words=lambda p: ["--steps", 60 + p]))
    assert [status for status, _, _ in found] == [2, 2], found
    assert "start all with the same config, data and code" in found[1][2][-1]
    (alone,) = train(place, "alone", 1, words=alone_of_two)
    ((status, _, said),) = end([alone], seconds=120)
    assert status == 2
    assert "not all of the 2 processes have arrived at 127.0.0.1:" in said[-1]


@pytest.mark.slow
def test_a_link_that_is_cut(place):
    """Each process in a network of its own, with a cable between them, which is cut."""
    names = ["jaxlab-a", "jaxlab-b"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}",
        *(f"ip -n {name} addr add 10.213.0.{i + 1}/24 dev v{i}" for i, name in enumerate(names)),
        *(f"ip -n {name} link set {link} up" for i, name in enumerate(names) for link in ("lo", f"v{i}")),
    ]
    try:
        for command in commands:
            if subprocess.run(command.split(), capture_output=True, check=False).returncode:
                pytest.skip("no right to make networks")
        for i, name in enumerate(names):  # where Gloo looks up the host's own name
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n10.213.0.{i + 1} {socket.gethostname()}\n")
        into = lambda process: ["ip", "netns", "exec", names[process]]
        processes = train(place, "cut", address="10.213.0.1", prefix=into)
        wait_for(lambda: saved(place, "cut", 4), processes)
        subprocess.run(f"ip -n {names[1]} link set v1 down".split(), check=True)
        found = end(processes, seconds=120)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    assert [status for status, _, _ in found] == [1, 1], found
    assert re.search(r"process 1 on \S+ has ended: no sign of it", found[0][2][-1]), found[0][2]
    # By its own seconds, or because process 0, which has given it up, is gone by then.
    assert re.search(r"process 0 on \S+ (is gone|has ended: no answer from it)", found[1][2][-1]), found[1][2]
    shutil.rmtree(place / "cut")
