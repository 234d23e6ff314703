"""The one table from logical axis names to mesh axes."""

from jax.sharding import PartitionSpec

from jaxlab.models.mesh import BATCH, CONTEXT, EXPERTS, HEADS

LOGICAL_AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "embed": "fsdp",
    "block": None,
    "branch": None,
    "channels": None,
    "compress": "fsdp",
    "experts": EXPERTS,
    "frames": None,
    "gate": None,
    "head_dim": None,
    "heads": HEADS,
    "kv_heads": HEADS,
    "latent": None,
    "layers": None,
    "mlp": HEADS,
    "pixels": None,
    "position": None,
    "rank": None,
    "ratio": None,
    "tile": None,
    "tokens": CONTEXT,
    "vocab": HEADS,
}
"""Logical axis -> mesh axis (None: not split). An axis that is not named here is an error."""


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Mesh axes of a tensor with these logical axes.

    Raises:
      ValueError: an axis is not in the table, or two of them want the same mesh axis.
    """
    unknown = [axis for axis in axes if axis not in LOGICAL_AXIS_RULES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is not in the table of sharding rules")
    spec = [LOGICAL_AXIS_RULES[axis] for axis in axes]
    used = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    twice = {name for name in used if used.count(name) > 1}
    if twice:
        raise ValueError(f"axes {axes} would use mesh axis {twice.pop()!r} twice")
    return PartitionSpec(*spec)
