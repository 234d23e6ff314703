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
    """One device's tokens of a split sequence, as seen inside `in_parts`: one stretch of it, or two.

    With two, device i of n has stretches i and 2 n - 1 - i of 2 n (a zigzag), so that together no device's
    queries see more than another's.
    """

    parts: int
    """Devices that split it."""
    length: int
    """Tokens of each."""
    axis: str = "context"
    """Name of the mesh axis."""
    stretches: int = 1
    """Stretches of each, 1 or 2."""

    @property
    def stretch(self) -> int:
        """Tokens of a stretch."""
        return self.length // self.stretches

    def whole(self, x: Array) -> Array:
        """[B, length, ...] of every device -> [B, T, ...] in order; its gradient goes back summed, to each
        device its own."""
        gathered = jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        if self.stretches == 1:
            return gathered
        size = x.shape[1] // 2
        pairs = gathered.reshape(x.shape[0], self.parts, 2, size, *x.shape[2:])
        halves = jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1)
        return halves.reshape(gathered.shape)

    def own(self, x: Array) -> Array:
        """[B, T, ...] -> this device's [B, length, ...]."""
        pieces = [
            jax.lax.dynamic_slice_in_dim(x, self._start(i), self.stretch, axis=1)
            for i in range(self.stretches)
        ]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)

    def apart(self, x: Array) -> Array:
        """[B, length, ...] -> each stretch by itself, [B stretches, stretch, ...]."""
        return x.reshape(x.shape[0] * self.stretches, -1, *x.shape[2:])

    def joined(self, x: Array) -> Array:
        """[B stretches, size, ...] -> [B, stretches size, ...]."""
        return x.reshape(x.shape[0] // self.stretches, -1, *x.shape[2:])

    def with_neighbours(self, x: Array, before: int, after: int) -> Array:
        """The last `before` tokens before each stretch, the stretch, and the first `after` tokens of the next
        one, [B stretches, ...]; zeros before the first and after the last.

        What other devices hold of them is fetched from these alone.
        """
        size = self.stretch
        own = [x[:, i * size : (i + 1) * size] for i in range(self.stretches)]
        columns = []
        for distance in range(-(-before // size), 0, -1):
            taken = min(size, before - (distance - 1) * size)
            columns.append(self._shifted([y[:, size - taken :] for y in own], -distance))
        columns.append(own)
        if after:
            columns.append(self._shifted([y[:, :after] for y in own], 1))
        rows = [jnp.concatenate(pieces, axis=1) for pieces in zip(*columns, strict=True)]
        return self.apart(jnp.concatenate(rows, axis=1)) if len(rows) > 1 else rows[0]

    def rows_with_neighbours(self, x: Int[Array, "B T"], before: int) -> Int[Array, "rows seen"]:
        """Of numbers of all tokens those of each stretch and of the `before` tokens before it; 0 before the
        first."""
        padded = jnp.pad(x, ((0, 0), (before, 0)))
        pieces = [
            jax.lax.dynamic_slice_in_dim(padded, self._start(i), before + self.stretch, axis=1)
            for i in range(self.stretches)
        ]
        return self.apart(jnp.concatenate(pieces, axis=1))

    def own_rows(self, rows: Int[Array, "B M"], stride: int, before: int) -> Int[Array, "rows slots"]:
        """Of rows of the whole sequence, one for each `stride` tokens (-1: none), those of each stretch, as
        `with_neighbours` numbers them."""
        slots = self.stretch // stride
        missing = self.parts * self.stretches * slots - rows.shape[1]
        rows = jnp.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        found = []
        for i in range(self.stretches):
            start = self._start(i)
            own = jax.lax.dynamic_slice_in_dim(rows, start // stride, slots, axis=1)
            found.append(jnp.where(own < 0, -1, own - start + before))
        return self.apart(jnp.concatenate(found, axis=1))

    def positions(self, batch: int) -> Int[Array, "B T"]:
        """Row of each token in the whole sequence."""
        within = jnp.arange(self.stretch, dtype=jnp.int32)
        rows = jnp.concatenate([self._start(i) + within for i in range(self.stretches)])
        return jnp.broadcast_to(rows[None], (batch, self.length))

    def _start(self, own: int = 0) -> Array:
        """Row of the first token of one of this device's stretches."""
        here = jax.lax.axis_index(self.axis)
        return (here if own == 0 else 2 * self.parts - 1 - here) * self.stretch

    def _shifted(self, own: list[Array], by: int) -> list[Array]:
        """For each stretch of this device what the one `by` further on holds in the place of `own`; zeros
        beyond the ends."""
        found = []
        for to in range(self.stretches):
            received = jnp.zeros_like(own[to])
            for of in range(self.stretches):
                moves = []
                for device in range(self.parts):
                    number = (device if to == 0 else 2 * self.parts - 1 - device) + by
                    if 0 <= number < self.parts * self.stretches and _holder(number, self.parts)[1] == of:
                        moves.append((_holder(number, self.parts)[0], device))
                stay = [source for source, device in moves if source == device]
                moves = [(source, device) for source, device in moves if source != device]
                if moves:
                    received += jax.lax.ppermute(own[of], self.axis, moves)
                if stay:
                    here = jnp.isin(jax.lax.axis_index(self.axis), jnp.asarray(stay))
                    received = jnp.where(here, own[of], received)
            found.append(received)
        return found


def _holder(stretch: int, parts: int) -> tuple[int, int]:
    """Which device has a stretch of a sequence, and as its first or second one."""
    return (stretch, 0) if stretch < parts else (2 * parts - 1 - stretch, 1)


def zigzag(x: Array, axis: str, parts: int, *, back: bool = False) -> Array:
    """Inside `jax.shard_map`: from a device's stretch of the tokens in order, [B, length, ...], to its first
    and second stretch of `Part`, or back."""
    size = x.shape[1] // 2
    halves = x[:, :size], x[:, size:]
    number = jax.lax.axis_index(axis)
    # Stretches 2 i and 2 i + 1 lie on device i; where there are two, device j has an even and an odd one too.
    homes = [(i, _holder(2 * i, parts)[0]) for i in range(parts)]
    others = [(i, _holder(2 * i + 1, parts)[0]) for i in range(parts)]
    even = number % 2 == 0
    if back:
        first, second = (jnp.where(even, *pair) for pair in (halves, halves[::-1]))
        turned = lambda moves: [(to, of) for of, to in moves]
        moved = (jax.lax.ppermute(first, axis, turned(homes)), jax.lax.ppermute(second, axis, turned(others)))
        return jnp.concatenate(moved, axis=1)
    first, second = (jax.lax.ppermute(y, axis, m) for y, m in zip(halves, (homes, others), strict=True))
    low, high = (jnp.where(even, *pair) for pair in ((first, second), (second, first)))
    return jnp.concatenate([low, high], axis=1)


def mesh_of_axes(axes: MeshAxes) -> AbstractMesh | None:
    """The mesh that is set, if it has one of the axes and several devices, and none of its parts is ours."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = axes.names & {*mesh.axis_names}
    if not ours or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def _check_types(axes: MeshAxes) -> None:
    """Explicit axes would split nothing, or fail deep inside of a loop whose carry has other shardings."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = sorted(name for name in axes.names if kinds.get(name) == AxisType.Explicit)
    if explicit and mesh.size > 1:
        raise ValueError(
            f"mesh axis '{explicit[0]}' is Explicit, what jax.make_mesh takes by default; attention is split "
            f"over axes of type Auto: make the mesh with axis_types=(AxisType.Auto,) * {len(kinds)}"
        )


def dividing(mesh: AbstractMesh, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of `names` that the mesh has, if together they divide `size`; None: it stays whole."""
    there = tuple(name for name in names if name in mesh.axis_names)
    return there if there and size % math.prod(mesh.shape[name] for name in there) == 0 else None


def splits(length: int, devices: int, *, unit: int = 1, least: int = 1, stretches: int = 1) -> bool:
    """Whether `length` tokens are so many whole stretches of `unit` tokens, no shorter than `least`."""
    number = devices * stretches
    return length % (number * unit) == 0 and length // number >= least


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
    stretches: int = 1,
) -> tuple[Array, Array | None]:
    """`core(tokens, rows, weights, blocks, part)`, on a mesh by each device for its examples, heads, tokens.

    Args:
      tokens: arrays [B, T, heads, ...], query heads and key/value heads of any number; split along all three.
      rows: arrays [B, ...] that every device needs whole, for its examples.
      weights: arrays that every device needs whole.
      blocks: None or arrays [B, heads, T, ...], split along all three.
      axes: which mesh axes split what.
      unit, least: a stretch of tokens is a multiple of `unit` and no shorter than `least`.
      stretches: 1, or 2 where `tokens` lie in the order of `Part`'s zigzag (`zigzag` brings them there).

    Returns what `core` does: an array as `tokens`, and None or an array as `blocks`. `part` is None where
    sequences are not split; without a mesh it is just called.

    Raises:
      ValueError: heads or tokens cannot be split over their mesh axis, or that is of type Explicit.
    """
    _check_types(axes)
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
    if context > 1 and not splits(length, context, unit=unit, least=least, stretches=stretches):
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
    part = Part(context, length // context, axes.context or "", stretches) if context > 1 else None
    return jax.shard_map(
        lambda *operands: core(*operands, part),
        in_specs=(by_tokens, PartitionSpec(examples), PartitionSpec(), by_blocks),
        out_specs=(by_tokens, by_blocks),
        check_vma=False,  # neither kernels nor the loops of their reference say along which axes they vary
    )(tokens, rows, weights, blocks)
