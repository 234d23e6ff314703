"""Ctrl-C and SIGTERM: they stop work at once, unless something can be saved first.

Python handles a signal only between two of its own steps, and a compilation is one long step. So a thread
reads the signals as they arrive, and ends the process where the main thread does not get to it.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from jaxlab import distributed

PATIENCE = 2.0
"""Seconds that the main thread has to get to a signal."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever keeps something after an interrupt keeps it then, too."""


class Stop:
    """Whether a run should save and end. `armed` is set by it once there is something to save."""

    def __init__(self) -> None:
        self.armed = False
        self.asked: int | None = None

    def end(self, said: str) -> NoReturn:
        """Ends the run as the signal would have, with a word on what is saved.

        Raises:
          KeyboardInterrupt: in any case.
        """
        raise (Terminated if self.asked == signal.SIGTERM else KeyboardInterrupt)(said)


_stop: Stop | None = None
"""That of the run under way."""
_last_handled = -math.inf
"""When the main thread last got to a signal, on time.monotonic's clock."""


def say(error: KeyboardInterrupt) -> int:
    """Says on stderr what has ended the work; returns the exit status that stands for it."""
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    _say(number, *map(str, error.args))
    return 128 + number


def _say(number: int, *said: str) -> None:
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    word = word if distributed.is_main() else f"process {distributed.process_index()}: {word}"
    what = "; ".join([word, *said, "a run is taken up again by the same command"])
    print(what, file=sys.stderr, flush=True)


@contextlib.contextmanager
def save_first() -> Iterator[Stop]:
    """Lets the block end by itself after a signal: `asked` of what this gives tells it to.

    A second signal stops at once.
    """
    global _stop
    before, _stop = _stop, Stop()
    try:
        with _handlers():
            yield _stop
    finally:
        _stop = before


@contextlib.contextmanager
def prompt() -> Iterator[None]:
    """Signals stop what the block does within seconds, also where it compiles."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals")
    watcher.start()
    try:
        with _handlers():
            yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # which ends the thread
        watcher.join()
        reader.close()


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: object) -> None:
    global _last_handled
    _last_handled = time.monotonic()
    if _stop is not None and _stop.armed and _stop.asked is None:
        _stop.asked = signal.Signals(number)
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _watch(reader: socket.socket) -> None:
    """Reads signals as they arrive, until the other end is closed."""
    told: Stop | None = None
    while raw := reader.recv(1):
        number, now = raw[0], time.monotonic()
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        if _stop is not None and _stop.armed and _stop is not told:
            told = _stop
            print("\nthis step is finished and saved first; once more stops at once", file=sys.stderr)
            continue
        while time.monotonic() < now + PATIENCE and _last_handled < now - 1:
            time.sleep(0.05)
        if _last_handled < now - 1:
            print(file=sys.stderr)
            _say(number)
            distributed.tell_end("stopped by a signal", 128 + number)
            os._exit(128 + number)
