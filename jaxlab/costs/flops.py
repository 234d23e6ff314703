"""Floating-point operations of a model's training step, and what the devices could do."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlab.models import H2O, ExactTokens, ModelConfig, abstract_params, count_params

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name (vendor data sheets)."""


def attended_tokens(config: ModelConfig, length: int) -> float:
    """Keys that a query reads, averaged over the positions of a sequence and the layers.

    For NSA the sum over its branches, compressed keys included, with as many selection blocks as it may
    choose, the query's own among them; with sparsity at inference those that it lets through.
    """
    within = lambda w: sum(min(t + 1, w) for t in range(length)) / length
    before = lambda t, c: min(t // c.block_size, c.num_blocks - 1) * c.block_size
    of_blocks = lambda c: sum(before(t, c) + t % c.block_size + 1 for t in range(length)) / length
    if isinstance(config.sparsity, ExactTokens | H2O):
        return within(config.sparsity.budget)
    if config.sparsity is not None:
        return of_blocks(config.sparsity)
    if config.attention.kind != "nsa":
        sliding = config.kinds.count("sliding") / config.num_layers
        return sliding * within(config.sliding.window if sliding else 0) + (1 - sliding) * within(length)
    n = config.nsa
    compressed = sum(max(0, (t + 1 - n.block_len) // n.stride + 1) for t in range(length)) / length
    read = {"compression": compressed, "selection": of_blocks(n), "window": within(n.window)}
    return sum(read[branch] for branch in n.branches)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """6 for each parameter of the layers and the head, and for each attended key and channel: forward 2,
    backward 4. The head counts tied or not, the embedding's lookup does not. NSA's compression is applied to
    every block and key/value head, not to every token. Of the routed experts those that a token passes
    through count. An indexer's scores count, the attention that teaches it does not. Vision is not counted.
    """
    params = abstract_params(config.language)
    layers = params["layers"]
    matmul = float(count_params(layers) + config.vocab_size * config.width)
    if config.dense_layers:
        matmul += count_params(params["dense_layers"])
    if config.attention.kind == "nsa":
        phi = (
            layers["attention"].get(f"compress_{name}", {}) for name in ("key", "value")
        )  # a mean has none
        compression = sum(map(count_params, phi))
        applied = config.kv_heads / config.nsa.stride if "compression" in config.nsa.branches else 0.0
        matmul += compression * (applied - 1.0)
    if config.moe is not None:
        routed = sum(layers["moe"][name].size for name in ("gate", "up", "down"))
        matmul -= routed * (1.0 - config.moe.experts_per_token / config.moe.num_experts)
    attention = config.num_layers * config.num_heads * (config.key_dim + config.value_dim)
    scored = 0.0
    if config.attention.kind == "nsa" and config.nsa.selector == "indexer":
        channels = config.kv_heads * config.nsa.selector_heads * config.nsa.selector_dim
        scored = config.num_layers * channels * (length + 1) / 2
    return 6.0 * (matmul + attention * attended_tokens(config, length) + scored)


def peak_flops(devices: Sequence[jax.Device]) -> tuple[float, str]:
    """FLOP/s of `devices` together, and where the figure is from.

    A device that is not in the table is measured with a float32 matmul of side 1024, best of twenty: other
    programs take a part of some.
    """
    kind = devices[0].device_kind
    for name, flops in PEAK_FLOPS.items():
        if name in kind:
            return flops * len(devices), f"data sheet of {name}, bf16"
    side = 1024
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
    matmul = jax.jit(lambda a: a @ a)
    matmul(x).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Host devices share the same cores, so the count of devices does not multiply what was measured.
    count = 1 if devices[0].platform == "cpu" else len(devices)
    return count * 2 * side**3 / min(seconds), f"measured float32 matmul of side {side} on {kind}"
