"""Which row goes where: tokens to the experts that they chose, over devices, and back.

All of it is arithmetic of indices; rows are moved by gathers, in both passes, so that sums have one order and
results the same bits each time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NOWHERE = -1


class Sent(NamedTuple):
    """How the choices of a device's tokens lie in the rows that it sends, by receiving device, expert, group
    and token."""

    place: Int[Array, " Nk"]
    """The row of each choice; -1: dropped."""
    choice: Int[Array, " R"]
    """The choice in each row; -1: none."""
    counts: Int[Array, "P El g"]
    """Rows for each device's experts, of each group."""


class Layout(NamedTuple):
    """How rows that were received lie for the experts' products."""

    place: Int[Array, " R"]
    """Of each received row; -1: it holds none."""
    source: Int[Array, " S"]
    """The received row in each place; -1: none."""
    sizes: Int[Array, " El"]
    """Rows of each expert."""


def send(
    chosen: Int[Array, "N k"],
    groups: Int[Array, " N"],
    *,
    num_groups: int,
    num_experts: int,
    peers: int,
    capacity: int | None,
    apart: int | None,
) -> Sent:
    """Rows of the chosen experts, in the order of tokens.

    Args:
      groups: tokens of one number share each expert's `capacity`, the first ones before the later.
      peers: devices that have the experts, consecutive ones each.
      capacity: rows that an expert takes of a group; None: all.
      apart: rows of each receiving device begin at so many times its number; None: they stand close together.
    """
    key = (chosen * num_groups + groups[:, None]).reshape(-1)
    order = jnp.argsort(key, stable=True)
    sizes = jnp.bincount(key, length=num_experts * num_groups).astype(jnp.int32)
    within = jnp.argsort(order).astype(jnp.int32) - _starts(sizes)[key]
    kept = sizes if capacity is None else jnp.minimum(sizes, capacity)
    by_peer = kept.reshape(peers, -1)
    begins = jnp.arange(peers) * apart if apart is not None else _starts(jnp.sum(by_peer, axis=1))
    begins = begins[:, None] + jnp.cumsum(by_peer, axis=1) - by_peer
    place = jnp.where(within < kept[key], begins.reshape(-1)[key] + within, NOWHERE)
    rows = key.size if apart is None else peers * apart
    return Sent(place, inverse(place, rows), by_peer.reshape(peers, -1, num_groups))


def arrange(counts: Int[Array, "P El g"], rows: int, *, capacity: int | None, apart: int | None) -> Layout:
    """Received rows by expert, then by sending device, group and token; with a `capacity` each expert has as
    many places, without they stand close together.

    Args:
      counts: rows of each sending device for each of this device's experts, of each group.
      rows: what the buffer of received rows holds.
      apart: as that of `send`.
    """
    peers, experts, num_groups = counts.shape
    if apart is None:
        segment, within = _locate(counts.reshape(-1), rows)
    else:
        segment, within = jax.vmap(lambda sizes: _locate(sizes, apart))(counts.reshape(peers, -1))
        segment += jnp.arange(peers)[:, None] * experts * num_groups
        segment, within = segment.reshape(-1), within.reshape(-1)
    by_expert = counts.swapaxes(0, 1)
    if capacity is None:
        begins, places = _starts(by_expert.reshape(-1)), rows
    else:
        begins, places = jnp.arange(counts.size) * capacity, counts.size * capacity
    # Segments are numbered by device first, places by expert first.
    begins = begins.reshape(by_expert.shape).swapaxes(0, 1).reshape(-1)
    place = jnp.where(within < 0, NOWHERE, begins[segment] + within)
    return Layout(place, inverse(place, places), jnp.sum(counts, axis=(0, 2)))


def inverse(places: Int[Array, " N"], size: int) -> Int[Array, " size"]:
    """For each of `size` places the index of the entry that names it; -1: none does."""
    index = jnp.arange(places.size, dtype=jnp.int32)
    return (
        jnp.full((size,), NOWHERE, jnp.int32).at[jnp.where(places < 0, size, places)].set(index, mode="drop")
    )


@jax.custom_vjp
def take_rows(
    x: Float[Array, "N D"], rows: Int[Array, " R"], takers: Int[Array, "N n"]
) -> Float[Array, "R D"]:
    """x[rows], 0 where a row is -1. `takers` are the places that took each row of x (-1: none), from which
    its gradient is gathered."""
    return _gather(x, rows)


def _gather(x: Array, rows: Array) -> Array:
    there: Bool[Array, " R"] = rows >= 0
    return jnp.where(there.reshape(*rows.shape, 1), x[jnp.maximum(rows, 0)], 0)


def _take_rows(x: Array, rows: Array, takers: Array) -> tuple[Array, Array]:
    return _gather(x, rows), takers


def _gradient(takers: Array, d_out: Array) -> tuple[Array, None, None]:
    return jnp.sum(_gather(d_out, takers), axis=1), None, None


take_rows.defvjp(_take_rows, _gradient)


def _starts(sizes: Int[Array, " n"]) -> Int[Array, " n"]:
    return jnp.cumsum(sizes) - sizes


def _locate(sizes: Int[Array, " n"], count: int) -> tuple[Int[Array, " count"], Int[Array, " count"]]:
    """The segment that each of `count` consecutive rows belongs to, and its number there; -1 beyond them."""
    ends, index = jnp.cumsum(sizes), jnp.arange(count, dtype=jnp.int32)
    segment = jnp.minimum(jnp.searchsorted(ends, index, side="right"), sizes.size - 1).astype(jnp.int32)
    within = index - (ends - sizes)[segment]
    return segment, jnp.where(index < ends[-1], within, NOWHERE).astype(jnp.int32)
