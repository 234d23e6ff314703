"""One of two processes that talk; the second one then makes a mistake. python talk.py PORT PROCESS"""

import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import distributed
from jaxlab.app import run_command_line
from jaxlab.errors import UserError
from jaxlab.models import MeshConfig, make_mesh, place_batch, rows_here


class Tasks:
    """Stands for a registry, so that errors are those of the command line."""

    def find(self, name):
        talk()


class Slow:
    """Stands for a jitted function that process 1 compiles more slowly."""

    def lower(self, process):
        time.sleep(process)
        return self

    def compile(self):
        pass

    def __call__(self, process):
        return time.monotonic()


def talk():
    port, process = sys.argv[1], int(sys.argv[2])
    config = distributed.ExplicitConfig(
        coordinator=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=process,
        start_timeout=60,
        heartbeat_timeout=30,
    )
    with distributed.joined(config):
        assert (distributed.process_index(), distributed.process_count()) == (process, 2)
        assert distributed.share("number", process + 5) == 5
        assert [distributed.gather("words", f"{n}{process}") for n in "ab"] == [["a0", "a1"], ["b0", "b1"]]

        mesh = make_mesh(MeshConfig(data=2))
        assert rows_here(4, mesh) == slice(2 * process, 2 * process + 2)
        assert rows_here(3, mesh) == slice(0, 3)  # which two devices cannot split
        rows = np.arange(12).reshape(4, 3)
        for batch in (
            place_batch({"tokens": rows}, mesh),
            place_batch({"tokens": rows[rows_here(4, mesh)]}, mesh, 4),
        ):
            everywhere = NamedSharding(mesh, PartitionSpec())
            whole = jax.jit(jnp.copy, out_shardings=everywhere)(batch["tokens"])
            np.testing.assert_array_equal(np.asarray(whole), rows)

        began = time.monotonic()
        together = distributed.compile_together(Slow())
        first = together(process)
        assert first - began > 0.5
        assert together(process) - first < 0.5  # it is compiled
        double = distributed.compile_together(jax.jit(lambda x: 2 * x))
        assert jax.jit(lambda x: double(x) + 1)(process) == 2 * process + 1  # of another jitted function

        agreement = distributed.Agreement()
        asked = [signal.SIGTERM if process == 1 and step == 2 else 0 for step in range(5)]
        assert [agreement.largest(number) for number in asked] == [0, 0, 0, signal.SIGTERM, 0]
        distributed.wait_for_all("talked")
        print("all is as it should be", file=sys.stderr, flush=True)
        if process == 1:
            raise UserError("no such disk")
        distributed.share("never", 0)
        distributed.wait_for_all("never")


if __name__ == "__main__":
    sys.exit(run_command_line(["x"], Tasks()))
