"""How fast steps are."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Seconds per step over stretches of steps, without the pauses between them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new stretch; steps since the last reading are not measured."""
        self._since, self._seconds, self._steps = time.perf_counter(), 0.0, 0

    def step(self) -> None:
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block is no step's."""
        self._seconds += time.perf_counter() - self._since
        self._since = float("inf")
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def read(self) -> float | None:
        """Seconds per step of the stretch that ends here, None if it is empty; begins the next one."""
        if not self._steps:
            return None
        seconds = (self._seconds + max(time.perf_counter() - self._since, 0.0)) / self._steps
        self.restart()
        return seconds
