"""The tasks on one device and over eight, compared: prints what test_model_mesh.py asserts, as JSON.

Run by itself with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlab.app.runs import Run
from jaxlab.checkpoints import load_model, open_model, save_model
from jaxlab.config import build
from jaxlab.costs import bytes_per_device, generation_memory
from jaxlab.data.episodes import EpisodesConfig, EpisodesSource
from jaxlab.icl import Blocking
from jaxlab.models import ModelConfig, Params, SplitConfig, generate, init_params, model_mesh, using
from jaxlab.tasks import evaluate, icl
from jaxlab.tasks import main as run_command

SPLIT = SplitConfig(fsdp=4, model=2)
EPISODES = EpisodesConfig(longer_from=(5,), classes=2, shots=2, sequence_length=16)


def held(params: Params) -> list[int]:
    """Bytes on each device."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return list(sizes.values())


def largest(one: Any, other: Any) -> float:
    """The largest difference between numbers of two results, relative to 1 and to their size."""
    if isinstance(one, dict):
        return max(
            (largest(one[key], other[key]) for key in one if key not in ("seconds", "made_by")), default=0.0
        )
    if isinstance(one, list | tuple):
        return max((largest(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float | np.ndarray | np.generic) and not isinstance(one, bool):
        a, b = (np.asarray(x, np.float64) for x in (one, other))
        return float((np.abs(a - b) / (1 + np.abs(a))).max()) if a.size else 0.0
    return 0.0 if one == other else float("inf")


def model_at(place: Path, tokenizer: Any, vocabulary: int) -> Path:
    model = ModelConfig(
        vocab_size=vocabulary,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=48,
        max_length=64,
    )
    save_model(place, model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(3)), tokenizer)
    return place


def generated(path: Path, mesh: Mesh | None) -> np.ndarray:
    opened = open_model(path)
    batch = {"tokens": np.arange(3, 27, dtype=np.int32).reshape(4, 6)}
    with using(mesh):
        return generate(opened.read(mesh=mesh), batch, opened.config, max_new_tokens=8)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tokenizer = EpisodesSource(EPISODES).tokenizer()
        path = model_at(place / "model", tokenizer, tokenizer.get_vocab_size())
        mesh = model_mesh(SPLIT)
        opened = open_model(path)
        with using(mesh):
            memory = generation_memory(opened.placed(mesh), opened.config, 4, 6, 8)
        found: dict[str, Any] = {
            "devices": len(jax.devices()),
            "bytes": held(opened.read(mesh=mesh)),
            "planned": [bytes_per_device(opened.placed(mesh))] * 8,
            "memory": memory,
            "same_tokens": bool((generated(path, None) == generated(path, mesh)).all()),
        }
        assert memory["parameters"] == found["planned"][0]

        data = EPISODES
        config = icl.Config(
            model=str(path), data=data, examples=8, batch_size=4, seeds=(1,), blocking=Blocking(layers=(1,))
        )
        alone, split = (
            icl.run(dataclasses.replace(config, mesh=at), Run(place, "icl")) for at in (SplitConfig(), SPLIT)
        )
        found["flows"] = largest(alone["flows"], split["flows"])
        found["answers"] = largest(alone["accuracy"], split["accuracy"])
        checked = icl.check(dataclasses.replace(config, mesh=SPLIT))
        assert checked["parameter_bytes_per_device"] == found["planned"][0], checked

        byte_model = model_at(place / "bytes", None, 256)
        (place / "text.txt").write_bytes(b"abcdefgh" * 200)
        text = {"path": str(place / "text.txt"), "sequence_length": 16, "holdout_every": 2}
        base = {"model": str(byte_model), "data": text, "batch_size": 4, "batches": 2}
        results = []
        for at in ({}, {"fsdp": 4, "model": 2}):
            config_of = build(evaluate.Config, {**base, "mesh": at})
            results.append(evaluate.run(config_of, Run(place, "evaluate")))
        found["evaluate"] = largest(*results)
        checked = evaluate.check(config_of)["bytes_per_device"]
        assert checked["parameters"] == bytes_per_device(open_model(byte_model).placed(mesh)), checked

        words = ["convert", str(path), str(place / "hf"), "--mesh.fsdp", "4", "--mesh.model", "2"]
        assert run_command(words) == 0
        _, one, _ = load_model(path)
        _, other, _ = load_model(place / "hf")
        equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), one, other)
        found["converted"] = all(jax.tree.leaves(equal))
        print(json.dumps(found))


if __name__ == "__main__":
    main()
