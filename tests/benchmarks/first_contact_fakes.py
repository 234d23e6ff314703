"""Steps of a script that runs on no GPU: what a device may do to it, in miniature."""

import ctypes
import os
import signal
import tempfile
import time
from pathlib import Path

from first_contact_parts.steps import Item


def _row(name, **more):
    return [{"name": name, "right": True, "error": 0.0, **more}]


def items(options, part):
    def hang(_):
        time.sleep(3600)

    def crash(_=None):
        ctypes.string_at(0)

    def memory(_):
        raise MemoryError("out of memory")

    def killed(_):
        os.kill(os.getpid(), signal.SIGKILL)

    was_lost = Path(tempfile.gettempdir()) / f"lost_{os.getppid()}"  # of the script whose steps these are

    def lost(_):
        was_lost.touch()
        error = type("JaxRuntimeError", (RuntimeError,), {})
        raise error(f"INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS in {os.getpid()}")

    def after_lost():
        for _ in range(400):
            if was_lost.exists():
                return
            time.sleep(0.05)
        raise TimeoutError("the device was never lost")

    def bad_compile():
        raise ValueError("no such layout")

    def wrong(_):
        return [{"name": "wrong", "right": False, "error": 0.5, "detail": "first at [3]: 1, float32 gives 2"}]

    def process(_):
        return _row("process", fact={f"process of {part}": os.getpid()})

    if part.startswith("turn"):

        def prepare():
            time.sleep(0.3)
            return time.monotonic()

        def take(prepared):
            begin = time.monotonic()
            time.sleep(0.1)
            return _row(part, prepared=prepared, begin=begin, end=time.monotonic())

        return [Item(part, prepare, take)]
    if part == "import":
        raise ImportError("no module of that name")
    if part == "slow":
        return [Item("slow", lambda: time.sleep(3600), process), Item("fine", lambda: None, process)]
    if part == "stop":
        return [Item("stop", lambda: None, lambda _: [{"name": "x", "failed": "no GPU", "stop": "no GPU"}])]
    bad = {
        "hang": (hang,),
        "crash": (crash,),
        "memory": (memory,),
        "killed": (killed,),
        "lost": (lost,),
        "wrong": (wrong,),
        "bad compile": (process, bad_compile),
        "crashing compile": (process, crash),
        "fine": (process,),
    }
    run, *prepare = bad[part]
    middle = Item(part, *(prepare or [lambda: None]), run)
    last = Item("after", after_lost if part == "lost" else lambda: None, process)
    return [Item("before", lambda: None, process), middle, last]
