"""Who this process is among those of a job, from what launchers put into the environment.

Written from the documentation of SLURM (srun), Kubernetes (Indexed Job, JobSet), Open MPI and Hydra (MPICH,
Intel MPI). Nothing here asks a server.
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxlab.errors import UserError

ADDRESS, PROCESSES = "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT"
"""What tells where process 0 is and how many there are, where the launcher does not."""
_FIRST_PORT, _PORTS = 61440, 4096
"""Ports above those that systems give away by themselves."""


class Place(NamedTuple):
    """One process of a job."""

    launcher: str
    coordinator: str
    """host:port of process 0."""
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    """GPUs of this process, counted on its host; None: all that it sees."""


def find_place(environment: Mapping[str, str], port: int | None = None) -> Place:
    """The place that the environment tells.

    Args:
      port: of process 0; None: one by the number of the job.

    Raises:
      UserError: no launcher is known by it, or something it should tell is missing or no number.
    """
    env = _Environment(environment)
    slurm = "SLURM_PROCID" in env and "SLURM_JOB_ID" in env
    if "OMPI_COMM_WORLD_RANK" in env:
        return _open_mpi(env, port)
    # Hydra starts its own processes by srun: then the numbers of SLURM are those of its helpers.
    if "PMI_RANK" in env and not (slurm and env.number("PMI_SIZE") == _slurm_tasks(env)):
        return _pmi(env, port)
    if slurm:
        return _slurm(env, port)
    if "JOB_COMPLETION_INDEX" in env:
        return _kubernetes(env, port)
    raise UserError(
        "distributed: auto finds no step of SLURM (srun), no Indexed Job or JobSet of Kubernetes and no MPI "
        "launcher in the environment; start it by one of these, or set distributed.kind: explicit"
    )


class _Environment:
    """The environment, and what is wrong with it in one line."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def __contains__(self, name: str) -> bool:
        return bool(self.values.get(name))

    def get(self, name: str) -> str | None:
        return self.values.get(name) or None

    def text(self, *names: str) -> str:
        """The first of several variables that is set."""
        for name in names:
            if name in self:
                return self.values[name]
        raise UserError(f"distributed: auto needs the environment variable {' or '.join(names)}")

    def number(self, *names: str) -> int:
        text = self.text(*names)
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            name = next(name for name in names if name in self)
            raise UserError(f"the environment variable {name} should be a number, is {text!r}")
        return int(text)


def _slurm_tasks(env: _Environment) -> int:
    return env.number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")


def _slurm(env: _Environment, port: int | None) -> Place:
    tasks, process = _slurm_tasks(env), env.number("SLURM_PROCID")
    if tasks > 1 and not ("SLURM_STEP_ID" in env or "SLURM_STEPID" in env):
        raise UserError(f"this is one process of a SLURM job of {tasks} tasks; start all of them by srun")
    if port is None:
        port = _FIRST_PORT + env.number("SLURM_JOB_ID") % _PORTS
    nodes = env.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    host = next(expand_nodes(nodes))
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    here = 1
    if per_node is not None:
        counts = tasks_per_node(per_node)
        node = env.number("SLURM_NODEID") if "SLURM_NODEID" in env else 0
        here = counts[min(node, len(counts) - 1)]
    local = env.number("SLURM_LOCALID") if "SLURM_LOCALID" in env else 0
    return _place("SLURM", env.get(ADDRESS) or f"{host}:{port}", tasks, process, _share(env, local, here))


def _open_mpi(env: _Environment, port: int | None) -> Place:
    size, rank = env.number("OMPI_COMM_WORLD_SIZE"), env.number("OMPI_COMM_WORLD_RANK")
    here = env.number("OMPI_COMM_WORLD_LOCAL_SIZE")
    local = env.number("OMPI_COMM_WORLD_LOCAL_RANK")
    name = env.get("OMPI_MCA_orte_hnp_uri") or env.get("PMIX_NAMESPACE") or ""
    if port is None:
        port = _port_of(name.split(";")[0])
    host = "127.0.0.1" if here == size else _launcher(name)
    return _place("Open MPI", _known(env, host, port), size, rank, _share(env, local, here))


