"""The mesh of devices, and where parameters and batches live on it (by the rules in axis_rules.py)."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlab.errors import ConfigError, UserError
from jaxlab.models.axis_rules import partition_spec
from jaxlab.models.batch import Batch, Params
from jaxlab.models.config import ModelConfig
from jaxlab.models.mesh import BATCH, CONTEXT, check_length
from jaxlab.models.moe import check_groups
from jaxlab.models.parameters import abstract_params, logical_axes


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; -1 once: all that are left."""

    data: int = -1
    """Devices that see different examples with whole parameters."""
    fsdp: int = 1
    """Devices that see different examples and split the parameters and the optimizer's state."""

    model: int = 1
    """Devices that see the same examples, each for its heads and hidden units; it divides their numbers."""
    context: int = 1
    """Devices that split each sequence; queries stay, keys and values are gathered."""
    expert: int = 1
    """Devices that see different examples and split the routed experts, to which tokens travel; it divides
    their number."""

    def __post_init__(self) -> None:
        rest = False
        for name, devices in asdict(self).items():
            if devices < 1 and devices != -1:
                raise ConfigError(f"must be at least 1, or -1 for the rest, is {devices}", key=name)
            if rest and devices == -1:
                raise ConfigError("only one axis can take the rest (-1)", key=name)
            rest = rest or devices == -1


@dataclass(frozen=True)
class SplitConfig:
    """Devices over which a model is split that one of them does not hold; -1 once: all that are left."""

    fsdp: int = 1
    """Devices that split every matrix by the width, and batches by examples; parts are gathered layer by
    layer."""
    model: int = 1
    """Devices that each have some of the heads and hidden units; it divides their numbers."""

    def __post_init__(self) -> None:
        MeshConfig(data=1, **asdict(self))


def model_mesh(config: SplitConfig) -> Mesh | None:
    """The mesh of `config` over the devices at hand; None: the model is on one device, the default one.

    Raises:
      UserError: there are fewer devices than it needs.
    """
    return None if config == SplitConfig() else make_mesh(MeshConfig(data=1, **asdict(config)))


