"""Killed while it tokenises, or given more than it may hold, preparing ends with the same tokens."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.documents.small import documents, source

PROGRAM = """
import resource, sys
from pathlib import Path
from jaxlab.data import DataSet, DocumentsConfig, DocumentsSource
from jaxlab.data.documents.preparing import prepare_units

config = DocumentsConfig(sources=(DataSet(sys.argv[1]),), sequence_length=64, held_out=0.0)
source = DocumentsSource(config, Path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
units = [unit for of_set in source._units.values() for unit in of_set]
print("begins", flush=True)
options = {"processes": int(sys.argv[2]), "shard_tokens": int(sys.argv[3])}
prepare_units(units, config, source._encoders, Path, **options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def begin(path, processes, shard_tokens):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    words = [sys.executable, "-c", PROGRAM, str(path), str(processes), str(shard_tokens)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_corpus(path, megabytes):
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 9, 500)]
    with open(path, "w") as file:
        while file.tell() < megabytes << 20:
            text = " ".join(words[i] for i in rng.integers(0, 500, rng.integers(1, 2000)))
            file.write(json.dumps({"text": text}) + "\n")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(tmp_path, cache, processes):
    for name in ("a", "b")[:processes]:
        write_corpus(tmp_path / f"{name}.jsonl", 80 // processes)
    chance = random.Random(processes)
    kills = 0
    for _ in range(12):
        process = begin(tmp_path / "*.jsonl", processes, 1 << 21)
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n", process.stderr and process.stderr.read()
        time.sleep(chance.uniform(0.05, 2.0))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert kills >= 3
    process = begin(tmp_path / "*.jsonl", processes, 1 << 21)
    process.communicate()
    assert process.returncode == 0
    there = sorted(p.name for p in cache.rglob("*") if p.is_file() and "tokens" in str(p))
    found = source(tmp_path / "*.jsonl")
    assert found.prepared
    kept = documents(found)
    assert len([name for name in there if name.endswith(".safetensors")]) > 10
    assert not [name for name in there if name.startswith(".0")]  # nothing torn is left
    expected = [
        json.loads(line)["text"].encode() + b"\0"
        for path in sorted(tmp_path.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [bytes(tokens) for tokens in kept] == expected


def test_a_file_is_never_held_whole(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 300)
    process = begin(tmp_path / "a.jsonl", 1, 1 << 22)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert int(out.split()[-1]) < 150  # MiB, of 300 that were read
