"""Ours and torch's attention in turn, each in its own interpreter: both see the same machine."""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
LONG_S = 10.0
"""A first call of so long counts as a sample: warming up would double what takes minutes."""


class Taken(NamedTuple):
    """Of one call."""

    seconds: float
    cpu_seconds: float | None = None
    """Of the processors, over all threads; what other programs do moves it less."""


class TorchPeer:
    """nsa_torch.py with another Python, asked for one sample after the other."""

    def __init__(self, python: Path, sizes: dict[str, Any]):
        script = Path(__file__).parents[1] / "nsa_torch.py"
        self.process = subprocess.Popen(
            [str(python), str(script), json.dumps(sizes | {"serve": True})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            self.about: Row = self._answer()
        except RuntimeError:
            self.close()
            raise

    def _answer(self) -> Row:
        """What it says next.

        Raises:
            RuntimeError: it ended; with the last line that it wrote.
        """
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            lines = self.process.stderr.read().strip().splitlines() or ["no message"]
            raise RuntimeError(lines[-1][:200])
        answer: Row = json.loads(line)
        return answer

    def sample(self, part: str) -> Taken:
        """One call.

        Raises:
            RuntimeError: it ended.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(part + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return Taken(answer["seconds"], answer.get("cpu_seconds"))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def timed(call: Callable[[], Any]) -> Callable[[], Taken]:
    """Of a call that waits for its result."""

    def run() -> Taken:
        start, processor = time.perf_counter(), time.process_time()
        call()
        return Taken(time.perf_counter() - start, time.process_time() - processor)

    return run


def alternate(
    ours: Callable[[], Taken], theirs: Callable[[], Taken], samples: int, seconds: float
) -> tuple[list[Taken], list[Taken]]:
    """Samples of both, in turn: up to `samples` of each in about `seconds`, at least one. The first call of
    each is left out unless it takes long."""
    first = [ours(), theirs()]
    kept: tuple[list[Taken], list[Taken]] = ([], [])
    for one, samples_of in zip(first, kept, strict=True):
        if one.seconds > LONG_S:
            samples_of.append(one)
    rounds = max(
        0 if all(kept) else 1,
        min(samples, int(seconds / sum(one.seconds for one in first))) - (1 if all(kept) else 0),
    )
    for _ in range(rounds):
        kept[0].append(ours())
        kept[1].append(theirs())
    return kept


def rows(
    name: str,
    ours: dict[str, Callable[[], Any]],
    peer: TorchPeer,
    samples: int,
    seconds: float,
) -> list[Row]:
    """Of both, for every part."""
    found: list[Row] = []
    for part, call in ours.items():
        own, theirs = alternate(timed(call), lambda part=part: peer.sample(part), samples, seconds)
        for who, taken, more in ((name, own, {}), (peer.about["name"], theirs, peer.about)):
            walls = [one.seconds for one in taken]
            processors = [one.cpu_seconds for one in taken if one.cpu_seconds is not None]
            measured: Row = {"median_s": statistics.median(walls), "samples_s": walls, "calls_per_sample": 1}
            if processors:
                measured |= {"median_cpu_s": statistics.median(processors), "samples_cpu_s": processors}
            found.append({**more, "name": who, "part": part, **measured, "in_turn": True})
    return found
