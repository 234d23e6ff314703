"""How much memory something takes on each device, before any of it is taken."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.models import ModelConfig, Params, decode_step, init_cache, prefill


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device; all devices hold equally much."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compiled_memory(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """`planned_memory` of a jitted `function` of abstract arguments."""
    return planned_memory(function.lower(*arguments).compile())  # type: ignore[attr-defined]


def planned_memory(compiled: Any) -> dict[str, int]:
    """What the compiler plans for a program, in bytes on one device.

    "temporary" holds activations and gradients; "total" is all at once, donated arguments counted once.
    """
    stats = compiled.memory_analysis()
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {"temporary": stats.temp_size_in_bytes, "total": kept + stats.temp_size_in_bytes}


def generation_memory(
    params: Params, config: ModelConfig, batch_size: int, prompt: int, new_tokens: int
) -> dict[str, int]:
    """Bytes on one device of generating from prompts of so many tokens, from compiling it alone.

    Args:
      params: shapes, dtypes and shardings; those of a mesh under `jaxlab.models.using(mesh)`.
      prompt: tokens that are read at once.

    Returns:
      "parameters", "cache", "temporary" (the largest of reading a prompt and of a step), and "total".
    """
    sizes = (config, batch_size, prompt + new_tokens)
    empty = jax.jit(init_cache, static_argnums=(0, 1, 2)).lower(*sizes).compile()
    cache = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(lambda: init_cache(*sizes)),
        empty.output_shardings,
    )
    tokens = lambda length: {"tokens": jax.ShapeDtypeStruct((batch_size, length), jnp.int32)}
    logits = jax.ShapeDtypeStruct((batch_size, config.vocab_size), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    reading = compiled_memory(prefill, params, tokens(prompt), cache, logits, config)
    step = compiled_memory(decode_step, params, tokens(1), cache, key, {}, None, config)
    held = {"parameters": bytes_per_device(params), "cache": bytes_per_device(cache)}
    return {
        **held,
        "temporary": max(reading["temporary"], step["temporary"]),
        "total": max(reading["total"], step["total"]),
    }
