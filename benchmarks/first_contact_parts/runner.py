"""Runs steps one after the other within a budget, the parts of one at the same time, each in a process of its
own that may hang, crash or take too long without harm to the others. Standard library only.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from first_contact_parts.steps import Row, Step

CHILD = Path(__file__).with_name("child.py")
POISONED = 75
"""Exit status of a child whose GPU answers no more."""
POLL_S, KEEP_LOG = 0.05, 100_000
RESERVE_S = 3.0
"""For the summary at the end."""
LEAST_RESTART_S = 4.0


@dataclasses.dataclass
class Outcome:
    """Of a step."""

    step: str
    rows: list[Row]
    seconds: float = 0.0
    dropped: str = ""
    """Why it was not begun."""

    @property
    def wrong(self) -> list[Row]:
        """What was not right, failed or was cut off."""
        return [r for r in self.rows if r.get("right") is False or "failed" in r or "cut" in r]

    @property
    def broken(self) -> bool:
        """Whether something is known to be wrong, or nothing is known; what was cut off is not known."""
        known = [row.get("right", "failed" not in row) for row in self.rows if "cut" not in row]
        return not known or not all(known)

    @property
    def all_right(self) -> bool:
        return not self.dropped and not self.wrong and bool(self.rows)


class Process:
    """One part of a step: started anew without what killed it, until nothing is left."""

    def __init__(self, step: Step, part: str, options: dict[str, Any], folder: Path):
        turn = str(folder / step.name) if step.in_turn else ""
        self.step, self.part = step, part
        self.options = options | {"turn": turn, "patience_s": step.limit_s / 2}
        name = re.sub(r"[^a-z0-9]+", "_", f"{step.name} {part}".lower()).strip("_")
        self.events, self.log = folder / f"{name}.events", folder / f"{name}.log"
        self.rows: list[Row] = []
        self.items: list[str] | None = None
        self.ended: list[str] = []
        self.running = ""
        """The item that runs."""
        self.done = False
        self._at, self._prepared, self._preparing = 0, set[str](), set[str]()
        self.start()

    def start(self) -> None:
        self._preparing, self.running, self.last = set(), "", time.monotonic()
        arguments = [self.step.module, self.part, json.dumps(self.options), str(self.events), *self.ended]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILD), *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | self.options["env"],
            )

    def kill(self) -> None:
        """With all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def poll(self, left_s: float) -> None:
        """Look what happened; start anew where that is the way."""
        ended = self.process.poll() is not None
        self._read()
        if self.done:
            return
        if ended:
            self._after(f"ended by {_how(self.process.returncode)}{self._last_line()}", left_s)
        elif self.running and time.monotonic() - self.last > self.step.item_limit_s:
            self.kill()
            self._read()
            self._after(f"no answer for {self.step.item_limit_s:g} s: killed", left_s, killed=True)

    def _after(self, why: str, left_s: float, killed: bool = False) -> None:
        """It is gone: blame what did it, and start anew without that."""
        unsure = bool(self._preparing) or (not self.running and self.items is not None)
        blamed = [self.running] if self.running else sorted(self._preparing) or [""]
        if self.process.returncode == POISONED and not self.running:
            blamed = []  # its item has ended and is told
        elif not killed and unsure and self.options["threads"] > 1:
            # It may have been what ran or any that was compiled: one at a time, it shows.
            self.options, blamed = self.options | {"threads": 1}, []
        for item in blamed:
            self._fail(item or self.part or self.step.name, why, item)
        everything = self.items is None or set(self.items) <= set(self.ended)
        if everything or blamed == [""]:
            for item in set(self.items or ()) - set(self.ended):
                self._fail(item, why, item)
            self.done = True
        elif left_s < LEAST_RESTART_S:
            self.cut("no time to start anew after a failure")
        else:
            self.start()

    def _fail(self, name: str, why: str, item: str) -> None:
        self.rows.append({"item": item, "name": name, "part": self.part, "failed": why})
        if item:
            self.ended.append(item)

    def cut(self, why: str) -> None:
        """End it, and say what is missing."""
        self.kill()
        self._read()
        if self.done:
            return
        left = [item for item in self.items or [self.part or self.step.name] if item not in self.ended]
        self.rows += [{"item": item, "name": item, "part": self.part, "cut": why} for item in left]
        self.done = True

    def _read(self) -> None:
        if not self.events.exists():
            return
        with self.events.open("rb") as file:
            file.seek(self._at)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            self._heed(json.loads(line))

    def _heed(self, event: dict[str, Any]) -> None:
        self.last, item = time.monotonic(), event.get("item", "")
        kind = event["event"]
        if kind == "items" and self.items is None:
            self.items = event["items"]
        elif kind == "preparing":
            self._preparing.add(item)
        elif kind == "prepared":
            self._preparing.discard(item)
        elif kind == "begin":
            self.running = item
            self._preparing.discard(item)
        elif kind == "row":
            self.rows.append({"part": self.part, **event["row"]})
        elif kind == "end":
            self.ended.append(item)
            self.running = ""
        elif kind == "done":
            self.done = True

    def _last_line(self) -> str:
        lines = [line for line in self.log_text().splitlines() if line.strip()]
        return f"; last line: {lines[-1][:200]}" if lines else ""

    def log_text(self) -> str:
        """The end of what it printed."""
        return self.log.read_bytes()[-KEEP_LOG:].decode(errors="replace") if self.log.exists() else ""


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "?"
    return f"signal {-code} ({name}{', out of memory perhaps' if -code == signal.SIGKILL else ''})"


