"""Experts on devices of their own (mesh axis `expert`): tokens go to their experts and come back.

Each device routes its own tokens. With `dense` exchanges it sends every other device a buffer that holds the
most that can go there (`jax.lax.all_to_all`), with `ragged` ones the rows alone
(`jax.lax.ragged_all_to_all`, which XLA has for GPUs and TPUs).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import ConfigError
from jaxlab.models.config import MoEConfig
from jaxlab.models.dispatch import arrange, send, take_rows
from jaxlab.models.mesh import BATCH, CONTEXT, EXPERTS, HEADS, WIDTH, current_mesh
from kernels_pallas.sharding import dividing

_WIDTHS = {"up": 1, "gate": 1, "down": 2, "down_bias": 1}
"""The axis of the model's width in what experts have."""
Products = Callable[[Array, Array | None], Array]
"""(rows, sizes): [El, S, D], places for each expert, and no sizes; or [R, D] in stretches of those sizes."""


class Devices(NamedTuple):
    """What else has a part in the routed experts, seen from one device."""

    peers: int = 1
    """Devices that share the experts."""
    tokens: tuple[str, ...] = ()
    """Mesh axes that split the tokens."""
    hidden: str | None = None
    """Mesh axis that splits the experts' hidden units."""

    def sum_over_tokens(self, x: Array) -> Array:
        return jax.lax.psum(x, self.tokens) if self.tokens else x

    def sum_over_hidden(self, x: Array) -> Array:
        return x if self.hidden is None else jax.lax.psum(x, self.hidden)

    def once(self, x: Array) -> Array:
        """What one of the devices that split hidden units adds, 0 on the others."""
        return x if self.hidden is None else jnp.where(jax.lax.axis_index(self.hidden) == 0, x, 0)


def on_devices(
    core: Callable[..., tuple[Array, Any]],
    x: Float[Array, "B T D"],
    real: Bool[Array, "B T"] | None,
    router: Any,
    experts: dict[str, Any],
) -> tuple[Float[Array, "B T D"], Any]:
    """`core(x, real, router, experts, devices)`, on a mesh by each device for its tokens, experts and hidden
    units.

    Args:
      core: returns an array as x, and sums over all tokens.
      real: of the tokens; None is passed on.
      router: arrays that every device needs whole.
      experts: kernels and biases by name, their first axis that of experts.

    Raises:
      ConfigError: experts or their hidden units cannot be split over their mesh axis.
    """
    mesh = current_mesh()
    if mesh is None:
        return core(x, real, router, experts, Devices())
    peers, hidden = mesh.shape.get(EXPERTS, 1), mesh.shape.get(HEADS, 1)
    count, width = experts["up"].shape[0], experts["up"].shape[2]
    for size, devices, axis, what in (
        (count, peers, EXPERTS, "experts"),
        (width, hidden, HEADS, "hidden units of an expert"),
    ):
        if size % devices:
            raise ConfigError(
                f"{size} {what} cannot be split over {devices} devices; lower mesh.{axis} to a divisor",
                key=f"mesh.{axis}",
            )
    examples, stretch = dividing(mesh, BATCH, x.shape[0]), dividing(mesh, (CONTEXT,), x.shape[1])
    # What lies over `fsdp` is gathered by each device itself: so its gradient is scattered there first, and
    # then what is left of it summed over the other axes that split tokens. Of operands that XLA gathers the
    # whole gradient is summed over all of these.
    parts = mesh.shape.get(WIDTH, 1)
    widths = {name: axis for name, axis in _WIDTHS.items() if name in experts}
    gathers = parts > 1 and all(experts[name].shape[axis] % parts == 0 for name, axis in widths.items())
    of_width = WIDTH if gathers else None
    by_tokens = PartitionSpec(examples, stretch)
    of_experts = EXPERTS if EXPERTS in mesh.axis_names else None
    of_hidden = HEADS if HEADS in mesh.axis_names else None
    specs = {
        "up": PartitionSpec(of_experts, of_width, of_hidden),
        "gate": PartitionSpec(of_experts, of_width, of_hidden),
        "down": PartitionSpec(of_experts, of_hidden, of_width),
        "up_bias": PartitionSpec(of_experts, of_hidden),
        "gate_bias": PartitionSpec(of_experts, of_hidden),
        "down_bias": PartitionSpec(of_experts, of_width),
    }
    devices = Devices(peers, (*(examples or ()), *(stretch or ())), of_hidden if hidden > 1 else None)

    def gathered(x: Array, real: Array | None, router: Any, experts: dict[str, Array]) -> tuple[Array, Any]:
        if gathers:
            whole = lambda name, axis: jax.lax.all_gather(experts[name], WIDTH, axis=axis, tiled=True)
            experts = {**experts, **{name: whole(name, axis) for name, axis in widths.items()}}
        return core(x, real, router, experts, devices)

    return jax.shard_map(
        gathered,
        in_specs=(by_tokens, by_tokens, PartitionSpec(), {name: specs[name] for name in experts}),
        out_specs=(by_tokens, PartitionSpec()),
        check_vma=False,  # as attention's (kernels_pallas/sharding.py)
    )(x, real, router, experts)


