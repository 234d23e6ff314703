"""Attention on a mesh of devices: each runs it for its examples, its heads and its stretch of the tokens.

Matrix products are split by XLA. Attention is not left to it: a kernel is one device's, and a sequence that
is split has to be gathered on purpose. So `in_parts` runs it inside `jax.shard_map`. The mesh is the one that
the surrounding code has set (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` while it traces).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Int

Tree = Any
Core = Callable[..., tuple[Array, Array | None]]


class MeshAxes(NamedTuple):
    """Names of mesh axes; those that a mesh does not have split nothing."""

    batch: tuple[str, ...] = ()
    """Over which examples are spread."""
    heads: str | None = None
    """Over which query heads and key/value heads are split."""
    context: str | None = None
    """Over which the tokens of a sequence are split, one stretch each."""

    @property
    def names(self) -> set[str]:
        return {*self.batch, *(name for name in (self.heads, self.context) if name)}


class Part(NamedTuple):
    """One device's stretch of a split sequence, as seen inside `in_parts`."""

    parts: int
    """Stretches in all."""
    length: int
    """Tokens in each."""
    axis: str = "context"
    """Name of the mesh axis."""

    def whole(self, x: Array) -> Array:
        """[B, length, ...] of every stretch -> [B, T, ...]; its gradient goes back summed, a stretch each."""
        return jax.lax.all_gather(x, self.axis, axis=1, tiled=True)

    def own(self, x: Array) -> Array:
        """[B, T, ...] -> this stretch [B, length, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self._start(), self.length, axis=1)

    def with_neighbours(self, x: Array, before: int, after: int) -> Array:
        """The last `before` tokens of the stretch before, this stretch, and the first `after` tokens of the
        next one; zeros before the first and after the last."""
        forward = [(i, i + 1) for i in range(self.parts - 1)]
        backward = [(i + 1, i) for i in range(self.parts - 1)]
        parts = [jax.lax.ppermute(x[:, x.shape[1] - before :], self.axis, forward)] if before else []
        parts += [x, *([jax.lax.ppermute(x[:, :after], self.axis, backward)] if after else [])]
        return jnp.concatenate(parts, axis=1)

    def own_rows(self, rows: Int[Array, "B M"], stride: int, before: int) -> Int[Array, "B slots"]:
        """Of rows of the whole sequence, one for each `stride` tokens (-1: none), those of this stretch, as
        `with_neighbours` numbers them."""
        slots = self.length // stride
        missing = self.parts * slots - rows.shape[1]
        rows = jnp.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        own = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(self.axis) * slots, slots, axis=1)
        return jnp.where(own < 0, -1, own - self._start() + before)

    def positions(self, batch: int) -> Int[Array, "B T"]:
        """Row of each token in the whole sequence."""
        rows = self._start() + jnp.arange(self.length, dtype=jnp.int32)
        return jnp.broadcast_to(rows[None], (batch, self.length))

    def _start(self) -> Array:
        return jax.lax.axis_index(self.axis) * self.length


def mesh_of_axes(axes: MeshAxes) -> AbstractMesh | None:
    """The mesh that is set, if it has one of the axes and several devices, and none of its parts is ours."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = axes.names & {*mesh.axis_names}
    if not ours or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def dividing(mesh: AbstractMesh, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of `names` that the mesh has, if together they divide `size`; None: it stays whole."""
    there = tuple(name for name in names if name in mesh.axis_names)
    return there if there and size % math.prod(mesh.shape[name] for name in there) == 0 else None


def in_parts(
    core: Core,
    tokens: Tree,
    rows: Tree,
    weights: Tree,
    blocks: Tree = None,
    *,
    axes: MeshAxes,
    unit: int = 1,
    least: int = 1,
) -> tuple[Array, Array | None]:
    """`core(tokens, rows, weights, blocks, part)`, on a mesh by each device for its examples, heads, tokens.

    Args:
      tokens: arrays [B, T, heads, ...], query heads and key/value heads of any number; split along all three.
      rows: arrays [B, ...] that every device needs whole, for its examples.
      weights: arrays that every device needs whole.
      blocks: None or arrays [B, heads, T, ...], split along all three.
      axes: which mesh axes split what.
      unit, least: a device's stretch of tokens is a multiple of `unit` and no shorter than `least`.

    Returns what `core` does: an array as `tokens`, and None or an array as `blocks`. `part` is None where
    sequences are not split; without a mesh it is just called.

    Raises:
      ValueError: heads or tokens cannot be split over their mesh axis.
    """
    mesh = mesh_of_axes(axes)
    if mesh is None:
        return core(tokens, rows, weights, blocks, None)
    leaves = jax.tree.leaves(tokens)
    batch, length = leaves[0].shape[:2]
    of_axis = lambda name: mesh.shape.get(name, 1) if name else 1
    heads, context = of_axis(axes.heads), of_axis(axes.context)
    for leaf in leaves:
        if leaf.shape[2] % heads:
            raise ValueError(f"{leaf.shape[2]} heads cannot be split over {heads} devices")
    if context > 1 and (length % (context * unit) or length // context < least):
        raise ValueError(
            f"sequences of {length} tokens cannot be split over {context} devices in stretches of a multiple "
            f"of {unit} tokens and at least {least}"
        )
    examples, of_heads, of_tokens = (
        dividing(mesh, names, size)
        for names, size in (
            (axes.batch, batch),
            ((axes.heads,) if axes.heads else (), heads),
            ((axes.context,) if axes.context else (), length),
        )
    )
    by_tokens, by_blocks = (
        PartitionSpec(examples, of_tokens, of_heads),
        PartitionSpec(examples, of_heads, of_tokens),
    )
    part = Part(context, length // context, axes.context or "") if context > 1 else None
    return jax.shard_map(
        lambda *operands: core(*operands, part),
        in_specs=(by_tokens, PartitionSpec(examples), PartitionSpec(), by_blocks),
        out_specs=(by_tokens, by_blocks),
        check_vma=False,  # neither kernels nor the loops of their reference say along which axes they vary
    )(tokens, rows, weights, blocks)
