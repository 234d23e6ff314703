"""The mesh, and the one table from logical axis names to mesh axes."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlab.errors import ConfigError, UserError
from jaxlab.models import Batch, ModelConfig, Params, abstract_params, logical_axes

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "block": None,
    "branch": None,
    "channels": None,
    "compress": "fsdp",
    "experts": None,
    "frames": None,
    "gate": None,
    "head_dim": None,
    "heads": None,
    "kv_heads": None,
    "layers": None,
    "mlp": None,
    "pixels": None,
    "position": None,
    "ratio": None,
    "tile": None,
    "vocab": None,
}
"""Logical axis -> mesh axis (None: not split). An axis that is not named here is an error."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; -1 once: all that are left."""

    data: int = -1
    """Devices that see different examples with whole parameters."""
    fsdp: int = 1
    """Devices that see different examples and split the parameters and the optimizer's state."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ConfigError(
                    f"must be at least 1, or -1 for the rest, is {getattr(self, name)}", key=name
                )
        if self.data == -1 and self.fsdp == -1:
            raise ConfigError("only one axis can take the rest (-1)", key="fsdp")


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of `config` over the devices at hand; jit partitions automatically over it.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices()
    sizes = {"data": config.data, "fsdp": config.fsdp}
    named = int(np.prod([n for n in sizes.values() if n != -1]))
    sizes = {axis: max(1, len(devices) // named) if n == -1 else n for axis, n in sizes.items()}
    total = int(np.prod(list(sizes.values())))
    if total > len(devices) or (total < len(devices) and -1 in (config.data, config.fsdp)):
        raise UserError(
            f"mesh {sizes} needs {total} devices, {len(devices)} are here; set mesh.data and mesh.fsdp"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:total]
    )


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Mesh axes of a tensor with these logical axes.

    Raises:
      ValueError: an axis is not in the table, or two of them want the same mesh axis.
    """
    unknown = [axis for axis in axes if axis not in RULES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is not in the table of sharding rules")
    spec = [RULES[axis] for axis in axes]
    used = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    twice = {name for name in used if used.count(name) > 1}
    if twice:
        raise ValueError(f"axes {axes} would use mesh axis {twice.pop()!r} twice")
    return PartitionSpec(*spec)


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """Where each parameter of `config` lives.

    Raises:
      UserError: a dimension is not divisible by the mesh axis that splits it.
    """

    def place(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> NamedSharding:
        spec = partition_spec(axes)
        for size, axis, name in zip(shape.shape, spec, axes, strict=True):
            parts = mesh.shape[axis] if isinstance(axis, str) else 1
            if size % parts:
                raise UserError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}: its {name} axis of {size} "
                    f"cannot be split over {parts} devices of mesh axis {axis}; change mesh.{axis} or the "
                    "size"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract_params(config), logical_axes(config))


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Examples split over every device; whole on each one where their number does not allow it."""
    return NamedSharding(mesh, PartitionSpec() if rows % mesh.size else partition_spec(("batch",)))


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """`batch` on the devices of `mesh`."""
    return jax.device_put(batch, batch_sharding(mesh, len(batch["tokens"])))
