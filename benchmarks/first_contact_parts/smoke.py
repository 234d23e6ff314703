"""Whether everything else runs here: a training step, generation, a merge, a search point, flows. Its numbers
mean nothing. What the tasks need beyond jax is told where it is missing.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from first_contact_parts.checks import placed
from first_contact_parts.child import line_of
from first_contact_parts.steps import Item, Row

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart"
SHIPPED = "jaxlab/assets/icl_model"
KERNELS = {
    "model.num_heads": 16,
    "model.head_dim": 64,
    "model.compute_dtype": "bfloat16",
    "model.attention.block_len": 32,
    "model.attention.stride": 16,
    "model.attention.block_size": 64,
    "model.attention.window": 128,
    "model.attention.compress_width": 128,
    "model.attention.implementation": "mosaic_gpu",
}
"""With which nsa_sparse takes the Hopper kernels."""
SMALL = {"data.sequence_length": 128}
"""Of a dry run."""
SHORT = {"steps": 2, "eval_batches": 1}
_POINT = {"lambda_v": [0.8], "lambda_e": [1.0]}
ONE_POINT = {
    "operators": {
        "task_arithmetic": _POINT,
        "slerp": _POINT,
        "ties": _POINT | {"density": [0.5]},
        "dare_linear": _POINT | {"density": [0.5]},
    },
    "batches": 1,
    "batch_size": 8,
}
"""Of each operator that the config searches over, as its rule of equal numbers asks."""


def items(options: dict[str, Any], part: str) -> list[Item]:
    os.chdir(ROOT)
    folder = Path(tempfile.mkdtemp(prefix="first_contact_smoke_"))
    kernels = {} if options["tiny"] else KERNELS
    length = SMALL if options["tiny"] else {}
    works: dict[str, dict[str, Callable[[], None]]] = {
        "train": {
            "train, NSA by kernels" if kernels else "train, NSA": functools.partial(
                _train, "nsa_sparse", folder, kernels | length
            ),
            "train, full attention": functools.partial(_train, "nsa_full", folder, length),
        },
        "generate": {
            "generate, full attention": functools.partial(_generate, SHIPPED, "a b"),
            "generate, NSA": functools.partial(_train_and_generate, folder, kernels | length),
        },
        "merge": {"merge": functools.partial(_merge, folder)},
        "search": {"search over merges": functools.partial(_search, folder)},
        "flows": {
            "flows, XLA": functools.partial(_flows_of_model, folder),
            "flows, kernel beside XLA": functools.partial(_flow_kernel, options),
        },
    }
    return [
        Item(name, lambda: None, functools.partial(_run, name, work)) for name, work in works[part].items()
    ]


def _run(name: str, work: Callable[[], None], _: Any) -> list[Row]:
    start = time.perf_counter()
    try:
        work()
    except ModuleNotFoundError as error:
        return [{"name": name, "reason": f"{error}: install it to see"}]
    except SystemExit as error:
        return [{"name": name, "failed": f"it left with {error.code}"}]
    except Exception as error:
        import traceback

        traceback.print_exc()
        return [{"name": name, "failed": line_of(error)}]
    return [{"name": name, "right": True, "error": 0.0, "took_s": time.perf_counter() - start}]


def _command(*words: str) -> None:
    from jaxlab.tasks import main

    if status := main(list(words)):
        raise RuntimeError(f"run.py {' '.join(words[:2])} ended with {status}")


def _stage(task: str, config: str, folder: Path, more: dict[str, Any]) -> Path:
    from jaxlab.tasks import execute

    return Path(execute(task, f"{QUICKSTART}/{config}.yaml", more, outputs=folder, overwrite=True).path)


def _train(config: str, folder: Path, more: dict[str, Any]) -> None:
    _stage("train", config, folder, SHORT | more)


def _generate(model: str, prompt: str) -> None:
    _command("generate", model, "--prompt", prompt, "--raw", "--max_new_tokens", "8", "--temperature", "0")


def _train_and_generate(folder: Path, more: dict[str, Any]) -> None:
    model = _stage("train", "nsa_sparse", folder, SHORT | more | {"steps": 1})
    _generate(str(model), "Once upon a time there was")


def _merge(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    inputs = f"models:\n- {{model: {SHIPPED}, weight: 0.5}}\n- {{model: {SHIPPED}, weight: 0.5}}\n"
    recipe.write_text(f"kind: merge\noperator: linear\n{inputs}")
    _command("merge", str(recipe), "--out", str(folder / "merged"))


def _search(folder: Path) -> None:
    base = _stage("train", "digits_base", folder, SHORT)
    grown = {"init_from": str(base)}
    vlm = _stage("train", "digits_vlm", folder, SHORT | grown)
    expert = _stage("train", "digits_expert_french", folder, SHORT | grown)
    names = {"vlm": str(vlm), "expert": str(expert), "base": str(base)}
    _stage("merge-search", "digits_search_french", folder, names | ONE_POINT)


def _flows_of_model(folder: Path) -> None:
    _stage("icl", "icl_analysis", folder, {"examples": 4, "seeds": [0]})


def _flow_kernel(options: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kernels_pallas.flow import Probe, flow_attention

    tokens, heads, dim = (67, 2, 24) if options["tiny"] else (1000, 16, 128)
    keys = jax.random.split(jax.random.key(0), 5)
    q, cotangent = (jax.random.normal(k, (1, tokens, heads, dim), jnp.bfloat16) for k in keys[:2])
    k, v = (jax.random.normal(x, (1, tokens, 1, dim), jnp.bfloat16) for x in keys[2:4])
    classes = jax.random.randint(keys[4], (1, tokens), -1, 3, jnp.int32)
    tap = jnp.zeros((1, 3, 3), jnp.float32)

    def sums(implementation: str) -> Any:
        def attend(tap: Any, count: Any) -> Any:
            probe = Probe(tap, count, classes=classes, implementation=implementation)
            return flow_attention(q, k, v, probe)

        return jax.jit(lambda: jax.vjp(attend, tap, tap)[1](cotangent))()

    with placed(options)():
        found = [np.asarray(x, np.float64) for x in sums("mosaic_gpu")]
    expected = [np.asarray(x, np.float64) for x in sums("xla")]
    np.testing.assert_array_equal(found[1], expected[1])
    worst = np.abs(found[0] - expected[0]).max() / np.abs(expected[0]).max()
    if not worst <= 1e-2:
        raise AssertionError(f"sums of flows differ by {worst:.1e} of the largest")
