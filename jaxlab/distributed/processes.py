"""The processes of a run: start and end, and what they tell each other on the host.

Texts go through the key-value store of jax's coordination service, which process 0 runs; no device computes.
Every process calls `share`, `gather` and `wait_for_all` of a name equally often.
"""

import atexit
import contextlib
import functools
import json
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, cast

from jaxlab.distributed.config import ClusterConfig, DistributedConfig, ExplicitConfig
from jaxlab.distributed.environment import Place, find_place
from jaxlab.distributed.watch import Watch, say
from jaxlab.errors import UserError

_FOREVER_MS = 7 * 24 * 3600 * 1000
"""A process that waits is ended by its watch, not by this."""


class _Joined(NamedTuple):
    """What this process knows once all have arrived."""

    place: Place
    client: Any
    """jax's, of its coordination service."""
    hosts: list[str]
    """Of each process."""
    watch: Watch


_here: _Joined | None = None
_left = False
"""Whether all have come to the end of their work together."""
_times: Counter[str] = Counter()
_status: int | None = None
"""With what this process ends at once, where it is not at the end of its work."""


def process_index() -> int:
    """Which of the processes this is; 0 where there is one. Starts no backend of jax."""
    return 0 if _here is None else _here.place.process_id


def process_count() -> int:
    """How many processes there are. Starts no backend of jax."""
    return 1 if _here is None else _here.place.num_processes


def is_main() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return process_index() == 0


def share(name: str, value: Any = None) -> Any:
    """The value that process 0 gives, on all processes.

    Args:
      name: of what is told.
      value: what has a form in JSON; of process 0.
    """
    if _here is None:
        return value
    key = f"jaxlab/{name}/{_count(name)}"
    if is_main():
        _here.client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(_here.client.blocking_key_value_get(key, _FOREVER_MS))


def gather(name: str, value: Any) -> list[Any]:
    """The values of all processes, in their order, on all of them; they have a form in JSON."""
    if _here is None:
        return [value]
    number = _count(name)
    folder = f"jaxlab/{name}/{number}/"
    _here.client.key_value_set(f"{folder}{process_index()}", json.dumps(value))
    wait_for_all(f"{name}-{number}")
    found = {int(key.rpartition("/")[2]): text for key, text in _here.client.key_value_dir_get(folder)}
    if number and is_main():  # which all have read: they are past its barrier
        _here.client.key_value_delete(f"jaxlab/{name}/{number - 1}/")
    return [json.loads(found[process]) for process in range(process_count())]


def wait_for_all(name: str) -> None:
    """Goes on when all processes have come here."""
    if _here is not None:
        _here.client.wait_at_barrier(f"jaxlab/{name}/{_count(f'{name}-wait')}", _FOREVER_MS)


def compile_together[F: Callable[..., Any]](function: F) -> F:
    """A jitted function that no process runs before all have compiled it for its arguments: one that were
    sooner would wait in its first exchange with the others, which gives up after 30 seconds (Gloo) or 40
    (NCCL). Inside of another jitted function, and where there is one process, it is the function itself.
    """
    return cast(F, _CompiledTogether(function))


