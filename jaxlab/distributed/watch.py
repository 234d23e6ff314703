"""Whether the other processes live: each gives a sign through the coordination service, and none waits long
for one that is gone.

jax would end a process whose peer is gone by abort() with a page of C++; so its limits are set behind those
here. Where process 0 dies, and with it the service, jax is first: then the last line is still this module's.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from jaxlab.distributed.environment import Place

_ALIVE, _ENDED = "jaxlab/alive/", "jaxlab/ended/"
"""Folders of the store: a sign of each process by its number, and what ended the first one that did."""
_OF_OTHERS = ("Gloo", "gloo", "NCCL", "nccl", "UNAVAILABLE", "coordination service", "Connection")
AGAIN = "the same command goes on from the newest checkpoint"


def say(place: Place, *said: str) -> None:
    """An error line on stderr, with the number of the process where it is not 0."""
    who = f"process {place.process_id}: " if place.process_id else ""
    print(f"\nerror: {who}{'; '.join(said)}", file=sys.stderr, flush=True)


def _set_handler(handler: Any) -> None:
    """C's own handler of SIGABRT; None: the system's. Python's would only be called after it."""
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype = ctypes.c_void_p
    set_handler(int(signal.SIGABRT), handler)


class Watch:
    """Gives signs of this process, and ends it where another is gone."""

    def __init__(self, client: Any, place: Place, timeout: float) -> None:
        """Starts nothing.

        Args:
          timeout: seconds without a sign after which a process is gone.
        """
        self.client, self.place, self.timeout = client, place, timeout
        self.hosts: list[str] = []
        """Of each process."""
        self.interval = min(max(timeout / 10, 0.1), 5.0)
        self._answered = time.monotonic()
        self._stopped = threading.Event()
        self._on_abort: Any = None

    def start(self) -> None:
        self._answered = time.monotonic()
        for target in (self._give_signs, self._judge_process_0):
            threading.Thread(target=target, daemon=True, name="watch").start()
        # A thread of jax calls abort(), and this in it.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        _set_handler(self._on_abort)

    def stop(self) -> None:
        """At the end of the work, where all are at it."""
        self._stopped.set()
        _set_handler(None)

    def describe(self, process: int) -> str:
        """A process and where it runs."""
        return f"process {process} on {self.hosts[process]}" if self.hosts else f"process {process}"

    def tell(self, said: str, status: int) -> None:
        """Tells the others that this process ends; process 0, whose end ends the service, waits until they
        have read it."""
        me, main = self.place.process_id, self.place.process_id == 0
        with contextlib.suppress(Exception):  # nobody is left to tell
            self.client.key_value_set(f"{_ENDED}first", json.dumps([me, said, status]))
        self._stopped.set()
        end = time.monotonic() + 4 * self.interval + 2
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{_ALIVE}{me}", "ended", True)
            while main and time.monotonic() < end and not self._all_have_read():
                time.sleep(0.05)

    def _all_have_read(self) -> bool:
        return all(sign == "ended" for _, sign in self.client.key_value_dir_get(_ALIVE))

    def is_of_others(self, error: BaseException) -> bool:
        """Whether an error may come from the end of another process."""
        return any(word in str(error) for word in _OF_OTHERS)

    def wait_for_end(self) -> None:
        """Gives the watch time to find out which process is gone; then it ends this one."""
        self._stopped.wait(self.timeout + 4 * self.interval)

    def _give_signs(self) -> None:
        me, count = self.place.process_id, 0
        seen: dict[str, tuple[str, float]] = {}
        while not self._stopped.wait(self.interval):
            count += 1
            try:
                self.client.key_value_set(f"{_ALIVE}{me}", str(count), True)
                ended = next((text for _, text in self.client.key_value_dir_get(_ENDED)), None)
                if me == 0 and ended is None:
                    ended = self._find_gone(seen)
            except Exception:  # process 0 does not answer: the other thread counts the seconds
                continue
            self._answered = time.monotonic()
            if ended is not None and not self._stopped.is_set():
                self._end(*json.loads(ended))

    def _find_gone(self, seen: dict[str, tuple[str, float]]) -> str | None:
        """What process 0 tells all of a process without a sign in time."""
        now = time.monotonic()
        signs = dict(self.client.key_value_dir_get(_ALIVE))
        for process in range(1, self.place.num_processes):
            key = f"{_ALIVE}{process}"
            sign = signs.get(key, "")
            if key not in seen or seen[key][0] != sign:
                seen[key] = (sign, now)
            elif now - seen[key][1] > self.timeout:
                said = f"no sign of it for {self.timeout:g} seconds: it was killed, or its link is cut"
                ended = json.dumps([process, said, 1])
                self.client.key_value_set(f"{_ENDED}first", ended)
                return ended
        return None

    def _judge_process_0(self) -> None:
        while not self._stopped.wait(self.interval):
            silent = time.monotonic() - self._answered
            if self.place.process_id and silent > self.timeout:
                said = f"no answer from it for {self.timeout:g} seconds: it was killed, or the link is cut"
                self._end(0, said, 1)

    def _end(self, process: int, said: str, status: int) -> NoReturn:
        """Ends this process because of another one."""
        me = self.place.process_id
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{_ALIVE}{me}", "ended", True)
        if process == me:
            said = f"process 0 has given this process up: {said}"
        else:
            said = f"{self.describe(process)} has ended: {said}"
        say(self.place, said, "so this one ends", AGAIN)
        if me == 0:  # with the service: the others read what has happened first
            end = time.monotonic() + 4 * self.interval + 2
            others = {f"{_ALIVE}{other}" for other in range(1, self.place.num_processes) if other != process}
            with contextlib.suppress(Exception):
                while time.monotonic() < end:
                    signs = dict(self.client.key_value_dir_get(_ALIVE))
                    if all(signs.get(other) == "ended" for other in others):
                        break
                    time.sleep(0.05)
        sys.stdout.flush()
        os._exit(status or 1)

    def _aborted(self, number: int) -> None:
        """In a thread that has called abort(), which has said why above: who is gone."""
        host, _, port = self.place.coordinator.rpartition(":")
        gone = False
        if self.place.process_id:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            except OSError:
                gone = True
        what = f"{self.describe(0)} is gone" if gone else "jax has ended this process, for the reason above"
        say(self.place, what, AGAIN)
        os._exit(1)
