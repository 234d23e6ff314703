"""The first nine minutes on a GPU: is everything right there, and how fast is it. One command:

    python benchmarks/first_contact.py --out first_contact
    python benchmarks/first_contact.py --out first_contact --peers PEERS   # peers' Triton kernels beside ours
    python benchmarks/first_contact.py --out DRY --tiny                    # no GPU: in Pallas' interpreter

Needs numpy and jax with CUDA, and uses torch where it is. Steps run one after the other, each in processes of
its own with a limit of its own; what hangs, crashes or fails is told, and the next step begins. What does not
fit into `--budget` seconds is dropped, the last steps first. Files in the folder, written anew after
whatever is found:

    summary.md    to be read in a minute
    results.json  everything
    record.json   which kernels were right here: for kernels_pallas/nsa/records/ or $JAXLAB_KERNEL_RECORD
    log.txt       what the steps printed

Exit status: 0, all that ran was right and nothing was dropped; 1, otherwise; 2, wrong arguments.
docs/first_contact.md says how to read it.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from first_contact_parts import report, runner
from first_contact_parts.steps import Step

CHECKED = (
    "paper | bfloat16 | 16 heads a group | 192/128",
    "16 heads a group | bfloat16 | 16 heads a group | 128/128",
    "packed, NaN in the padding | bfloat16 | 16 heads a group | 192/128",
    "8 heads a group | bfloat16 | 8 heads a group | 128/128",
    "4 heads a group | bfloat16 | 4 heads a group | 128/128",
    "1 head a group | bfloat16 | 1 heads a group | 128/128",
    "64 heads a group | bfloat16 | 64 heads a group | 128/128",
    "blocks of 128 | bfloat16 | 16 heads a group | 128/128",
    "half | float16 | 16 heads a group | 192/128",
    "half, equal head dims | float16 | 16 heads a group | 128/128",
)
"""Labels of `kernels_pallas.nsa.checking.CASES`, without their tokens: this process imports no jax."""

TIMED = tuple(
    f"{dims}, {length}" for length in (65536, 8192, 32768, 16384) for dims in ("192/128", "128/128")
)
DECODED = ("batch 1", "batch 8", "batch 64", "choice")

STEPS = (
    Step("ceilings", "first_contact_parts.ceilings", 20, 15),
    Step(
        "kernels",
        "first_contact_parts.kernels",
        90,
        20,
        parts=tuple(
            f"{size}, {way}" for way in ("registers", "shared memory") for size in ("by queries", "by blocks")
        ),
    ),
    Step(
        "correctness",
        "first_contact_parts.correctness",
        150,
        40,
        parts=tuple(f"{about} | {tokens} tokens" for about in CHECKED for tokens in (4096, 4097)),
    ),
    Step("times", "first_contact_parts.times", 120, 30, TIMED[:4], ("correctness",), in_turn=True),
    Step("peers", "first_contact_parts.peers", 90, 60, ("flash_nsa", "fla"), in_turn=True),
    Step("decode", "first_contact_parts.decode", 40, 20, DECODED, ("correctness",), in_turn=True),
    Step("crossover", "first_contact_parts.times", 60, 30, TIMED[4:], ("correctness",), in_turn=True),
    Step(
        "smoke",
        "first_contact_parts.smoke",
        60,
        60,
        parts=("train", "generate", "merge", "search", "flows"),
        least_s=20,
    ),
)


INTERPRETER_THREADS = 32
TINY_PARTS: dict[str, tuple[str, ...]] = {
    "kernels": ("by queries, registers",),
    "correctness": tuple(f"{CHECKED[0]} | {tokens} tokens" for tokens in (4096, 4097)),
    "times": TIMED[:1],
    "decode": ("batch 1", "choice"),
    "crossover": TIMED[4:5],
}
"""Of a dry run, where the parts of a step are the same or take minutes each."""
PATIENCE: dict[str, Any] = {"limit_s": 1500.0, "item_limit_s": 900.0}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; made if it is not there"
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (540)")
    parser.add_argument(
        "--peers", type=Path, help="folder with packages flash_nsa and fla, or with their checkouts"
    )
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], help="these steps alone")
    parser.add_argument("--time-anyway", action="store_true", help="times even of what is not right")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, interpreted without a GPU: a dry run"
    )
    parser.add_argument("--cache", type=Path, help="folder of the compile cache; default: one for this run")
    parser.add_argument("--no-cache", action="store_true", help="compile everything anew in each process")
    parser.add_argument("--threads", type=int, default=4, help="that compile, in each process")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of one step at a time")
    parsed = parser.parse_args(arguments)
    if parsed.peers is not None and not parsed.peers.is_dir():
        parser.error(f"--peers {parsed.peers}: there is no such folder")
    if parsed.budget <= 0 or parsed.threads < 1 or parsed.processes < 1:
        parser.error("--budget, --threads and --processes must be above 0")
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {parsed.out}: {error.strerror}")
    if foreign := foreign_file(parsed.out):
        parser.error(f"--out {parsed.out}: {foreign} there is not of this script; name another folder")
    return parsed


FILES = ("results.json", "summary.md", "log.txt", "record.json")


def foreign_file(folder: Path) -> str | None:
    """A file that would be written over though an earlier run did not make it."""
    there = [name for name in FILES if (folder / name).exists()]
    try:
        own = "budget_s" in json.loads((folder / FILES[0]).read_text())
    except (OSError, ValueError, TypeError):
        own = False
    return None if own or not there else there[0]


def environment(a: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Of the steps' processes."""
    cache = (a.cache or folder / "cache").absolute()
    found = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONUNBUFFERED": "1",
    }
    if not a.no_cache:
        found |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    if a.tiny:
        # Interpreted kernels that run at the same time each hold a thread of XLA and wait for others of them:
        # with a thread for each core, two cores come to a standstill.
        found |= {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(INTERPRETER_THREADS)}
    return found


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)


