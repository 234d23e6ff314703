"""Ctrl-C and SIGTERM, where Python runs, where it does not, and where something can be saved first."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.app import interrupts
from jaxlab.app.interrupts import Terminated, save_first

STUCK = """
import ctypes, sys
from jaxlab.app.cli import run_command_line
from jaxlab.app.registry import Registry, Task
import types, dataclasses

@dataclasses.dataclass(frozen=True)
class Arguments:
    pass

def run(arguments):  # as a compilation: a call that no signal ends
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    print("begun", flush=True)
    libc.pthread_mutex_lock(mutex)

module = types.ModuleType("stuck")
module.run, module.Arguments = run, Arguments
sys.modules["stuck"] = module
Arguments.__module__ = "stuck"
sys.exit(run_command_line(["stuck"], Registry([Task("stuck", "stuck", "never ends", "arguments")])))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_call_that_python_cannot_leave(number: signal.Signals, word: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.strip() == f"{word}; a run is taken up again by the same command"


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_what_can_be_saved_is_saved_first_and_a_second_signal_stops(
    number: signal.Signals, kind: type[KeyboardInterrupt], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with interrupts.prompt():
        with pytest.raises(kind, match="step 3 is saved") as raised:
            saves_first(number)
        assert interrupts.say(raised.value) == 128 + number
        with pytest.raises(kind):
            is_sent(number, number, armed=True)
        with pytest.raises(kind):
            is_sent(number, armed=False)
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert "step 3 is saved; a run is taken up again by the same command" in said


def saves_first(number: signal.Signals) -> None:
    with save_first() as stop:
        stop.armed = True
        signal.raise_signal(number)
        assert stop.asked == number
        stop.end("step 3 is saved")


def is_sent(*numbers: signal.Signals, armed: bool) -> None:
    with save_first() as stop:
        stop.armed = armed
        for number in numbers:
            signal.raise_signal(number)