def _launcher(uri: str) -> str | None:
    """The first address of the host of mpirun, which is process 0's unless it was sent elsewhere."""
    found = re.search(r"tcp6?://(?:\[([^\],]+)|([^,:]+))", uri)
    if found is None:
        return None
    six, four = found.groups()
    return f"[{six}]" if six else str(four)


def _pmi(env: _Environment, port: int | None) -> Place:
    size, rank = env.number("PMI_SIZE"), env.number("PMI_RANK")
    here = env.number("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PMI_SIZE")
    local = env.number("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PMI_RANK")
    if port is None:
        port = _port_of(env.get("PMI_JOBID") or env.get("HYDI_CONTROL_FD") or "")
    known = "MPI_LOCALNRANKS" in env or "PMI_LOCAL_SIZE" in env
    host = "127.0.0.1" if known and here == size else None
    return _place("PMI", _known(env, host, port), size, rank, _share(env, local, here) if known else None)


def _kubernetes(env: _Environment, port: int | None) -> Place:
    index = env.number("JOB_COMPLETION_INDEX")
    if "JOB_INDEX" in env and "PROCESSES_IN_JOB" in env:  # a JobSet of several Jobs
        index += env.number("JOB_INDEX") * env.number("PROCESSES_IN_JOB")
    address = env.text(ADDRESS)
    if ":" not in address:
        address = f"{address}:{port or _FIRST_PORT}"
    return _place("Kubernetes", address, env.number(PROCESSES), index, None)


def _place(
    launcher: str, coordinator: str, processes: int, process: int, devices: tuple[int, ...] | None
) -> Place:
    if not process < processes:
        raise UserError(f"{launcher} says that this is process {process} of {processes}: they count from 0")
    return Place(launcher, coordinator, processes, process, devices)


def _known(env: _Environment, host: str | None, port: int) -> str:
    if ADDRESS in env:
        return env.text(ADDRESS)
    if host is None:
        raise UserError(
            "distributed: auto knows that several hosts compute, and not which one has process 0; set the "
            f"environment variable {ADDRESS}=HOST:PORT for all processes"
        )
    return f"{host}:{port}"


def _port_of(job: str) -> int:
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def _share(env: _Environment, local: int, here: int) -> tuple[int, ...] | None:
    """The GPUs of process `local` of the `here` processes of a host; None: all that it sees.

    Where it sees fewer GPUs than there are processes, its launcher has given it its own.
    """
    if here == 1:
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return (local,)
    each = len([device for device in visible.split(",") if device.strip()]) // here
    return tuple(range(local * each, (local + 1) * each)) or None


def expand_nodes(nodes: str) -> Iterator[str]:
    """The hosts of a node list of SLURM, in its order: `a1,gpu[08-10,12],rack[1-2]n[1-2]`.

    Raises:
      UserError: it is none.
    """
    words = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes)
    if not words or ",".join(words) != nodes:
        raise UserError(f"{nodes[:80]!r} is no list of nodes of SLURM")
    for word in words:
        yield from _expand(word, nodes)


def _expand(word: str, nodes: str) -> Iterator[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        yield word
        return
    ranges, _, tail = rest.partition("]")
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
            raise UserError(f"{nodes[:80]!r} is no list of nodes of SLURM")
        for number in range(int(first), int(last) + 1):
            for end in _expand(tail, nodes) if tail else ("",):
                yield f"{head}{number:0{len(first)}d}{end}"


def tasks_per_node(text: str) -> list[int]:
    """The tasks of each node, as SLURM shortens them: `4(x2),1` is [4, 4, 1].

    Raises:
      UserError: it is no such list.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip(), re.ASCII)
        if found is None:
            raise UserError(f"{text[:80]!r} is no list of tasks per node of SLURM")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts
