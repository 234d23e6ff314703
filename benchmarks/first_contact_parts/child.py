"""One part of a step, in a process of its own: child.py MODULE PART OPTIONS EVENTS [ITEM TO LEAVE OUT ...].

Appends what happens to the file EVENTS, a JSON object a line, so that nothing is lost however it ends.
"""

import fcntl
import importlib
import json
import os
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from first_contact_parts import stand_in  # noqa: E402
from first_contact_parts.steps import Item  # noqa: E402

POISONED = 75
"""Exit status of a process whose GPU answers no more: the rest needs a new one."""


def line_of(error: BaseException) -> str:
    """One line of it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def is_poison(error: BaseException) -> bool:
    """Whether the device may be lost to this process: after an illegal address every call fails."""
    text, kind = str(error), type(error).__name__
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return False
    return kind in ("JaxRuntimeError", "XlaRuntimeError", "AcceleratorError") or "CUDA" in text


class Events:
    """The file that the parent reads."""

    def __init__(self, path: str):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, event: str, **more: Any) -> None:
        # One system call: whole even if the next moment ends the process, or another thread writes too.
        os.write(self.file, (json.dumps({"event": event, **more}, default=str) + "\n").encode())


class Turn:
    """Of the processes of one step, which compile at the same time and run one after the other: times are
    taken when all have compiled, or have had `patience_s` for it."""

    def __init__(self, path: str, patience_s: float):
        self.patience_s = patience_s
        self.compiling, self.running = (os.open(f"{path}.{n}", os.O_RDWR | os.O_CREAT) for n in ("a", "b"))
        fcntl.flock(self.compiling, fcntl.LOCK_SH)

    def wait(self) -> None:
        """Until the others have compiled, and then until nobody runs."""
        fcntl.flock(self.compiling, fcntl.LOCK_UN)
        end = time.monotonic() + self.patience_s
        while time.monotonic() < end:
            try:
                fcntl.flock(self.compiling, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        fcntl.flock(self.compiling, fcntl.LOCK_UN)
        fcntl.flock(self.running, fcntl.LOCK_EX)  # until this process ends


def run(items: list[Item], tell: Events, threads: int, turn: Turn | None) -> bool:
    """All items; False if the device was lost on the way. In their turn, or each when it is compiled."""

    def prepare(item: Item) -> Any:
        tell("preparing", item=item.name)
        built = item.prepare()
        tell("prepared", item=item.name)
        return built

    def finish(item: Item, future: "Future[Any]") -> bool:
        tell("begin", item=item.name)
        lost = False
        try:
            rows = item.run(future.result())
        except Exception as error:
            traceback.print_exc()
            rows = [{"name": item.name, "failed": line_of(error)}]
            lost = is_poison(error)
        for row in rows:
            tell("row", row={"item": item.name, **row})
        tell("end", item=item.name)
        return not lost

    if threads == 1:
        if turn is not None:
            turn.wait()
        for item in items:
            future: Future[Any] = Future()
            try:
                future.set_result(prepare(item))
            except Exception as error:
                future.set_exception(error)
            if not finish(item, future):
                return False
        return True
    pool = ThreadPoolExecutor(threads)
    futures = {pool.submit(prepare, item): item for item in items}
    left = set(futures)
    if turn is not None:
        wait(futures)
        turn.wait()
    while left:
        done = [f for f in futures if f in left and f.done()]  # in the order of the items
        if not done:
            wait(left, return_when=FIRST_COMPLETED)
            continue
        left.discard(done[0])
        if not finish(futures[done[0]], done[0]):
            return False
    return True


def main(module: str, part: str, options_text: str, events: str, *left_out: str) -> int:
    stand_in.put_in()
    options, tell = json.loads(options_text), Events(events)
    items = importlib.import_module(module).items(options, part)
    items = [item for item in items if item.name not in left_out]
    tell("items", items=[item.name for item in items])
    turn = Turn(options["turn"], options["patience_s"]) if options["turn"] else None
    whole = run(items, tell, options["threads"], turn)
    if whole:
        tell("done")
    return 0 if whole else POISONED


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that still compile, or a device that answers no more, must not keep the process.
    os._exit(status)