def main(arguments: list[str] | None = None, steps: tuple[Step, ...] = STEPS) -> int:
    a = options_of(arguments)
    started = time.monotonic()
    steps = tuple(step for step in steps if a.only is None or step.name in a.only)
    if a.tiny:  # interpreted, they take long
        fewer = lambda s: tuple(p for p in s.parts if p in TINY_PARTS.get(s.name, s.parts))
        steps = tuple(dataclasses.replace(s, parts=fewer(s), **PATIENCE) for s in steps)
    (a.out / "log.txt").write_text("")
    if any(step.name == "correctness" for step in steps):
        (a.out / "record.json").unlink(missing_ok=True)  # an earlier run's, which this one may contradict
    with tempfile.TemporaryDirectory(prefix="first_contact_", ignore_cleanup_errors=True) as work:
        folder = Path(work)
        options: dict[str, Any] = {
            "tiny": a.tiny,
            "peers": str(a.peers.absolute()) if a.peers else "",
            "threads": a.threads,
            "processes": a.processes,
            "results": str((a.out / "results.json").absolute()),
            "env": environment(a, folder),
        }
        facts = {
            "tiny": a.tiny,
            "budget_s": a.budget,
            "command": [Path(sys.argv[0]).name, *(arguments or sys.argv[1:])],
        }

        def told(outcomes: list[runner.Outcome], log: str) -> None:
            seconds = time.monotonic() - started
            result = report.result(outcomes, facts | {"seconds": seconds})
            write(a.out / "results.json", json.dumps(result, indent=1, default=str) + "\n")
            write(a.out / "summary.md", report.summary(outcomes, seconds, a.budget))
            if (record := report.record(outcomes)) is not None:
                write(a.out / "record.json", json.dumps(record, indent=1) + "\n")
            if log:
                with (a.out / "log.txt").open("a") as file:
                    file.write(log)

        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes end, results stay
        try:
            outcomes = runner.run(steps, options, folder, a.budget, started, told, not a.time_anyway)
        finally:
            signal.signal(signal.SIGTERM, before)
    print((a.out / "summary.md").read_text())
    return 0 if all(outcome.all_right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