def run_step(
    step: Step, options: dict[str, Any], folder: Path, limit_s: float, told: Callable[[list[Row]], None]
) -> tuple[list[Row], str]:
    """Rows of all parts, and what they printed. `told` gets the rows so far whenever there are more."""
    deadline = time.monotonic() + limit_s
    waiting, processes = list(step.parts), list[Process]()
    count = 0
    try:
        while True:
            running = [p for p in processes if not p.done]
            while waiting and len(running) < options["processes"]:
                running.append(Process(step, waiting.pop(0), options, folder))
                processes.append(running[-1])
            left = deadline - time.monotonic()
            for process in running:
                process.poll(left)
                if left <= 0 and not process.done:
                    process.cut(f"the step's time of {limit_s:.0f} s was over")
            rows = [row for process in processes for row in process.rows]
            if len(rows) != count:
                count = len(rows)
                told(rows)
            if left <= 0:
                late = [{"name": part, "part": part, "cut": "never begun: no time"} for part in waiting]
                rows += late
                break
            if not waiting and all(p.done for p in processes):
                break
            time.sleep(POLL_S)
    finally:
        for process in processes:
            process.kill()
    log = "".join(f"--- {step.name} {p.part}\n{p.log_text()}\n" for p in processes)
    return rows, log


def run(
    steps: Sequence[Step],
    options: dict[str, Any],
    folder: Path,
    budget_s: float,
    started: float,
    told: Callable[[list[Outcome], str], None],
    heed_needs: bool = True,
) -> list[Outcome]:
    """All steps in their order; `told` gets the outcomes so far, and what the newest step printed."""
    outcomes: list[Outcome] = []
    for step in steps:
        left = budget_s - (time.monotonic() - started) - RESERVE_S
        broken = [o.step for o in outcomes if o.step in step.needs and o.broken]
        stop = [row["stop"] for o in outcomes for row in o.rows if "stop" in row]
        if stop:
            outcome = Outcome(step.name, [], dropped=stop[0])
        elif broken and heed_needs:
            outcome = Outcome(step.name, [], dropped=f"{', '.join(broken)} found something wrong, or nothing")
        elif left < step.least_s:
            outcome = Outcome(step.name, [], dropped=f"{max(0.0, left):.0f} s of {budget_s:g} s were left")
        else:
            outcome = Outcome(step.name, [])
            outcomes.append(outcome)
            begun = time.monotonic()

            def so_far(rows: list[Row], outcome: Outcome = outcome, begun: float = begun) -> None:
                outcome.rows, outcome.seconds = rows, time.monotonic() - begun
                told(outcomes, "")

            outcome.rows, log = run_step(step, options, folder, min(step.limit_s, left), so_far)
            outcome.seconds = time.monotonic() - begun
            told(outcomes, log)
            continue
        outcomes.append(outcome)
        told(outcomes, "")
    return outcomes