def through_experts(
    x: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    groups: Int[Array, " N"],
    num_groups: int,
    products: Products,
    moe: MoEConfig,
    devices: Devices,
    capacity: int | None,
) -> tuple[Float[Array, "N k D"], Bool[Array, "N k"]]:
    """What each chosen expert makes of each token, 0 where it was dropped, and which choices were kept."""
    (tokens, k), peers = chosen.shape, devices.peers
    ragged = peers > 1 and (moe.exchange == "ragged" or (moe.exchange == "auto" and _gpu()))
    most = tokens * min(k, moe.num_experts // peers)  # rows that one device can have for another
    if capacity is not None:
        most = min(most, moe.num_experts // peers * num_groups * capacity)
    apart = None if ragged or peers == 1 else most
    sent = send(
        chosen,
        groups,
        num_groups=num_groups,
        num_experts=moe.num_experts,
        peers=peers,
        capacity=capacity,
        apart=apart,
    )
    token = jnp.where(sent.choice < 0, -1, sent.choice // k)
    rows = take_rows(x, token, sent.place.reshape(tokens, k))
    if peers == 1:
        counts, received, back = sent.counts, rows, lambda y: y
    else:
        counts = jax.lax.all_to_all(sent.counts, EXPERTS, 0, 0)
        there, back = (_ragged if ragged else _dense)(sent.counts, counts, rows.shape[0], peers * most)
        received = there(rows)
    if peers == 1 and capacity is None:  # sorted by expert as they are
        made = products(received, jnp.sum(counts, axis=(0, 2)))
    else:
        layout = arrange(counts, received.shape[0], capacity=capacity, apart=apart)
        placed = take_rows(received, layout.source, layout.place[:, None])
        if capacity is None:
            out = products(placed, layout.sizes)
        else:
            out = products(placed.reshape(counts.shape[1], -1, x.shape[1]), None).reshape(placed.shape)
        made = take_rows(out, layout.place, layout.source[:, None])
    y = take_rows(back(made), sent.place, sent.choice[:, None])
    return y.reshape(tokens, k, -1), sent.place.reshape(tokens, k) >= 0


def _gpu() -> bool:
    return jax.default_backend() == "gpu"


Moves = tuple[Callable[[Array], Array], Callable[[Array], Array]]


def _dense(sent: Array, received: Array, sent_rows: int, received_rows: int) -> Moves:
    """Buffers of one size to every device, and back."""
    peers = sent.shape[0]
    move = lambda x: jax.lax.all_to_all(x.reshape(peers, -1, x.shape[1]), EXPERTS, 0, 0).reshape(x.shape)
    return move, move


def _ragged(sent: Array, received: Array, sent_rows: int, received_rows: int) -> Moves:
    """The rows alone, close together on both sides."""
    sizes, theirs = (jnp.sum(counts, axis=(1, 2)) for counts in (sent, received))
    every = jax.lax.all_gather(sizes, EXPERTS)  # [from, to]
    here = jax.lax.axis_index(EXPERTS)
    starts = lambda x, axis: jnp.cumsum(x, axis=axis) - x
    # Where what this device sends begins on each receiver, and where it came from on each sender.
    at_receiver, at_sender = starts(every, 0)[here], starts(every, 1)[:, here]

    def there(rows: Array) -> Array:
        out = jnp.zeros((received_rows, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows, out, starts(sizes, 0), sizes, at_receiver, theirs, axis_name=EXPERTS
        )

    def back(rows: Array) -> Array:
        out = jnp.zeros((sent_rows, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows, out, starts(theirs, 0), theirs, at_sender, sizes, axis_name=EXPERTS
        )

    return there, back
