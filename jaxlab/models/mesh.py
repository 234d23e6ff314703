"""Activations and attention on a mesh of devices: which mesh axis splits what, and one device's part.

The mesh is the one that the surrounding code has set (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh`
while it traces). Without one, on a single device, and on a mesh of other axes, everything here does nothing.

Matrix products are split by XLA. Attention is not left to it: a kernel is one device's, and a sequence that
is split has to be gathered on purpose. So `in_parts` runs it inside `jax.shard_map`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Int

from jaxlab.errors import ConfigError

BATCH: tuple[str, ...] = ("data", "fsdp")
"""Mesh axes over which examples are spread."""
HEADS = "model"
"""Mesh axis over which heads and hidden units are split."""
CONTEXT = "context"
"""Mesh axis over which the tokens of a sequence are split, one stretch each."""

Tree = Any
Core = Callable[..., tuple[Array, Array | None]]


class Part(NamedTuple):
    """One device's stretch of a split sequence, as seen inside `in_parts`."""

    parts: int
    """Stretches in all."""
    length: int
    """Tokens in each."""

    def whole(self, x: Array) -> Array:
        """[B, length, ...] of every stretch -> [B, T, ...]; its gradient goes back summed, a stretch each."""
        return jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True)

    def own(self, x: Array) -> Array:
        """[B, T, ...] -> this stretch [B, length, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self._start(), self.length, axis=1)

    def with_neighbours(self, x: Array, before: int, after: int) -> Array:
        """The last `before` tokens of the stretch before, this stretch, and the first `after` tokens of the
        next one; zeros before the first and after the last."""
        forward = [(i, i + 1) for i in range(self.parts - 1)]
        backward = [(i + 1, i) for i in range(self.parts - 1)]
        parts = [jax.lax.ppermute(x[:, x.shape[1] - before :], CONTEXT, forward)] if before else []
        parts += [x, *([jax.lax.ppermute(x[:, :after], CONTEXT, backward)] if after else [])]
        return jnp.concatenate(parts, axis=1)

    def own_rows(self, rows: Int[Array, "B M"], stride: int, before: int) -> Int[Array, "B slots"]:
        """Of rows of the whole sequence, one for each `stride` tokens (-1: none), those of this stretch, as
        `with_neighbours` numbers them."""
        slots = self.length // stride
        missing = self.parts * slots - rows.shape[1]
        rows = jnp.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        own = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(CONTEXT) * slots, slots, axis=1)
        return jnp.where(own < 0, -1, own - self._start() + before)

    def positions(self, batch: int) -> Int[Array, "B T"]:
        """Row of each token in the whole sequence."""
        rows = self._start() + jnp.arange(self.length, dtype=jnp.int32)
        return jnp.broadcast_to(rows[None], (batch, self.length))

    def _start(self) -> Array:
        return jax.lax.axis_index(CONTEXT) * self.length


def _mesh() -> AbstractMesh | None:
    """The mesh that is set, if it is one of ours and of several devices, and we are not within its parts."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = {*BATCH, HEADS, CONTEXT} & {*mesh.axis_names}
    if not ours or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def on_several_devices() -> bool:
    """Whether the mesh that is set splits anything here."""
    return _mesh() is not None


def _axis(mesh: AbstractMesh, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of `names` that the mesh has, if together they divide `size`; None: it stays whole."""
    there = tuple(name for name in names if name in mesh.axis_names)
    return there if there and size % math.prod(mesh.shape[name] for name in there) == 0 else None


def split_tokens(x: Array) -> Array:
    """Activations [B, T, ...] laid out as the mesh has it: examples over devices, tokens over `context`.

    Said to XLA where layers begin, as it would otherwise spread them as the weights are spread.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    spec = PartitionSpec(_axis(mesh, BATCH, x.shape[0]), _axis(mesh, (CONTEXT,), x.shape[1]))
    return jax.lax.with_sharding_constraint(x, spec)


def split_heads(x: Array, *, batch: int, heads: int) -> Array:
    """An array laid out as the mesh has it along the axes that count examples and heads, such as a cache."""
    mesh = _mesh()
    if mesh is None:
        return x
    spec: list[tuple[str, ...] | None] = [None] * x.ndim
    spec[batch] = _axis(mesh, BATCH, x.shape[batch])
    spec[heads] = _axis(mesh, (HEADS,), x.shape[heads])
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


def in_parts(
    core: Core, tokens: Tree, rows: Tree, weights: Tree, blocks: Tree = None, *, unit: int = 1, least: int = 1
) -> tuple[Array, Array | None]:
    """`core(tokens, rows, weights, blocks, part)`, on a mesh by each device for its examples, heads, tokens.

    Args:
      tokens: arrays [B, T, heads, ...], query heads and key/value heads of any number; split along all three.
      rows: arrays [B, ...] that every device needs whole, for its examples.
      weights: arrays that every device needs whole.
      blocks: None or arrays [B, heads, T, ...], split along all three.
      unit, least: a device's stretch of tokens is a multiple of `unit` and no shorter than `least`.

    Returns what `core` does: an array as `tokens`, and None or an array as `blocks`. `part` is None where
    sequences are not split; without a mesh it is just called.

    Raises:
      ConfigError: heads or tokens cannot be split over their mesh axis.
    """
    mesh = _mesh()
    if mesh is None:
        return core(tokens, rows, weights, blocks, None)
    leaves = jax.tree.leaves(tokens)
    batch, length = leaves[0].shape[:2]
    heads, context = mesh.shape.get(HEADS, 1), mesh.shape.get(CONTEXT, 1)
    for leaf in leaves:
        if leaf.shape[2] % heads:
            raise ConfigError(
                f"{leaf.shape[2]} heads cannot be split over {heads} devices; lower mesh.model to a divisor",
                key="mesh.model",
            )
    check_length(length, context, unit=unit, least=least)
    examples, of_heads, of_tokens = (
        _axis(mesh, names, size) for names, size in ((BATCH, batch), ((HEADS,), heads), ((CONTEXT,), length))
    )
    by_tokens, by_blocks = (
        PartitionSpec(examples, of_tokens, of_heads),
        PartitionSpec(examples, of_heads, of_tokens),
    )
    part = Part(context, length // context) if context > 1 else None
    return jax.shard_map(
        lambda *operands: core(*operands, part),
        in_specs=(by_tokens, PartitionSpec(examples), PartitionSpec(), by_blocks),
        out_specs=(by_tokens, by_blocks),
        check_vma=False,  # neither kernels nor the loops of their reference say along which axes they vary
    )(tokens, rows, weights, blocks)
