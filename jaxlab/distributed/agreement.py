"""One number that all processes agree on after every step, without a wait for the devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.distributed.processes import process_count


class Agreement:
    """The largest of the numbers that processes give, one call later: all read the same.

    The result of a call is read by the next one, when its step is done anyhow; so the devices are never idle
    for it, and the host is at most one step ahead of them.
    """

    def __init__(self) -> None:
        self._before: Any = None

    def largest(self, number: int) -> int:
        """Gives `number`, and returns the largest that was given in the call before; 0 in the first one. With
        one process it is `number`."""
        if process_count() == 1:
            return number
        devices, maximum = _program()
        local = np.full(jax.local_device_count(), number, np.int32)
        before, self._before = self._before, maximum(jax.make_array_from_process_local_data(devices, local))
        return 0 if before is None else int(before)


@functools.cache
def _program() -> tuple[NamedSharding, Any]:
    mesh = Mesh(np.array(jax.devices()), ("all",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.max, out_shardings=everywhere)
