"""Folders as Hugging Face has them, made of the golden cases, whose weights follow from their names."""

import functools
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.checkpoints import entries, from_hf, load_model, save_model, tree_of
from jaxlab.checkpoints.safetensors_file import DTYPES
from jaxlab.checkpoints.tensor_folder import Planned, write_folder

save = functools.partial(save_model, form="huggingface")

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


@functools.cache
def _weights_module() -> Any:
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def weights(case: str) -> dict[str, np.ndarray]:
    """The tensors of a case by their names on disk, float32."""
    return _weights_module().weights(GOLDEN / case)


def config(case: str, version: int = 5) -> dict[str, Any]:
    name = "config.json" if version == 5 else "config.transformers4.json"
    return json.loads((GOLDEN / case / name).read_text())


def layouts(case: str) -> list[dict[str, Any]]:
    """The other layouts of a case; see tests/golden/families/README.md."""
    return json.loads((GOLDEN / case / "layouts.json").read_text())


def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "golden.npz") as file:
        return dict(file)


def laid_out(tensors: dict[str, np.ndarray], layout: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a case under the names of another layout."""
    found = {
        name: value
        for name, value in tensors.items()
        if not any(re.search(pattern, name) for pattern in layout.get("drop", ()))
    }
    for copy, name in layout.get("copies", {}).items():
        found[copy] = tensors[name]
    for pattern, name in layout.get("stack", ()):
        found = _stacked(found, pattern, name)
    for pattern, replacement in layout.get("rename", ()):
        found = {re.sub(pattern, replacement, name): value for name, value in found.items()}
    for name, shape, dtype in layout.get("extra", ()):
        found[name] = np.ones(shape, DTYPES[dtype])
    return found


def _stacked(tensors: dict[str, np.ndarray], pattern: str, name: str) -> dict[str, np.ndarray]:
    """Experts joined on a new first axis, several tensors of one expert along their rows."""
    kept = dict(tensors)
    groups: dict[str, dict[int, list[np.ndarray]]] = {}
    for key in tensors:
        match = re.search(pattern.replace("{e}", r"(\d+)"), key)
        if match is None:
            continue
        prefix = key[: match.start()]
        groups.setdefault(prefix, {}).setdefault(int(match[1]), []).append(key)  # type: ignore[arg-type]
        del kept[key]
    for prefix, experts in groups.items():
        rows = [
            np.concatenate([tensors[key] for key in sorted(experts[e], key=lambda key: "gate" not in key)])
            for e in sorted(experts)
        ]
        kept[prefix + name] = np.stack(rows)
    return kept


def write(
    path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shard_bytes: int = 1 << 40
) -> Path:
    """A folder with these tensors."""
    planned = [
        Planned(name, value.dtype, value.shape, lambda value=value: value) for name, value in tensors.items()
    ]
    write_folder(path, planned, config=config, shard_bytes=shard_bytes)
    return path


def make(path: Path, case: str, *, layout: dict[str, Any] | None = None, version: int = 5) -> Path:
    """The folder of a case."""
    tensors = weights(case)
    return write(path, config(case, version), tensors if layout is None else laid_out(tensors, layout))


def from_hf_tensors(
    tensors: Mapping[str, np.ndarray], template: Mapping[str, Any], family: str = "jaxlab"
) -> dict[str, Any]:
    """The tree shaped like `template` whose leaves are given by the patterns of their entries."""
    wanted = entries(template, family)
    assert set(tensors) == {entry.pattern for entry in wanted}
    leaves: dict[Any, Any] = {}
    for entry in wanted:
        leaves |= from_hf(tensors[entry.pattern], entry, template)
    return tree_of(leaves)


def read_all(path: Path) -> dict[str, np.ndarray]:
    from jaxlab.checkpoints.tensor_folder import open_folder

    return {name: tensor.read() for name, tensor in open_folder(path).items()}


def write_all(out: Path) -> None:
    """Every case read and written by jaxlab, without the config.json that it came with."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            config, params, _ = load_model(make(Path(place) / case, case))
        save(out / case, config, params)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
