"""Counting: floating-point operations of a model, and what the device could do."""

import time

import jax
import jax.numpy as jnp

from jaxlab.models import ModelConfig, abstract_params, count_params

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name (vendor data sheets)."""


def attended_tokens(config: ModelConfig, length: int) -> float:
    """Keys that a query reads, averaged over the positions of a sequence; for NSA the sum over its branches."""
    dense = (length + 1) / 2
    within = lambda w: sum(min(t + 1, w) for t in range(length)) / length  # noqa: E731
    if config.attention == "full":
        return dense
    if config.attention == "sliding":
        return within(config.window)
    n = config.nsa
    visible = lambda t: max(0, (t + 1 - n.block_len) // n.stride + 1)  # noqa: E731
    compressed = sum(visible(t) for t in range(length)) / length
    selected = sum(min((t // n.block_size) * n.block_size, (n.num_blocks - 1) * n.block_size) + t % n.block_size + 1
                   for t in range(length)) / length  # fmt: skip
    return compressed + selected + within(n.window)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """6 per matmul parameter and 6 per attended key and channel (forward 2, backward 4); gathers are not counted.

    The embedding lookup costs nothing, the head costs its matmul, tied or not.
    """
    params = abstract_params(config.language)
    matmul = count_params(params["layers"]) + config.vocab_size * config.width
    attention = config.num_layers * config.num_heads * (config.key_dim + config.value_dim)
    return 6.0 * (matmul + attention * attended_tokens(config, length))


def peak_flops() -> tuple[float, str]:
    """FLOP/s of all devices together, and where the figure is from.

    A device that is not in the table is measured with a float32 matmul of side 1024, best of five.
    """
    device = jax.devices()[0]
    for name, flops in PEAK_FLOPS.items():
        if name in device.device_kind:
            return flops * jax.device_count(), f"data sheet of {name}, bf16"
    side = 1024
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
    matmul = jax.jit(lambda a: a @ a)
    matmul(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Host devices share the same cores, so the count of devices does not multiply what was measured.
    devices = 1 if device.platform == "cpu" else jax.device_count()
    return devices * 2 * side**3 / min(
        seconds
    ), f"measured float32 matmul of side {side} on {device.device_kind}"
