"""How fast steps are."""

import time


class Stopwatch:
    """Seconds per step over stretches of steps in which nothing else happens."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new stretch; steps since the last reading are not measured."""
        self._since, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        self._steps += 1

    def read(self) -> float | None:
        """Seconds per step of the stretch that ends here, None if it is empty; begins the next one."""
        if not self._steps:
            return None
        seconds = (time.perf_counter() - self._since) / self._steps
        self.restart()
        return seconds
