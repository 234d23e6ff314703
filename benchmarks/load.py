"""Loading a bf16 checkpoint of 1.1 billion parameters: seconds and peak memory, beside reading its bytes.

    JAX_PLATFORMS=cpu python benchmarks/load.py --folder made --out load.json

The folder is made on the first run: TinyLlama's shapes, numbers of one seed, two shards. Each reader runs in
a process of its own, in turn, so that its peak memory is its own; seconds count from the first byte that it
asks for, not the imports. Files are in the page cache of the system if they fit.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro
from tqdm import tqdm

from jaxlab.app.provenance import environment
from jaxlab.checkpoints.families import read_config
from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.tensor_folder import Planned, write_folder
from jaxlab.checkpoints.tensor_map import entries
from jaxlab.files import write_json
from jaxlab.models import abstract_params

READERS = {
    "bytes": """
import glob
size = 0
for name in sorted(glob.glob(folder + "/*.safetensors")):
    with open(name, "rb") as file:
        data = np.fromfile(file, np.uint8)
    size += data.nbytes
    del data
""",
    "safetensors_numpy": """
import glob
import ml_dtypes  # gives numpy its bfloat16
from safetensors import safe_open
begin()
tensors = {}
for name in sorted(glob.glob(folder + "/*.safetensors")):
    with safe_open(name, framework="numpy") as file:
        for key in file.keys():
            tensors[key] = file.get_tensor(key)
size = sum(x.nbytes for x in tensors.values())
""",
    "jaxlab": """
import jax
from jaxlab.checkpoints import load_model
jax.devices()
begin()
config, params, _ = load_model(folder)
jax.block_until_ready(params)
size = sum(x.nbytes for x in jax.tree.leaves(params))
""",
}
"""What each process does between its start and its report."""

_PROCESS = """
import json, resource, sys, time
import numpy as np
folder = sys.argv[1]
start = time.perf_counter()
base = 0
def begin():
    global start, base
    start, base = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin()
{body}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peaks = dict(peak_bytes=1024 * peak, peak_over_imports=1024 * (peak - base))
print(json.dumps(dict(seconds=seconds, bytes=size, **peaks)))
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured, and where."""

    folder: Path
    """Where the checkpoint lies, or is made."""
    out: Path
    """JSON file to write."""
    layers: int = 22
    """Of the model; 22 make 1.1 billion parameters."""
    repeats: int = 3
    """Runs of each reader; the median counts."""


def config_of(layers: int) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make(folder: Path, layers: int) -> None:
    """A checkpoint of random numbers."""
    config = config_of(layers)
    template = abstract_params(read_config(config, folder))
    drawn = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)

    def planned() -> Iterator[Planned]:
        for entry in entries(template, "llama"):
            shape = entry.shape(template)
            for name in entry.names:
                get = lambda shape=shape: np.resize(drawn, shape)
                yield Planned(name, np.dtype(ml_dtypes.bfloat16), shape, get)

    write_folder(folder, planned(), config=config, shard_bytes=1_500_000_000)


def main(arguments: Arguments) -> None:
    if not arguments.folder.exists():
        make(arguments.folder, arguments.layers)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in READERS}
    rounds = [name for _ in range(arguments.repeats) for name in READERS]
    for name in tqdm(rounds, desc="load", unit="run"):
        code = _PROCESS.format(body=READERS[name])
        command = [sys.executable, "-c", code, str(arguments.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found[name].append({"failed": done.stderr.strip().splitlines()[-1]})
        else:
            found[name].append(json.loads(done.stdout))
    results = {}
    for name, runs in found.items():
        failed = [run["failed"] for run in runs if "failed" in run]
        median = lambda key, runs=runs: statistics.median(run[key] for run in runs)
        results[name] = {"failed": failed[0]} if failed else {key: median(key) for key in runs[0]}
        print(name, results[name])
    write_json(arguments.out, {"layers": arguments.layers, "readers": results, "env": environment()})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
