"""Memory of flows on one H100, of whole models, worked out without a GPU: compiled for one, nothing runs.

    JAX_PLATFORMS=cpu python benchmarks/icl_compiled.py --out benchmarks/icl_compiled.json

Needs the extra `gpu-compile`. Of each case: bytes of the weights, of everything else at its largest, in all,
and what ptxas says of the kernels. "logits" is what logits of every position would take, which are never
built. GPT2-XL at the length of the paper's prompts; a 7B model (Llama 2's shape) at 65,536 tokens.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from jaxlab.app import environment
from jaxlab.files import write_json
from jaxlab.icl import flows
from jaxlab.models import LearnedPositions, ModelConfig, abstract_params
from kernels_pallas.nsa.specs import h100
from kernels_pallas.target import compiled_elsewhere

GPT2_XL = ModelConfig(
    vocab_size=50257,
    width=1600,
    num_layers=48,
    num_heads=25,
    mlp="plain",
    mlp_width=6400,
    activation="gelu_tanh",
    norm="layer",
    position=LearnedPositions(),
    attention_bias=True,
    mlp_bias=True,
    max_length=1024,
)
LLAMA_7B = ModelConfig(
    vocab_size=32000,
    width=4096,
    num_layers=32,
    num_heads=32,
    mlp_width=11008,
    max_length=65536,
    tie_embeddings=False,
)
CASES: dict[str, tuple[ModelConfig, str, int, int, str]] = {
    "gpt2-xl float32, 16 prompts": (GPT2_XL, "float32", 16, 320, "xla"),
    "gpt2-xl bfloat16, 16 prompts": (GPT2_XL, "bfloat16", 16, 320, "mosaic_gpu"),
    "7b bfloat16, 65536 tokens": (LLAMA_7B, "bfloat16", 1, 65536, "mosaic_gpu"),
    "7b bfloat16, 65536 tokens, xla": (LLAMA_7B, "bfloat16", 1, 65536, "xla"),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    out: Path | None = None
    """JSON file to write."""
    cases: tuple[str, ...] = tuple(CASES)


def compiled(name: str, dump: Path) -> dict[str, Any]:
    """One case."""
    config, dtype, batch, tokens, implementation = CASES[name]
    config = dataclasses.replace(config, compute_dtype=dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(config))
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def step(params: Any, tokens: Any, classes: Any, targets: Any) -> Any:
        return flows(
            params, {"tokens": tokens}, config, classes, targets, num_classes=3, implementation=implementation
        )

    targets = {"positions": integers(batch), "label_tokens": integers(4), "labels": integers(batch)}
    start = time.perf_counter()
    with compiled_elsewhere():
        report = h100.compile_for_h100(
            step, params, integers(batch, tokens), integers(batch, tokens), targets, dump=dump
        )
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    gib = lambda size: round(size / 2**30, 3)
    return {
        "batch": batch,
        "tokens": tokens,
        "dtype": dtype,
        "implementation": implementation,
        "weights_gib": gib(weights),
        "temporary_gib": gib(report.temporary_bytes),
        "all_gib": gib(report.argument_bytes + report.temporary_bytes),
        "logits_of_every_position_gib": gib(4 * batch * tokens * config.vocab_size),
        "kernels": [dataclasses.asdict(kernel) for kernel in report.kernels],
        "seconds_to_compile": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    missing = h100.missing()
    if missing is not None:
        raise SystemExit(missing)
    dump = Path(tempfile.mkdtemp())
    h100.dump_to(dump)
    # Cases of another run stay as they are, each with its commit.
    out = arguments.out
    found: dict[str, Any] = json.loads(out.read_text())["cases"] if out is not None and out.exists() else {}
    for name in arguments.cases:
        found[name] = compiled(name, dump) | {"commit": environment()["commit"]}
        print(name, {key: value for key, value in found[name].items() if key != "kernels"}, flush=True)
        if arguments.out is not None:
            write_json(arguments.out, {"cases": found, "environment": environment()})


if __name__ == "__main__":
    main()
