"""Native Sparse Attention in a model that is a function of a dict of arrays, rotary positions included."""

import jax
import jax.numpy as jnp

from kernels_pallas import nsa

HEADS, KV_HEADS, DIM = 8, 2, 16
SIZES = {"block_len": 32, "stride": 16, "block_size": 64, "num_blocks": 16, "window": 512}


def attention(params: dict[str, jax.Array], x: jax.Array, positions: jax.Array) -> jax.Array:
    """One key and value for all branches, means as compression, x [B, T, D], positions [B, T]."""
    q = jnp.einsum("btd,dhk->bthk", x, params["query"])
    k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in ("key", "value"))
    tokens = nsa.shared_tokens(k, v, rotate(k, positions))
    gates = jax.nn.sigmoid(jnp.einsum("btd,dhc->bthc", x, params["gate"]))
    out, _ = nsa.attend_to_text(rotate(q, positions), tokens, gates, {}, {}, rotate=rotate, **SIZES)
    return jnp.einsum("bthk,hkd->btd", out, params["output"])


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions: halves of each head turn."""
    rates = 10000.0 ** -(jnp.arange(DIM // 2) / (DIM // 2))
    angles = positions[..., None, None].astype(jnp.float32) * rates[None, None, None]
    a, b = jnp.split(x, 2, axis=-1)
    turned = a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def main(width: int = 64, length: int = 300) -> jax.Array:
    """The gradient of a loss with respect to the queries' weights: [64, 8, 16]."""
    shapes = {"query": (width, HEADS, DIM), "output": (HEADS, DIM, width), "gate": (width, HEADS, 3)}
    shapes |= dict.fromkeys(("key", "value"), (width, KV_HEADS, DIM))
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    params = {name: 0.1 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}
    x = jax.random.normal(jax.random.key(1), (2, length, width))
    positions = jnp.broadcast_to(jnp.arange(length)[None], (2, length))
    layer = jax.checkpoint(
        attention, policy=jax.checkpoint_policies.save_only_these_names(*nsa.NSA_RESIDUALS)
    )
    return jax.jit(jax.grad(lambda p: jnp.mean(layer(p, x, positions) ** 2)))(params)["query"]


if __name__ == "__main__":
    print(main().shape)
