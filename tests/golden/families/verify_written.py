"""Whether transformers loads folders that jaxlab wrote, and computes the golden logits from them.

    python verify_written.py FOLDER [--out FILE]

FOLDER holds a folder for each case that was written, named as the case. Writes verified.json beside this file
(or FILE) and ends with status 1 if a folder does not load, its logits differ by more than 1e-4 relative, or
its names and shapes are others than in keys.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make import CASES, HERE, forward, load
from safetensors import safe_open

TOLERANCE = 1e-4
PROMPT = ("prompt", "greedy", "logits")


def keys_of(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors of a folder; each name stands in one file."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise SystemExit(f"{folder}: {name} stands in two files")
                found[name] = file.get_slice(name).get_shape()
    return found


def verify(name: str, folder: Path) -> dict[str, Any]:
    """One line of verified.json."""
    case = CASES[name]
    with np.load(HERE / name / "golden.npz") as file:
        golden = dict(file)
    logits = golden["logits"]
    inputs = {"input_ids": golden["tokens"].astype(np.int64)}
    of_prompt = lambda key: key.partition(".")[0].removesuffix("_long") in PROMPT
    inputs |= {k: v for k, v in golden.items() if k != "tokens" and not of_prompt(k)}
    expected = {key: shape for key, shape, _ in json.loads((HERE / name / "keys.json").read_text())}
    result: dict[str, Any] = {"transformers": transformers.__version__}
    try:
        found = forward(load(case, folder), inputs)
    except (SystemExit, Exception) as error:  # any failure to load is a finding, not an end
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0].replace(str(folder), name)
    else:
        result["max_relative_difference"] = float(
            f"{np.abs(found - logits).max() / np.abs(logits).max():.2e}"
        )
    result["keys_identical"] = keys_of(folder) == expected
    result["passed"] = result["keys_identical"] and result.get("max_relative_difference", np.inf) <= TOLERANCE
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "verified.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = sorted(path.name for path in arguments.folder.iterdir() if path.name in CASES)
    if not names:
        raise SystemExit(f"{arguments.folder}: no folder is named as a case")
    results = {}
    for name in names:
        results[name] = verify(name, arguments.folder / name)
        print(name, results[name])
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()]
    arguments.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    missing = sorted(set(CASES) - set(names))
    failed = [name for name, result in results.items() if not result["passed"]]
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed; without a folder: {missing or 'none'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
