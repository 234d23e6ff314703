"""Starts the processes of a run on this host."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(command, number=2, *, cache=None, prefix=lambda process: []):
    """Processes of `command(process)`, each with one CPU device of its own.

    Args:
      cache: a folder for compiled programs; None keeps none.
      prefix: words before the command of a process.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
    }
    if cache is not None:
        environment |= {"XDG_CACHE_HOME": str(cache)}
        del environment["JAX_ENABLE_COMPILATION_CACHE"]
    return [
        subprocess.Popen(
            [*prefix(process), sys.executable, *map(str, command(process))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(number)
    ]


def end(processes, seconds=600):
    """(exit status, stdout, lines of stderr) of each."""
    found = []
    try:
        for process in processes:
            out, said = process.communicate(timeout=seconds)
            found.append((process.returncode, out, said.replace("\r", "\n").splitlines()))
    finally:
        for process in processes:
            process.kill()
    return found
