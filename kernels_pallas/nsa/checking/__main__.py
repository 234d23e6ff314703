"""Checks the Hopper kernels on this GPU and writes the record that lets calls without a name take them."""

import argparse
import collections
import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.nsa import records
from kernels_pallas.nsa.checking import CASES, CheckCase, Prepared, also, prepare, record_of
from kernels_pallas.nsa.checking.cases import Part
from kernels_pallas.nsa.checking.recording import rights
from kernels_pallas.target import is_hopper

AHEAD = 4
"""Checks that compile while one runs; each holds gigabytes."""


def prepared(
    work: list[tuple[CheckCase, Part]], pool: ThreadPoolExecutor
) -> Iterator[tuple[CheckCase, Part, "Future[Prepared]"]]:
    """The checks in their order, the next few of them under way."""
    left, waiting = iter(work), collections.deque[tuple[CheckCase, Part, "Future[Prepared]"]]()
    while True:
        for case, part in itertools.islice(left, AHEAD - len(waiting)):
            waiting.append((case, part, pool.submit(prepare, case, part)))
        if not waiting:
            return
        yield waiting.popleft()


def main(arguments: list[str] | None = None) -> int:
    """0: all is right, 1: something is not, 2: nothing could be checked."""
    parser = argparse.ArgumentParser(prog=records.HOW, description=__doc__)
    parser.add_argument("--record", type=Path, help="file to write; default: in the user's cache")
    parser.add_argument("--also", nargs="*", default=[], metavar="HEADS/KV_HEADS,KEY_DIM/VALUE_DIM,DTYPE")
    parser.add_argument("--only-also", action="store_true", help="not what is checked by default")
    options = parser.parse_args(arguments)
    try:
        more = [case for text in options.also for case in also(text)]
    except ValueError as error:
        print(f"--also: {error}", file=sys.stderr)
        return 2
    if not is_hopper():
        print("the default device is no Hopper GPU: there is nothing to check here", file=sys.stderr)
        return 2
    kind = jax.devices()[0].device_kind
    path = options.record or records.cache_folder() / records.file_name(kind)
    older = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            older = records.read(path)
    except ValueError as error:
        if options.record:
            print(f"--record {error}; it stays as it is: name another file", file=sys.stderr)
            return 2
        print(f"{error}; it is made anew", file=sys.stderr)
    except OSError as error:
        print(f"--record {path}: {error.strerror}", file=sys.stderr)
        return 2
    cases: list[CheckCase] = [*(() if options.only_also else CASES), *more]
    parts: tuple[Part, ...] = ("whole", "decode")
    work = [(case, part) for case in cases for part in parts]
    results: list[dict[records.Key, bool]] = []
    failures: list[tuple[CheckCase, str]] = []
    facts: list[dict[str, Any]] = []
    with ThreadPoolExecutor(AHEAD) as pool:
        for case, part, future in prepared(work, pool):
            try:
                check = future.result()
                findings = check.run()
            except Exception as error:
                print(f"FAILED {case.label}, {part}: {type(error).__name__}: {str(error)[:300]}")
                failures.append((case, part))
                facts.append({"case": case.label, "part": part, "error": str(error)[:300]})
                continue
            right = rights(part, check.keys, {f.what: f.right for f in findings})
            results.append(right)
            wrong = [f for f in findings if not f.right]
            worst = max(f.error for f in findings)
            facts.append({"case": case.label, "part": part, "worst_error": worst, "right": not wrong})
            print(f"{'wrong' if wrong else 'right'}  {case.label}, {part}: largest error {worst:.1e}")
            for finding in wrong:
                print(f"       {finding.what}: {finding.detail}")
    record = record_of(kind, results, failures, {}, {"checks": facts})
    record.merged(older).write(path)
    good = sum(record.right.values())
    print(f"{good} of {len(record.right)} kernels are right; recorded in {path}")
    return 0 if good == len(record.right) and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
