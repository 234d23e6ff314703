"""The scripts of docs/launch/: they are scripts, manifests, and command lines that the tasks take."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxlab.config import load
from jaxlab.distributed import ClusterConfig, find_place
from jaxlab.training import TrainConfig

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "docs" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))


def shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


def test_all_files_are_looked_at():
    assert {*LAUNCH.iterdir()} == {*SCRIPTS, *MANIFESTS}
    page = (ROOT / "docs" / "clusters.md").read_text()
    assert all(f"launch/{path.name}" in page for path in (*SCRIPTS, *MANIFESTS))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts(path, tmp_path):
    """Linted, and run with an srun that says what it was given."""
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=True).stderr == b""
    if (lint := shellcheck()) is not None:
        found = subprocess.run([lint, path], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    run = lambda *words: subprocess.run(
        ["bash", path, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run().returncode == 2
    words = ["a b.yaml", "--sweep", "rate=[1, 2]"]
    found = run(*words)
    assert found.returncode == 0, found.stderr
    start = found.stdout.splitlines().index("python")
    last = {"slurm_train.sh": ["--distributed", "auto"], "slurm_sweep.sh": ["--sweep-index", "auto"]}
    assert found.stdout.splitlines()[start:] == ["python", "run.py", "train", *words, *last[path.name]]


def test_a_run_that_was_asked_to_stop_is_queued_again(tmp_path):
    for name, text in {
        "srun": "exit 143",
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    command = ["bash", LAUNCH / "slurm_train.sh", "a.yaml"]
    assert subprocess.run(command, env=environment, cwd=tmp_path, check=False).returncode == 143
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    (tmp_path / "srun").write_text("#!/bin/bash\nexit 2\n")
    assert subprocess.run(command, env=environment, cwd=tmp_path, check=False).returncode == 2
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests(path, monkeypatch):
    """Parsed; their numbers agree, every pod finds its place, and train takes the command line."""
    parts = list(yaml.safe_load_all(path.read_text()))
    job = parts[-1]
    if job["kind"] == "JobSet":
        (replicated,) = job["spec"]["replicatedJobs"]
        spec = replicated["template"]["spec"]
        # <jobset>-<job>-<job index>-<pod index>.<jobset>, by the documentation of JobSet.
        first = f"{job['metadata']['name']}-{replicated['name']}-0-0.{job['metadata']['name']}"
    else:
        (service,) = parts[:-1]
        spec, name = job["spec"], job["metadata"]["name"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"job-name": name}
        assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
        first = f"{name}-0.{service['metadata']['name']}"
    (container,) = spec["template"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == int(environment["JAX_PROCESS_COUNT"])
    for index in range(spec["completions"]):
        place = find_place(environment | {"JOB_COMPLETION_INDEX": str(index)})
        assert place.process_id == index
        assert place.coordinator == f"{first}:{container['ports'][0]['containerPort']}"
    assert container["command"] == ["python", "run.py", "train"]
    monkeypatch.chdir(ROOT)
    config, *words = container["args"]
    resolved = load(TrainConfig, config, [word for word in words if not word.startswith("--outputs")])
    assert resolved.distributed == ClusterConfig()
    gpus = spec["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert resolved.mesh.data * resolved.mesh.fsdp == gpus
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in spec["template"]["spec"]["volumes"]}