class _CompiledTogether:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: set[Hashable] = set()
        functools.update_wrapper(self, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _here is not None and not _left:
            self._compile(args, kwargs)
        return self._function(*args, **kwargs)

    def _compile(self, args: Any, kwargs: Any) -> None:
        import jax

        leaves, tree = jax.tree.flatten((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return
        kinds = tuple(
            (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) if hasattr(leaf, "dtype") else leaf
            for leaf in leaves
        )
        # Whether this was compiled is the same on all processes, which compute the same.
        if (tree, kinds) not in self._compiled:
            self._compiled.add((tree, kinds))
            self._function.lower(*args, **kwargs).compile()  # type: ignore[attr-defined]
            wait_for_all("compiled")


def _count(name: str) -> int:
    _times[name] += 1
    return _times[name] - 1


@contextlib.contextmanager
def joined(config: DistributedConfig | None) -> Iterator[None]:
    """The processes that a config tells of, for what the block does; at its end they wait for each other.

    A process that ends otherwise, by an exception, a signal or a kill, ends the others within
    `heartbeat_timeout`, each with a line that names it.

    Raises:
      UserError: this is not a process of several, or they cannot find each other.
    """
    if not isinstance(config, ClusterConfig | ExplicitConfig):
        yield
        return
    if _here is not None:
        raise UserError("distributed: several processes compute one run and end; start them anew for another")
    here = _start(config)
    if here is None:  # one process of one
        yield
        return
    try:
        yield
        leave()
    except UserError as error:
        tell_end(str(error), 2)
        raise
    except KeyboardInterrupt as error:
        tell_end(*_interrupted(error))
        raise
    except BaseException as error:
        if not _left and here.watch.is_of_others(error):  # the watch finds out which
            here.watch.wait_for_end()
        tell_end(f"{type(error).__name__}: {error}", 1)
        raise


def _interrupted(error: KeyboardInterrupt) -> tuple[str, int]:
    """What the others are told; what is said here comes from jaxlab/app/interrupts.py."""
    terminated = type(error) is not KeyboardInterrupt
    word = "terminated" if terminated else "interrupted"
    return "; ".join([word, *map(str, error.args)]), 143 if terminated else 130


def tell_end(said: str, status: int) -> None:
    """Tells the other processes that this one ends, why, and with which status; they end too."""
    global _status
    if _here is None or _left or _status is not None:
        return
    _status = status
    _here.watch.tell(said, status)


def leave() -> None:
    """The end of the work of all processes, which come here together; then each goes its own way."""
    global _left
    if _here is None or _left:
        return
    import jax

    wait_for_all("end")
    _left = True
    _here.watch.stop()
    jax.distributed.shutdown()


def _start(config: ClusterConfig | ExplicitConfig) -> _Joined | None:
    """Joins the other processes; None: there are none."""
    global _here
    place = _place(config)
    if place.num_processes == 1:
        return None
    import jax

    arrived = threading.Event()
    late = threading.Thread(target=_too_late, args=(place, config.start_timeout, arrived), daemon=True)
    late.start()
    # A signal belongs to jaxlab/app/interrupts.py, and all agree on it at a step.
    jax.config.update("jax_enable_preemption_service", False)
    _around_proxies(place)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            list(place.local_device_ids) if place.local_device_ids else None,
            cluster_detection_method="deactivate",
            # The limits of this module come first; where they do not get to it, jax ends the process.
            initialization_timeout=config.start_timeout + 60,
            heartbeat_timeout_seconds=2 * config.heartbeat_timeout + 10,
            shutdown_timeout_seconds=config.heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        key = "port" if config.kind == "auto" else "coordinator"
        raise UserError(
            f"process {place.process_id} of {place.num_processes} cannot join at {place.coordinator}: "
            f"{str(error).splitlines()[0]}; set distributed.{key}"
        ) from error
    finally:
        arrived.set()
    client = _client()
    watch = Watch(client, place, config.heartbeat_timeout)
    _here = _Joined(place, client, [], watch)
    watch.hosts += gather("hosts", socket.gethostname())
    watch.start()
    atexit.register(_end_at_once)
    if not is_main():  # process 0 alone speaks; errors of others go to stderr
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    return _here


def _place(config: ClusterConfig | ExplicitConfig) -> Place:
    if isinstance(config, ExplicitConfig):
        return Place(
            "explicit", config.coordinator, config.num_processes, config.process_id, config.local_device_ids
        )
    found = find_place(os.environ, config.port)
    if config.local_device_ids is not None:
        found = found._replace(local_device_ids=config.local_device_ids)
    return found


def _client() -> Any:
    """jax's client of its coordination service, which has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def _around_proxies(place: Place) -> None:
    """The processes speak to each other directly: gRPC would take the proxies of the environment."""
    import jax

    host = place.coordinator.rpartition(":")[0].strip("[]")
    name = "no_grpc_proxy"  # as gRPC has it, in small letters
    known = os.environ.get(name) or os.environ.get("no_proxy", "")
    os.environ[name] = ",".join(filter(None, [known, host]))
    jax.config.update("jax_check_proxy_envs", False)


def _too_late(place: Place, seconds: int, arrived: threading.Event) -> None:
    """Ends this process in one line where not all have arrived in time."""
    if arrived.wait(seconds):
        return
    who = "process 0 or another" if place.process_id else "not all"
    verb = "has not" if place.process_id else "have"
    what = f"{who} of the {place.num_processes} processes {verb} arrived at {place.coordinator}"
    say(place, f"{what} within {seconds} seconds", "start all of them, or raise distributed.start_timeout")
    os._exit(2)


def _end_at_once() -> None:
    """Where this process has told its end: jax would wait for the others, which are ending."""
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
