"""Activations and attention on a mesh of devices: which mesh axis splits what, and one device's part.

The mesh is the one that the surrounding code has set (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh`
while it traces). Without one, on a single device, and on a mesh of other axes, everything here does nothing.

Matrix products are split by XLA. Attention is not left to it: `in_parts` runs it inside `jax.shard_map`
(kernels_pallas/sharding.py).
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

from jaxlab.errors import ConfigError
from kernels_pallas import sharding
from kernels_pallas.sharding import Core, MeshAxes, Part, Tree, dividing, mesh_of_axes, splits

BATCH: tuple[str, ...] = ("data", "fsdp", "expert")
"""Mesh axes over which examples are spread."""
WIDTH = "fsdp"
"""Mesh axis over which parameters are split along the width."""
EXPERTS = "expert"
"""Mesh axis over which routed experts are split; all else on its devices is as on those of `data`."""
HEADS = "model"
"""Mesh axis over which heads and hidden units are split."""
CONTEXT = "context"
"""Mesh axis over which the tokens of a sequence are split."""

__all__ = [
    "AXES",
    "BATCH",
    "CONTEXT",
    "EXPERTS",
    "HEADS",
    "WIDTH",
    "Part",
    "check_length",
    "check_parts",
    "current_mesh",
    "in_parts",
    "on_several_devices",
    "reorder",
    "split_heads",
    "split_tokens",
    "split_words",
    "stretches_of",
    "take_words",
    "vocabulary_is_split",
]
AXES = MeshAxes(BATCH, HEADS, CONTEXT)


def current_mesh() -> AbstractMesh | None:
    """The mesh that is set; None: it splits nothing here."""
    return mesh_of_axes(AXES)


def on_several_devices() -> bool:
    """Whether the mesh that is set splits anything here."""
    return current_mesh() is not None


def split_tokens(x: Array) -> Array:
    """Activations [B, T, ...] laid out as the mesh has it: examples over devices, tokens over `context`.

    Said to XLA where layers begin, as it would otherwise spread them as the weights are spread.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = PartitionSpec(dividing(mesh, BATCH, x.shape[0]), dividing(mesh, (CONTEXT,), x.shape[1]))
    return jax.lax.with_sharding_constraint(x, spec)


def vocabulary_is_split(words: int) -> bool:
    """Whether the mesh that is set splits a vocabulary of so many words over `model`."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape.get(HEADS, 1) > 1 and words % mesh.shape[HEADS] == 0


def split_words(logits: Array) -> Array:
    """Logits [B, T, V] laid out as the mesh has tokens and the vocabulary."""
    mesh = current_mesh()
    if mesh is None or not vocabulary_is_split(logits.shape[2]):
        return logits
    batch, length = dividing(mesh, BATCH, logits.shape[0]), dividing(mesh, (CONTEXT,), logits.shape[1])
    return jax.lax.with_sharding_constraint(logits, PartitionSpec(batch, length, HEADS))


def take_words(table: Array, tokens: Array) -> Array:
    """table[tokens] of tokens [B, T], the table [V, D] as its parameter lies on the mesh that is set.

    Left to it, XLA may gather all tokens' rows. Here each device looks up the part of the width that it has
    for the tokens of all devices of `fsdp`, and they exchange these; of words that are split over `model` it
    gives those that it has, and the sum goes to all.
    """
    mesh = current_mesh()
    assert mesh is not None
    examples, stretch = dividing(mesh, BATCH, tokens.shape[0]), dividing(mesh, (CONTEXT,), tokens.shape[1])
    by_words = HEADS if vocabulary_is_split(table.shape[0]) else None
    by_width = WIDTH if mesh.shape.get(WIDTH, 1) > 1 and table.shape[1] % mesh.shape[WIDTH] == 0 else None
    theirs = by_width is not None and WIDTH in (examples or ())

    def take(table: Array, tokens: Array) -> Array:
        if theirs:
            tokens = jax.lax.all_gather(tokens, WIDTH, axis=0, tiled=True)
        if by_words is None:
            rows = table[tokens]
        else:
            row = tokens - jax.lax.axis_index(HEADS) * table.shape[0]
            here = (row >= 0) & (row < table.shape[0])
            rows = jax.lax.psum(jnp.where(here[..., None], table[jnp.where(here, row, 0)], 0), HEADS)
        if theirs:
            return jax.lax.all_to_all(rows, WIDTH, split_axis=0, concat_axis=2, tiled=True)
        return rows if by_width is None else jax.lax.all_gather(rows, WIDTH, axis=2, tiled=True)

    of_tokens = PartitionSpec(examples, stretch)
    specs = (PartitionSpec(by_words, by_width), of_tokens)
    return jax.shard_map(take, in_specs=specs, out_specs=of_tokens, check_vma=False)(table, tokens)


def split_heads(x: Array, *, batch: int, heads: int) -> Array:
    """An array laid out as the mesh has it along the axes that count examples and heads, such as a cache."""
    mesh = current_mesh()
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


def stretches_of(length: int, *, unit: int = 1, least: int = 1) -> int:
    """How many stretches of `length` tokens each device of the mesh that is set has: two, in a zigzag that
    gives all devices the same work in attention, where they are whole units and not too short; else one."""
    mesh = current_mesh()
    devices = 1 if mesh is None else mesh.shape.get(CONTEXT, 1)
    return 2 if devices > 1 and splits(length, devices, unit=unit, least=least, stretches=2) else 1


def reorder(x: Array, *, back: bool = False) -> Array:
    """Tokens [B, T, ...] from their order to that of the zigzag on the mesh that is set, or back."""
    mesh = current_mesh()
    assert mesh is not None
    spec = PartitionSpec(dividing(mesh, BATCH, x.shape[0]), CONTEXT)
    turn = lambda x: sharding.zigzag(x, CONTEXT, mesh.shape[CONTEXT], back=back)
    return jax.shard_map(turn, in_specs=spec, out_specs=spec, check_vma=False)(x)


def check_parts(tokens: Tree, *, unit: int = 1, least: int = 1) -> None:
    """Whether arrays [B, T, heads, ...] can be split over the mesh that is set.

    Raises:
      ConfigError: heads or tokens cannot be split over their mesh axis.
    """
    mesh = current_mesh()
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
    core: Core,
    tokens: Tree,
    rows: Tree,
    weights: Tree,
    blocks: Tree = None,
    *,
    unit: int = 1,
    least: int = 1,
    stretches: int = 1,
) -> tuple[Array, Array | None]:
    """`kernels_pallas.sharding.in_parts` on the axes of this project's meshes.

    Raises:
      ConfigError: heads or tokens cannot be split over their mesh axis.
    """
    check_parts(tokens, unit=unit, least=least)
    return sharding.in_parts(
        core, tokens, rows, weights, blocks, axes=AXES, unit=unit, least=least, stretches=stretches
    )
