"""Activations and attention on a mesh of devices: which mesh axis splits what, and one device's part.

The mesh is the one that the surrounding code has set (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh`
while it traces). Without one, on a single device, and on a mesh of other axes, everything here does nothing.

Matrix products are split by XLA. Attention is not left to it: `in_parts` runs it inside `jax.shard_map`
(kernels_pallas/sharding.py).
"""

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

from jaxlab.errors import ConfigError
from kernels_pallas import sharding
from kernels_pallas.sharding import Core, MeshAxes, Part, Tree, dividing, mesh_of_axes

BATCH: tuple[str, ...] = ("data", "fsdp")
"""Mesh axes over which examples are spread."""
HEADS = "model"
"""Mesh axis over which heads and hidden units are split."""
CONTEXT = "context"
"""Mesh axis over which the tokens of a sequence are split, one stretch each."""

__all__ = [
    "BATCH",
    "CONTEXT",
    "HEADS",
    "Part",
    "check_length",
    "in_parts",
    "on_several_devices",
    "split_heads",
    "split_tokens",
]
AXES = MeshAxes(BATCH, HEADS, CONTEXT)


def _mesh() -> AbstractMesh | None:
    return mesh_of_axes(AXES)


def on_several_devices() -> bool:
    """Whether the mesh that is set splits anything here."""
    return _mesh() is not None


def split_tokens(x: Array) -> Array:
    """Activations [B, T, ...] laid out as the mesh has it: examples over devices, tokens over `context`.

    Said to XLA where layers begin, as it would otherwise spread them as the weights are spread.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    spec = PartitionSpec(dividing(mesh, BATCH, x.shape[0]), dividing(mesh, (CONTEXT,), x.shape[1]))
    return jax.lax.with_sharding_constraint(x, spec)


def split_heads(x: Array, *, batch: int, heads: int) -> Array:
    """An array laid out as the mesh has it along the axes that count examples and heads, such as a cache."""
    mesh = _mesh()
    if mesh is None:
        return x
    spec: list[tuple[str, ...] | None] = [None] * x.ndim
    spec[batch] = dividing(mesh, BATCH, x.shape[batch])
    spec[heads] = dividing(mesh, (HEADS,), x.shape[heads])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def check_length(length: int, devices: int, *, unit: int = 1, least: int = 1) -> None:
    """Whether `length` tokens can be split over `devices` in stretches of whole units, `least` tokens each.

    Raises:
      ConfigError: they cannot.
    """
    if devices > 1 and (length % (devices * unit) or length // devices < least):
        most = f" and at least {devices * least}" if least > unit else ""
        raise ConfigError(
            f"sequences of {length} tokens cannot be split over {devices} devices; make their length a "
            f"multiple of {devices * unit}{most}, or lower mesh.context",
            key="mesh.context",
        )


def check_parts(tokens: Tree, *, unit: int = 1, least: int = 1) -> None:
    """Whether arrays [B, T, heads, ...] can be split over the mesh that is set.

    Raises:
      ConfigError: heads or tokens cannot be split over their mesh axis.
    """
    mesh = _mesh()
    if mesh is None:
        return
    heads = mesh.shape.get(HEADS, 1)
    for leaf in jax.tree.leaves(tokens):
        if leaf.shape[2] % heads:
            raise ConfigError(
                f"{leaf.shape[2]} heads cannot be split over {heads} devices; lower mesh.model to a divisor",
                key="mesh.model",
            )
    length = jax.tree.leaves(tokens)[0].shape[1]
    check_length(length, mesh.shape.get(CONTEXT, 1), unit=unit, least=least)


def in_parts(
    core: Core, tokens: Tree, rows: Tree, weights: Tree, blocks: Tree = None, *, unit: int = 1, least: int = 1
) -> tuple[Array, Array | None]:
    """`kernels_pallas.sharding.in_parts` on the axes of this project's meshes.

    Raises:
      ConfigError: heads or tokens cannot be split over their mesh axis.
    """
    check_parts(tokens, unit=unit, least=least)
    return sharding.in_parts(core, tokens, rows, weights, blocks, axes=AXES, unit=unit, least=least)
