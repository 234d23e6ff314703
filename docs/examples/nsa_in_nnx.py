"""Native Sparse Attention as one layer of a foreign flax NNX model, on a mesh or on one device."""

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import nsa
from kernels_pallas.sharding import MeshAxes

SIZES = {"block_len": 32, "stride": 16, "block_size": 64, "num_blocks": 16, "window": 512}
AXES = MeshAxes(batch=("data",), heads="model", context="context")


class SparseAttention(nnx.Module):
    """Keys and values of its own for each branch, an MLP for each that compresses, gates."""

    def __init__(self, width: int, heads: int, kv_heads: int, dim: int, rngs: nnx.Rngs):
        self.dim = dim
        self.query = nnx.LinearGeneral(width, (heads, dim), use_bias=False, rngs=rngs)
        self.key_value = nnx.LinearGeneral(width, (6, kv_heads, dim), use_bias=False, rngs=rngs)
        self.gate = nnx.LinearGeneral(width, (heads, 3), rngs=rngs)
        self.output = nnx.LinearGeneral((heads, dim), width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.phi_k, self.phi_v = nnx.Dict(phi(dim, rngs)), nnx.Dict(phi(dim, rngs))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        tokens = nsa.NewTokens(*jnp.moveaxis(self.key_value(x), 2, 0))
        phis = [{name: p[...] for name, p in each.items()} for each in (self.phi_k, self.phi_v)]
        gates = jax.nn.sigmoid(self.gate(x))
        out, _ = nsa.attend_to_text(
            self.query(x), tokens, gates, *phis, segment_ids=segment_ids, axes=AXES, **SIZES
        )
        return self.output(out)


def phi(dim: int, rngs: nnx.Rngs, width: int = 64) -> dict[str, nnx.Param]:
    """Parameters of the MLP that makes one key of a block's."""
    length = SIZES["block_len"]
    shapes = {"position": (length, dim), "hidden": (length, dim, width), "output": (width, dim)}
    drawn = {name: 0.02 * jax.random.normal(rngs.params(), shape) for name, shape in shapes.items()}
    drawn |= {"hidden_bias": jnp.zeros(width), "output_bias": jnp.zeros(dim)}
    return {name: nnx.Param(x) for name, x in drawn.items()}


def main(length: int = 300) -> jax.Array:
    """The output of a layer that has just been made: [2, length, 64]."""
    layer = SparseAttention(width=64, heads=8, kv_heads=2, dim=16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, length, 64))
    return nnx.jit(layer)(x)


if __name__ == "__main__":
    print(main().shape)
