"""How far flows in bfloat16 are from those in float32 with the same weights: here, and in PyTorch.

    python benchmarks/icl_bf16.py --model FOLDER --texts sst2/validation.tsv --torch-python torch/bin/python

FOLDER is of Hugging Face's form, as `run.py convert` writes it. Prompts are the paper's on SST-2, three
demonstrations each, their last tokens. Of each prompt and layer: the largest difference of the sums over
pairs of classes, over the largest sum; and the same after one factor common to all layers of the prompt is
taken out. PyTorch's attention is the eager one, in bfloat16.
"""

import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxlab import load_model
from jaxlab.app import environment
from jaxlab.files import write_json
from jaxlab.icl import flows

WORDS = (" Negative", " Positive")


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: Path
    texts: Path
    """Tab-separated: sentence, label 0 or 1; the first line is a header."""
    torch_python: str = ""
    """A Python with torch and transformers."""
    prompts: int = 24
    tokens: int = 64
    out: Path | None = None


def prompts(arguments: Arguments, tokenizer: Any) -> dict[str, np.ndarray]:
    """Tokens, classes (0 text, 1 every 13th token, 2 the last; the first none), and the two label words."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    rows = [line.split("\t") for line in arguments.texts.read_text().splitlines()[1:]]
    found: list[list[int]] = []
    for start in range(0, len(rows) - 3, 4):
        *shown, asked = rows[start : start + 4]
        text = "".join(f"Review: {x.strip()}\nSentiment:{WORDS[int(y)]}\n" for x, y in shown)
        tokens = ids(f"{text}Review: {asked[0].strip()}\nSentiment:")
        if len(tokens) >= arguments.tokens:
            found.append(tokens[-arguments.tokens :])
    tokens = np.array(found[: arguments.prompts], np.int32)
    classes = np.zeros(tokens.shape, np.int32)
    classes[:, ::13], classes[:, -1], classes[:, 0] = 1, 2, -1
    return {"tokens": tokens, "classes": classes, "words": np.array([ids(word)[0] for word in WORDS])}


def ours(arguments: Arguments, given: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    """Flows with weights rounded to bfloat16, computed in `dtype`."""
    config, params, _ = load_model(str(arguments.model))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), params)
    count, length = given["tokens"].shape
    targets = {
        "positions": np.full(count, length - 1),
        "label_tokens": given["words"],
        "labels": np.ones(count, np.int32),
    }
    config = dataclasses.replace(config, compute_dtype=dtype)
    return np.asarray(flows(params, {"tokens": given["tokens"]}, config, given["classes"], targets)[0])


def differences(found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Over prompts and layers."""
    axes = (2, 3)
    factor = np.median(found.sum(axes) / expected.sum(axes), axis=1)[:, None, None, None]
    size = np.abs(expected).max(axes)
    whole, rest = (np.abs(x - expected).max(axes) / size for x in (found, found / factor))
    return {
        "median": float(np.median(whole)),
        "mean_of_prompts_medians": float(np.median(whole, axis=1).mean()),
        "largest": float(whole.max()),
        "median_without_common_factor": float(np.median(rest)),
        "prompts_medians": np.median(whole, axis=1).round(5).tolist(),
    }


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    _, _, tokenizer = load_model(str(arguments.model))
    given = prompts(arguments, tokenizer)
    expected = ours(arguments, given, "float32")
    found = {"jaxlab": differences(ours(arguments, given, "bfloat16"), expected)}
    if arguments.torch_python:
        with tempfile.TemporaryDirectory() as folder:
            inputs, outputs = Path(folder) / "in.npz", Path(folder) / "out.npy"
            np.savez(inputs, **given)
            script = str(Path(__file__).with_name("icl_bf16_torch.py"))
            command = [arguments.torch_python, script, str(arguments.model), str(inputs), str(outputs)]
            subprocess.run(command, check=True, capture_output=True)
            found["torch, eager"] = differences(np.load(outputs), expected)
    results = {
        "model": arguments.model.name,
        "prompts": len(expected),
        "tokens": arguments.tokens,
        "bfloat16_against_float32": found,
    }
    print(json.dumps(results, indent=1))
    if arguments.out is not None:
        write_json(arguments.out, results | {"environment": environment()})


if __name__ == "__main__":
    main()
