"""How the processes of a run find each other, as a config."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.errors import ConfigError

_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class OneProcessConfig:
    """One process computes."""

    kind: Literal["off"] = "off"


@dataclass(frozen=True)
class ClusterConfig:
    """Several processes, which learn from SLURM, Kubernetes, Open MPI or a PMI launcher who they are."""

    kind: Literal["auto"] = "auto"
    port: int | None = None
    """Of process 0, where the others find it; none: one by the number of the job."""
    local_device_ids: tuple[int, ...] | None = None
    """GPUs of this process, counted on its host; none: an equal share for each process of the host."""
    start_timeout: int = 300
    """Seconds in which all processes have to arrive."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of a process, after which the others end."""

    def __post_init__(self) -> None:
        _check(self.start_timeout, self.heartbeat_timeout, self.local_device_ids)
        if self.port is not None and not 0 < self.port < 1 << 16:
            raise ConfigError(f"must be from 1 to 65535, is {self.port}", key="port")


@dataclass(frozen=True)
class ExplicitConfig:
    """Several processes that are told who they are; all is the same for each but process_id and
    local_device_ids."""

    kind: Literal["explicit"] = "explicit"
    coordinator: str = ""
    """HOST:PORT of process 0, where the others find it."""
    num_processes: int = 1
    """How many there are."""
    process_id: int = 0
    """Which of them this one is, from 0."""
    local_device_ids: tuple[int, ...] | None = None
    """GPUs of this process, counted on its host; none: all."""
    start_timeout: int = 300
    """Seconds in which all processes have to arrive."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of a process, after which the others end."""

    def __post_init__(self) -> None:
        _check(self.start_timeout, self.heartbeat_timeout, self.local_device_ids)
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigError(
                f"must be HOST:PORT of process 0, such as node1:61440, is {self.coordinator!r}",
                key="coordinator",
            )
        if not 1 <= self.num_processes <= 1 << 16:
            raise ConfigError(f"must be from 1 to {1 << 16}, is {self.num_processes}", key="num_processes")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"must be from 0 to {self.num_processes - 1} of {self.num_processes} processes, is "
                f"{self.process_id}",
                key="process_id",
            )


DistributedConfig = OneProcessConfig | ClusterConfig | ExplicitConfig
"""Whether one process computes, or several and how they find each other."""


def _check(start: int, heartbeat: int, devices: tuple[int, ...] | None) -> None:
    for name, seconds, least in (("start_timeout", start, 1), ("heartbeat_timeout", heartbeat, 2)):
        if not least <= seconds <= _MOST // 1000:
            raise ConfigError(f"must be from {least} to {_MOST // 1000} seconds, is {seconds}", key=name)
    if devices is not None and (
        not devices or min(devices) < 0 or max(devices) > 1023 or len(set(devices)) < len(devices)
    ):
        raise ConfigError(
            f"must be different numbers of devices, from 0, is {list(devices)}", key="local_device_ids"
        )