def mesh_of(mesh: Mesh | Mapping[str, int] | None) -> Mesh | None:
    """A mesh over which jit partitions automatically.

    Args:
      mesh: one, whatever the types of its axes; or sizes of axes by name, as in MeshConfig.

    Raises:
      UserError: axes that are not known here, or more devices than there are.
    """
    if mesh is None:
        return None
    unknown = sorted(set(mesh.axis_names if isinstance(mesh, Mesh) else mesh) - set(asdict(MeshConfig())))
    if unknown:
        known = ", ".join(asdict(MeshConfig()))
        raise UserError(f"mesh: the axis {unknown[0]!r} is not known; a mesh has {known}")
    if not isinstance(mesh, Mesh):
        return make_mesh(MeshConfig(**{"data": 1, **mesh}))
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Sets a mesh, for what is traced and called inside; None sets nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of `config` over the devices at hand; jit partitions automatically over it.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices()
    sizes: dict[str, int] = asdict(config)
    named = math.prod(n for n in sizes.values() if n != -1)
    sizes = {axis: max(1, len(devices) // named) if n == -1 else n for axis, n in sizes.items()}
    total = math.prod(sizes.values())
    if total > len(devices) or (total < len(devices) and -1 in asdict(config).values()):
        raise UserError(
            f"mesh {sizes} needs {total} devices, {len(devices)} are here; change the axes of mesh"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:total]
    )


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Where each parameter of `config` lives. A vocabulary that its mesh axis does not divide stays whole.

    Raises:
      UserError: a dimension is not divisible by the mesh axis that splits it.
    """
    return shardings_by_axes(abstract_params(config), logical_axes(config), mesh)


def shardings_by_axes(shapes: Params, axes: Params, mesh: Mesh | AbstractMesh) -> Params:
    """Where each leaf of a tree of shapes lives, by its logical axes.

    Raises:
      UserError: a dimension is not divisible by the mesh axis that splits it.
    """

    def place(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> NamedSharding:
        spec = PartitionSpec(
            *(
                axis if axis in mesh.shape and not (name == "vocab" and size % mesh.shape[axis]) else None
                for axis, name, size in zip(partition_spec(axes), axes, shape.shape, strict=True)
            )
        )
        for size, axis, name in zip(shape.shape, spec, axes, strict=True):
            parts = 1 if axis is None else mesh.shape[axis]
            if size % parts:
                raise UserError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}: its {name} axis of {size} "
                    f"cannot be split over {parts} devices of mesh axis {axis}; change mesh.{axis} or the "
                    "size"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def check_batch(rows: int, length: int, model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Whether batches of `rows` sequences of `length` tokens can be split over `mesh`.

    Raises:
      UserError: they cannot.
    """
    parts = _batch_parts(mesh)
    if rows % parts:
        raise UserError(
            f"a part of {rows} sequences cannot be split over {parts} devices; "
            "change batch_size, accumulation or mesh"
        )
    sizes = {}
    if model.attention.kind == "nsa":
        sizes = {"unit": model.nsa.stride, "least": model.nsa.block_len - model.nsa.stride}
    check_length(length, mesh.shape.get(CONTEXT, 1), **sizes)
    if model.moe is not None:
        check_groups(model.moe, length, mesh.shape.get(CONTEXT, 1))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Examples split over devices, whole on each one where their number does not allow it; what a batch holds
    of each token over `context` besides."""
    rows, length = batch["tokens"].shape
    parts = _batch_parts(mesh)
    examples = None if rows % parts else tuple(name for name in BATCH if name in mesh.shape)
    of_tokens = PartitionSpec(examples, CONTEXT if CONTEXT in mesh.shape else None)
    # What images have besides may be of no whole number of rows.
    of_rows = lambda x: PartitionSpec() if x.shape[0] % parts else PartitionSpec(examples)
    spec = lambda x: of_tokens if x.shape[:2] == (rows, length) else of_rows(x)
    return {name: NamedSharding(mesh, spec(x)) for name, x in batch.items()}


def place_batch(batch: Mapping[str, Any], mesh: Mesh, rows: int | None = None) -> Batch:
    """A batch on the devices of `mesh`.

    Args:
      rows: of the whole batch, where `batch` holds those of `rows_here` alone; None: it is whole.
    """
    if not mesh.is_multi_process:
        return cast(Batch, jax.device_put(batch, batch_shardings(batch, mesh)))
    here = len(batch["tokens"])
    if rows is None or rows == here:
        where = batch_shardings(batch, mesh)
        made = {
            name: jax.make_array_from_callback(x.shape, where[name], np.asarray(x).__getitem__)
            for name, x in batch.items()
        }
        return cast(Batch, made)
    first = rows_here(rows, mesh).start
    whole = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    where = batch_shardings(whole, mesh)

    def of_device(x: Any) -> Callable[[tuple[slice, ...] | None], Any]:
        def part(index: tuple[slice, ...] | None) -> Any:
            assert index is not None  # a device of this process
            start, stop, _ = index[0].indices(rows)
            return x[(slice(start - first, stop - first), *index[1:])]

        return part

    placed = {
        name: jax.make_array_from_callback(whole[name].shape, where[name], of_device(x), dtype=x.dtype)
        for name, x in batch.items()
    }
    return cast(Batch, placed)


def rows_here(rows: int, mesh: Mesh) -> slice:
    """The rows of a batch of so many that devices of this process hold: one stretch."""
    if not mesh.is_multi_process:
        return slice(0, rows)
    shape = (rows, 1)
    where = batch_shardings({"tokens": jax.ShapeDtypeStruct(shape, "int32")}, mesh)["tokens"]
    where = NamedSharding(mesh, PartitionSpec(*where.spec[:1]))  # of one column, whatever splits tokens
    here = where.addressable_devices_indices_map(shape).values()
    spans = [index[0].indices(rows)[:2] for index in here if index is not None]
    return slice(min(start for start, _ in spans), max(stop for _, stop in spans))


def to_host(tree: Any) -> Any:
    """Arrays whole on this host; where they lie on several hosts, all processes ask for them."""
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function` traced with `mesh` set, as its attention has to know it (jaxlab/models/mesh.py).

    To be jitted, and called with arguments that live on the devices of `mesh`.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def _batch_parts(mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape.get(name, 1) for name in BATCH)
