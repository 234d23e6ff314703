"""Decode steps of one layer's attention, Native Sparse Attention beside dense, in one timed program. Needs
jax alone."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa import (
    Implementation,
    NewTokens,
    NsaCache,
    Traffic,
    append_tokens,
    bytes_per_decoded_token,
    cached_attention,
    init_cache,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the measurement; the defaults are the paper's blocks with 16 heads in one group."""

    implementations: tuple[Implementation, ...] = ("xla",)
    """Of NSA."""
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)
    """Tokens in the cache before the first step."""
    batches: tuple[int, ...] = (1,)
    """Sequences decoded at once."""
    steps: int = 16
    """Tokens decoded by one call."""
    heads: int = 16
    kv_heads: int = 1
    key_dim: int = 192
    value_dim: int = 128
    block_len: int = 32
    stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    window: int = 512
    dtype: str = "float32"
    repeats: int = 3
    """Timed calls, after one that is not; the best counts."""


def draw(key: jax.Array, like: Any) -> Any:
    """Normal numbers in place of every floating leaf."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


Step = Callable[..., tuple[Any, jax.Array]]
"""(cache, q, k, v, gates) -> cache, output"""


def nsa(implementation: Implementation, a: Sizes, batch: int, length: int) -> tuple[Step, Any]:
    """One step, and the cache that it carries; all sequences hold the same."""
    blocks = {"block_len": a.block_len, "stride": a.stride}
    cache = init_cache(
        1,
        length + a.steps,
        kv_heads=a.kv_heads,
        key_dim=a.key_dim,
        value_dim=a.value_dim,
        dtype=jnp.dtype(a.dtype),
        block_size=a.block_size,
        window=a.window,
        **blocks,
    )
    cache = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), draw(jax.random.key(1), cache))
    cache = cache._replace(length=jnp.full((batch,), length, jnp.int32))

    def compress(k, v, starts):
        return k.mean(axis=1, keepdims=True), v.mean(axis=1, keepdims=True)

    def step(cache, q, k, v, gates):
        cache, recent = append_tokens(cache, NewTokens(k, v, k, v, k, v), compress, **blocks)
        out, _ = cached_attention(
            cache,
            recent,
            q,
            gates,
            block_size=a.block_size,
            num_blocks=a.num_blocks,
            window=a.window,
            implementation=implementation,
            **blocks,
        )
        return cache, out

    return step, cache


def dense(cudnn: bool, a: Sizes, batch: int, length: int) -> tuple[Step, Any]:
    """As many heads and the same dimensions over all tokens; for cuDNN values are padded to the keys' dim."""
    rows = length + a.steps
    dims = (a.key_dim, a.key_dim if cudnn else a.value_dim)
    drawn = draw(jax.random.key(1), [jnp.zeros((1, rows, a.kv_heads, d), jnp.dtype(a.dtype)) for d in dims])
    cache = (*(jnp.repeat(x, batch, axis=0) for x in drawn), jnp.asarray(length, jnp.int32))

    def step(cache, q, k, v, gates):
        keys, values, at = cache
        v = jnp.pad(v, ((0, 0),) * 3 + ((0, dims[1] - v.shape[3]),))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, at, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, at, axis=1)
        if cudnn:
            held = jnp.full((batch,), at + 1, jnp.int32)
            out = jax.nn.dot_product_attention(
                q, keys, values, key_value_seq_lengths=held, implementation="cudnn"
            )
            return (keys, values, at + 1), out[..., : a.value_dim]
        q = q.reshape(batch, a.kv_heads, a.heads // a.kv_heads, a.key_dim)
        scores = jnp.einsum("bhgd,bshd->bhgs", q, keys, preferred_element_type=jnp.float32)
        seen = jnp.arange(rows, dtype=jnp.int32) <= at
        weights = jax.nn.softmax(jnp.where(seen, scores * a.key_dim**-0.5, -jnp.inf), axis=-1)
        out = jnp.einsum("bhgs,bshd->bhgd", weights.astype(values.dtype), values)
        return (keys, values, at + 1), out.reshape(batch, 1, a.heads, a.value_dim)

    return step, cache


Make = Callable[[Sizes, int, int], tuple[Step, Any]]


def peers(a: Sizes) -> dict[str, Make]:
    """Name -> what makes the step and the cache."""
    found: dict[str, Make] = {f"nsa {name}": functools.partial(nsa, name) for name in a.implementations}
    found["dense"] = functools.partial(dense, False)
    if jax.default_backend() == "gpu":
        found["dense cuDNN"] = functools.partial(dense, True)
    return found


class Built(NamedTuple):
    """Compiled steps of one peer."""

    loop: Callable[..., Any]
    """(cache, inputs) -> cache, sum of the outputs, after `steps` tokens; the cache is donated."""
    step: Step
    """One of them."""
    cache: Callable[[], Any]
    """Makes it."""
    inputs: Callable[[], list[jax.Array]]


def build(a: Sizes, make: Make, batch: int, length: int) -> Built:
    """Nothing is allocated yet."""
    steps: list[Step] = []

    def made() -> Any:
        step, cache = make(a, batch, length)
        steps.append(step)
        return cache

    shapes = [(a.heads, a.key_dim), (a.kv_heads, a.key_dim), (a.kv_heads, a.value_dim), (a.heads, 3)]
    like = [jax.ShapeDtypeStruct((batch, 1, *shape), jnp.dtype(a.dtype)) for shape in shapes]
    cache = jax.eval_shape(made)
    step = steps[0]

    def loop(cache, inputs):
        def one(_, carry):
            cache, inputs, total = carry
            cache, out = step(cache, *inputs)
            # A step's query depends on the step before, as in a model.
            q = inputs[0] + 1e-3 * jnp.mean(out).astype(inputs[0].dtype)
            return cache, [q, *inputs[1:]], total + jnp.sum(out.astype(jnp.float32))

        cache, _, total = jax.lax.fori_loop(0, a.steps, one, (cache, inputs, jnp.float32(0)))
        return cache, total

    compiled = jax.jit(loop, donate_argnums=0).lower(cache, like).compile()
    one_step = jax.jit(step).lower(cache, *like).compile()
    inputs = lambda: draw(jax.random.key(2), [jnp.zeros(x.shape, x.dtype) for x in like])
    return Built(compiled, one_step, made, inputs)


def measure(a: Sizes, built: Built, batch: int, length: int) -> dict[str, Any]:
    """Seconds for one decoded token of every sequence, and the output of one step."""
    cache, inputs = built.cache(), built.inputs()

    # Every call starts at `length` again: what was donated is the buffers, not the count.
    def reset(cache):
        at = jnp.full((batch,), length, jnp.int32)
        return cache._replace(length=at) if isinstance(cache, NsaCache) else (*cache[:2], at[0])

    cache, total = jax.block_until_ready(built.loop(cache, inputs))
    wall, processor = [], []
    for _ in range(a.repeats):
        cache = jax.block_until_ready(reset(cache))
        start, used = time.perf_counter(), time.process_time()
        cache, total = jax.block_until_ready(built.loop(cache, inputs))
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    if not jnp.isfinite(total):
        raise FloatingPointError(f"the outputs at {length} tokens sum up to {total}")
    times = {"wall_s": min(wall) / a.steps, "processor_s": min(processor) / a.steps}
    return times | {"output": np.asarray(built.step(reset(cache), *inputs)[1], np.float32)}


def traffic_of(a: Sizes, length: int) -> Traffic:
    """Tokens and bytes that one decoded token reads, by the paper's count."""
    return bytes_per_decoded_token(
        length,
        kv_heads=a.kv_heads,
        key_dim=a.key_dim,
        value_dim=a.value_dim,
        itemsize=jnp.dtype(a.dtype).itemsize,
        stride=a.stride,
        block_size=a.block_size,
        num_blocks=a.num_blocks,
        window=a.window,
    )


def rows(a: Sizes) -> list[dict[str, Any]]:
    """One for every length, batch and peer."""
    return [row for length in a.lengths for batch in a.batches for row in rows_at(a, length, batch)]


def rows_at(a: Sizes, length: int, batch: int) -> list[dict[str, Any]]:
    """One for every peer."""
    found: list[dict[str, Any]] = []
    traffic = traffic_of(a, length)
    outputs: dict[str, np.ndarray] = {}
    for name, make in peers(a).items():
        kind = name.partition(" ")[0]
        row: dict[str, Any] = {"name": name, "length": length, "batch": batch}
        row |= {what: getattr(traffic, f"{kind}_{what}") for what in ("tokens", "bytes")}
        try:
            row |= measure(a, build(a, make, batch, length), batch, length)
        except Exception as error:  # any reason why a peer does not run belongs into its row
            found.append({**row, "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})
            continue
        output = row.pop("output")
        # Of a step; where scores are nearly equal bfloat16 may choose another block.
        row["differs_from_first_of_kind"] = relative_error(output, outputs.setdefault(kind, output))
        found.append(row)
    return found


def relative_error(x: np.ndarray, reference: np.ndarray) -> float:
    """RMS of the difference over RMS of the reference."""
    return float(np.sqrt(np.mean((x - reference) ** 2) / np.mean(reference**2)))
