"""What 25 recipes of a search cost beside one load of the models and 25 evaluations.

    python benchmarks/merge_search.py                      # 60 million parameters in bf16, three models
    python benchmarks/merge_search.py --layers 24 --width 1024

For each operator: CPU seconds (wall seconds on an accelerator) of reading the three models, of evaluating one
model 25 times, and of merging and evaluating 25 points, compiled beforehand; and the last over the sum of the
first two. With --in-forward the layers are merged where they run.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxlab.checkpoints import open_model, save_model
from jaxlab.merging import Evaluator, Space, plan_injection, read_trio, token_measure
from jaxlab.models import ModelConfig, init_params

OPERATORS = {
    "task_arithmetic": {},
    "ties": {"density": (0.5,)},
    "dare_linear": {"density": (0.5,)},
    "slerp": {},
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    layers: int = 12
    width: int = 512
    tokens: int = 128
    """In a row."""
    rows: int = 16
    """That a point is evaluated on."""
    in_forward: bool = False
    out: str = ""
    """A JSON file to write."""


def main(arguments: Arguments) -> None:
    a = arguments
    config = ModelConfig(
        vocab_size=32000,
        width=a.width,
        num_layers=a.layers,
        num_heads=a.width // 64,
        mlp_width=3 * a.width,
        compute_dtype="float32",
        max_length=a.tokens,
        family="llama",
    )
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            params = init_params(config, jax.random.key(seed))
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
            save_model(Path(folder) / str(seed), config, params, None, form="huggingface")
        clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
        models = [open_model(Path(folder) / str(seed)) for seed in range(3)]
        start = clock()
        trio = jax.block_until_ready(read_trio(*models))
        load = clock() - start
        plan = plan_injection(trio.vlm, trio.expert, trio.base, family=trio.config.family)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, a.rows, a.tokens))
        data = {"random": [{"tokens": jnp.asarray(tokens, jnp.int32)}]}
        measure = token_measure(trio.config)
        alone = jax.jit(measure)
        jax.block_until_ready(alone(trio.vlm, data))
        start = clock()
        for _ in range(25):
            jax.block_until_ready(alone(trio.vlm, data))
        evaluations = clock() - start
        count = sum(x.size for x in jax.tree.leaves(trio.vlm))
        print(f"{count / 1e6:.0f} million parameters, load {load:.1f} s, 25 evaluations {evaluations:.1f} s")
        found = {"parameters": count, "load": load, "evaluations": evaluations, "operators": {}}
        grid = tuple(round(0.2 * i, 1) for i in range(1, 6))
        for name, parameters in OPERATORS.items():
            space = Space(operator=name, method="grid", lambda_v=grid, lambda_e=grid, **parameters)
            evaluator = Evaluator(plan, trio, in_forward=a.in_forward)
            evaluator(name, space.points()[:1], measure, data)  # compiles
            evaluator = Evaluator(plan, trio, in_forward=a.in_forward)
            start = clock()
            evaluator(name, space.points(), measure, data)
            search = clock() - start
            ratio = (load + search) / (load + evaluations)
            found["operators"][name] = {"search": search, "ratio": ratio}
            print(f"{name}: {search:.1f} s; with the load {ratio:.2f} times one load and the evaluations")
        if a.out:
            Path(a.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
