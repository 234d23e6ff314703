"""Compiled programs are let go before the system's limit on memory maps.

jax keeps every program that it has compiled. On a CPU each is mapped into memory in about four pieces, Linux
allows a process 65,530 of these (vm.max_map_count), and beyond that XLA ends the process by a segmentation
fault while it compiles. Work that compiles ever new programs calls `let_go_of_programs` between its parts.
"""

import gc
from pathlib import Path

import jax

_MAPS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_SHARE = 0.4
"""Of the limit, that programs may take with all else that a process maps."""
_EVERY = 64
"""Programs compiled between two looks."""
_COMPILED = "/jax/core/compile/backend_compile_duration"

_compiled = _EVERY


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _compiled
    _compiled += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_count)


def let_go_of_programs(most: int | None = None) -> bool:
    """Lets all compiled programs go if they are many; those that are used again are compiled again, or come
    from the cache on the disk. Costs nothing where little was compiled since the last call.

    Args:
      most: memory maps that this process may have; None: a part of the system's limit.

    Returns:
      Whether they were.
    """
    global _compiled
    if _compiled < _EVERY:
        return False
    _compiled = 0
    number, limit = memory_maps(), _limit() if most is None else most
    if number is None or limit is None or number <= limit:
        return False
    jax.clear_caches()
    gc.collect()
    return True


def memory_maps() -> int | None:
    """How many pieces of memory this process has mapped; None: this system does not tell."""
    try:
        with _MAPS.open("rb") as lines:
            return sum(1 for _ in lines)
    except OSError:
        return None


def _limit() -> int | None:
    try:
        return int(_SHARE * int(_LIMIT.read_text()))
    except (OSError, ValueError):
        return None
