"""How long the way is from the command line to the first step of training: the modules whose code runs,
and the calls that go from one package into another, by `sys.monitoring`.

python benchmarks/entry_path.py configs/quickstart/nsa_full.yaml [--root CHECKOUT] [--out FILE]

`--root` counts another checkout of the project (by its run.py), with the same interpreter.
"""

import argparse
import collections
import contextlib
import inspect
import io
import json
import runpy
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGES = ("jaxlab", "kernels_pallas")


class FirstStep(BaseException):
    """Raised where the first step of training begins: what comes after it is not counted."""


def count_way(root: Path, words: list[str]) -> dict[str, Any]:
    """Runs `run.py words` of the checkout at `root` up to `train_step`, and counts on the way."""
    modules: set[str] = set()
    functions: set[CodeType] = set()
    calls: collections.Counter[str] = collections.Counter()
    total = 0

    def module_of(code: CodeType) -> str | None:
        try:
            parts = Path(code.co_filename).resolve().relative_to(root).with_suffix("").parts
        except ValueError:
            return None
        return ".".join(parts) if parts[0] in PACKAGES else None

    def package_of(module: str) -> str:
        return ".".join(module.split(".")[:2])

    def callers(frame: FrameType | None) -> list[CodeType]:
        found = []
        while frame is not None:
            if module_of(frame.f_code) is not None:
                found.append(frame.f_code)
            frame = frame.f_back
        return found

    def entered(code: CodeType, _offset: int) -> Any:
        nonlocal total
        module = module_of(code)
        if module is None:
            return sys.monitoring.DISABLE
        before = callers(sys._getframe(1).f_back)
        # Bodies of modules and classes are not functions: they, and what they call, are imports.
        if not all(each.co_flags & inspect.CO_OPTIMIZED for each in (code, *before)):
            return None
        modules.add(module)
        functions.add(code)
        total += 1
        above = None if not before else module_of(before[0])
        if above is not None and package_of(above) != package_of(module):
            calls[f"{package_of(above)} -> {package_of(module)}"] += 1
        if code.co_name == "train_step":
            raise FirstStep
        return None

    tool = sys.monitoring.PROFILER_ID
    sys.monitoring.use_tool_id(tool, "entry path")
    sys.monitoring.register_callback(tool, sys.monitoring.events.PY_START, entered)
    sys.monitoring.set_events(tool, sys.monitoring.events.PY_START)
    sys.path.insert(0, str(root))
    sys.argv = ["run.py", *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(root / "run.py"), run_name="__main__")
        raise RuntimeError("the run ended without a step of training")
    except FirstStep:
        pass
    finally:
        sys.monitoring.set_events(tool, 0)
        sys.monitoring.free_tool_id(tool)
    return {
        "modules": len(modules),
        "functions": len(functions),
        "calls": total,
        "calls_between_packages": sum(calls.values()),
        "edges": dict(calls.most_common()),
        "modules_entered": sorted(modules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--root", default=Path(__file__).resolve().parents[1], type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as outputs:
        found = count_way(arguments.root.resolve(), ["train", arguments.config, f"--outputs={outputs}"])
    text = json.dumps(found, indent=2) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
