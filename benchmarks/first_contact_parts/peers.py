"""Triton kernels of others, by torch, from the folder that --peers names: their own packages, which are no
part of this project. Scalable-Flash-NSA (package flash_nsa) with head dim 128 on random numbers, where
neighbouring queries share few blocks; flash-linear-attention (fla) without a window, which needs flash-attn.
"""

import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from first_contact_parts.steps import Item, Row

LENGTHS = (65536, 8192)
HEADS, KV_HEADS, DIM = 64, 4, 128
PACKAGES = {"flash_nsa": "Scalable-Flash-NSA", "fla": "flash-linear-attention, no window"}


def items(options: dict[str, Any], part: str) -> list[Item]:
    add_paths(options["peers"])
    make: Callable[..., Any] = {"flash_nsa": _flash_nsa, "fla": _fla}[part]
    found = []
    for length in LENGTHS:
        name = f"{PACKAGES[part]}, 128/128, {length} tokens"
        run = functools.partial(_run, make, name, length)
        found.append(Item(name, functools.partial(_load, options, part), run))
    return found


def add_paths(folder: str) -> None:
    """The folder itself, and each in it: of packages or of checkouts."""
    if folder:
        inside = sorted(str(path) for path in Path(folder).iterdir() if path.is_dir())
        sys.path[:0] = [folder, *inside]


def _load(options: dict[str, Any], package: str) -> Any:
    """(torch, package), or why not."""
    if not options["peers"]:
        return "no --peers was given"
    if options["tiny"]:
        return "Triton's kernels need a GPU"
    try:
        torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        return torch, importlib.import_module(package)
    except ImportError as error:
        return f"{type(error).__name__}: {error}"[:200]


def _flash_nsa(torch: Any, package: Any, length: int) -> tuple[Callable[[], Any], list[Any]]:
    config = package.NSAConfig(head_dim=DIM, num_heads=HEADS, num_kv_heads=KV_HEADS)
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (draw(length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    gates = draw(length, HEADS, 3)
    ends = torch.tensor([0, length], device="cuda", dtype=torch.int32)
    core = package.HFNSACore(config).to(q)
    return lambda: core(q, k, v, gates, ends), [q, k, v, gates]


def _fla(torch: Any, package: Any, length: int) -> tuple[Callable[[], Any], list[Any]]:
    attend = importlib.import_module("fla.ops.nsa").parallel_nsa
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (draw(1, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    gates = [draw(1, length, HEADS) for _ in range(2)]

    def call() -> Any:
        return attend(q, k, v, g_cmp=gates[0], g_slc=gates[1], block_counts=16, block_size=64, window_size=0)

    return call, [q, k, v]


def _run(make: Callable[..., Any], name: str, length: int, loaded: Any) -> list[Row]:
    if isinstance(loaded, str):
        return [{"name": name, "reason": loaded}]
    torch, package = loaded
    call, inputs = make(torch, package, length)
    first = call()
    out = first[0] if isinstance(first, tuple) else first
    d_out = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, inputs, d_out, retain_graph=True, allow_unused=True)

    def forward() -> None:
        with torch.no_grad():
            call()

    rows: list[Row] = []
    for part, each in (("forward", forward), ("backward", backward)):
        try:
            seconds = _median(torch, each)
            rows.append({"name": f"{name}, {part}", "seconds": seconds})
        except Exception as error:  # a peer that fails says nothing about us
            rows.append({"name": f"{name}, {part}", "reason": f"{type(error).__name__}: {error}"[:200]})
    return rows


def _median(torch: Any, call: Callable[[], None], seconds: float = 1.0) -> float:
    for _ in range(3):  # compiles, tunes, loads
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(5, min(50, int(seconds / (time.perf_counter() - start))))
    taken = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)
