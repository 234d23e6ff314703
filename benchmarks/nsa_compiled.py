"""What limits the Hopper kernels, worked out without a GPU: compiled for an H100, FLOPs and bytes counted.

    JAX_PLATFORMS=cpu python benchmarks/nsa_compiled.py --out benchmarks/nsa_compiled.json

Needs the extra `gpu-compile`. For each spec with the tag "compile": registers, spilled bytes and shared
memory of each kernel, temporary memory of each branch, forward and backward; FLOPs that products run (masked
parts of tiles included) and useful ones, bytes from L2 into shared memory and the least of device memory, and
the milliseconds that the rates of an H100 allow them (kernels_pallas/nsa/specs/counts.py). And of the whole,
forward and with all gradients, what XLA moves and launches outside of the kernels, from the optimised HLO
(specs/outside.py), with the sum of both for two devices. Nothing here was timed: a kernel takes longer than
the largest of its floors. `--before FILE` puts the figures outside of the kernels of an earlier result beside
the new ones.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import tyro
from nsa_parts import compiler
from tqdm import tqdm

from jaxlab.app.provenance import environment
from jaxlab.files import write_json
from kernels_pallas.nsa import bytes_per_decoded_token
from kernels_pallas.nsa.specs import counts
from kernels_pallas.nsa.specs.arg_specs import ArgSpec, with_tag
from kernels_pallas.nsa.specs.outside import outside
from kernels_pallas.nsa.specs.synthetic import overlapping_indices

Row = dict[str, Any]
KERNELS = {
    "nsa_forward": "forward",
    "nsa_query_gradient": "query_gradient",
    "nsa_key_gradients": "key_gradients",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile and count."""

    out: Path
    """JSON file to write."""
    specs: tuple[str, ...] = tuple(with_tag("compile"))
    overlaps: tuple[float, ...] = (0.0, 0.5, 0.8, 1.0)
    """Of the free blocks that neighbouring queries read."""
    decode_batches: tuple[int, ...] = (1, 8, 64)
    """Sequences of which one token is decoded at the length of each spec."""
    before: Path | None = None
    """An earlier result of this command."""
    compile: bool = True
    """False only counts: no compiler is needed."""


def counted(spec: ArgSpec, overlaps: tuple[float, ...]) -> list[Row]:
    rows = []
    for branch in compiler.BRANCHES:
        for overlap in overlaps if branch == "selection" else (None,):
            indices = None if overlap is None else overlapping_indices(spec, overlap)
            for kernel, count in counts.kernels(spec, branch, indices).items():
                rows.append({"branch": branch, "overlap": overlap, "kernel": kernel, **described(count)})
    return [
        *rows,
        {"branch": "block_selection", "overlap": None, "kernel": "scores", **described(counts.scores(spec))},
    ]


def described(count: counts.Count) -> Row:
    return {**count._asdict(), "floors_ms": count.floors_ms(), "floor_ms": count.floor_ms()}


def compiled(spec: ArgSpec, dump: Path) -> tuple[list[Row], Row]:
    """Kernels, and bytes of temporary memory by branch."""
    rows, memory = [], {}
    for branch in (*compiler.BRANCHES, "block_selection"):
        if branch == "block_selection":
            report = compiler.compile_block_selection(spec, dump)
        else:
            report = compiler.compile_branch(spec, branch, dump)
        memory[branch] = report.temporary_bytes
        for kernel in report.kernels:
            name = KERNELS.get(kernel.name, "scores")
            facts = {n: x for n, x in dataclasses.asdict(kernel).items() if n != "name"}
            rows.append({"branch": branch, "kernel": name, **facts})
    return rows, memory


def outside_kernels(spec: ArgSpec, dump: Path) -> Row:
    """Bytes and launches of XLA, forward and with all gradients."""
    found: Row = {}
    for name, backward in (("forward", False), ("forward_and_backward", True)):
        report = compiler.compile_whole(spec, dump, backward)
        traffic = outside(report.compiled.as_text())
        largest = [{"name": x.name, "times": x.times, "bytes": x.bytes} for x in traffic.largest]
        facts = {"bytes": traffic.bytes, "launches": traffic.launches, "kernels": traffic.kernels}
        found[name] = {**facts, "largest": largest, "temporary_bytes": report.temporary_bytes}
    return found


def sums(rows: list[Row], traffic: Row, overlap: float) -> Row:
    """Milliseconds of kernels and of what XLA moves between them, by device."""
    forward, both = (traffic[name]["bytes"] for name in ("forward", "forward_and_backward"))
    found: Row = {"overlap": overlap}
    for name, device in counts.DEVICES.items():
        floor = lambda row, device=device: counts.Count(*(row[x] for x in counts.Count._fields)).floor_ms(
            device
        )
        mine = [(row["kernel"], floor(row)) for row in rows if row["overlap"] in (None, overlap)]
        ahead = sum(ms for kernel, ms in mine if kernel in ("forward", "scores"))
        back = sum(ms for kernel, ms in mine if kernel.endswith(("gradient", "gradients")))
        found[name] = {
            "forward_ms": ahead + 1e3 * forward / device.hbm_bytes,
            "backward_ms": back + 1e3 * (both - forward) / device.hbm_bytes,
        }
    return found


def whole(spec: ArgSpec, rows: list[Row], overlaps: tuple[float, ...]) -> list[Row]:
    """Sums over the kernels, beside dense attention by the same rate of products."""
    found = []
    dense = counts.forward_flops(spec, "dense")
    for overlap in overlaps:
        mine = [row for row in rows if row["overlap"] in (None, overlap)]
        forward = sum(row["floor_ms"] for row in mine if row["kernel"] in ("forward", "scores"))
        backward = sum(row["floor_ms"] for row in mine if row["kernel"].endswith(("gradient", "gradients")))
        dense_ms = 1e3 * dense / counts.H100.flops
        # Backward of dense attention: five products for the two of the forward pass.
        back = (3 * spec.key_dim + 2 * spec.value_dim) / (spec.key_dim + spec.value_dim)
        found.append(
            {
                "overlap": overlap,
                "forward_ms": forward,
                "backward_ms": backward,
                "dense_forward_ms": dense_ms,
                "dense_backward_ms": back * dense_ms,
            }
        )
    return found


def decoding(spec: ArgSpec, batch: int, dump: Path | None) -> Row:
    """What a step reads at the least and how long an H100 takes for that, and what was compiled for it."""
    names = ("stride", "block_size", "num_blocks", "window")
    traffic = bytes_per_decoded_token(
        spec.length,
        kv_heads=spec.kv_heads,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        itemsize=2,
        **{name: spec.sizes[name] for name in names},
    )
    bytes_read = {"nsa": batch * traffic.nsa_bytes, "dense": batch * traffic.dense_bytes}
    row: Row = {"batch": batch}
    for name, size in bytes_read.items():
        row |= {f"{name}_bytes": size, f"{name}_floor_ms": 1e3 * size / counts.H100.hbm_bytes}
    if dump is not None:
        report = compiler.compile_decoding(spec, batch, dump)
        row["kernels"] = [dataclasses.asdict(kernel) for kernel in report.kernels]
        traffic = outside(report.compiled.as_text())
        row["launches"] = traffic.launches + traffic.kernels
        row["bytes_outside"] = traffic.bytes
        row["temporary_bytes"] = report.temporary_bytes
    return row


def main(a: Arguments) -> None:
    result: Row = {
        "arguments": dataclasses.asdict(a) | {"out": a.out.name, "before": a.before and a.before.name},
        "environment": environment(),
        "rates": {name: dataclasses.asdict(device) for name, device in counts.DEVICES.items()},
        "note": "compiled and counted, not run: every time is a floor",
        "specs": [],
    }
    earlier = {}
    if a.before is not None:
        old = json.loads(a.before.read_text())
        earlier = {entry["name"]: entry["outside"] for entry in old["specs"] if "outside" in entry}
    dump = compiler.dump_folder()
    if a.compile and (missing := compiler.h100.missing()):
        raise SystemExit(f"nsa_compiled: {missing}; or count only, with --no-compile")
    for name in (bar := tqdm(a.specs)):
        bar.set_postfix_str(name)
        spec, start = with_tag("compile")[name], time.perf_counter()
        rows = counted(spec, a.overlaps)
        entry: Row = {"name": name, **dataclasses.asdict(spec) | {"tags": sorted(spec.tags)}}
        if a.compile:
            facts, entry["temporary_bytes"] = compiled(spec, dump)
            traffic = outside_kernels(spec, dump)
            entry |= {"compiled": facts, "outside": traffic}
            if (older := earlier.get(name)) is not None:
                entry["outside_before"] = older
            entry["sums"] = [sums(rows, traffic, overlap) for overlap in a.overlaps]
        entry |= {"counted": rows, "whole": whole(spec, rows, a.overlaps)}
        entry["decoding"] = [decoding(spec, batch, dump if a.compile else None) for batch in a.decode_batches]
        result["specs"].append(entry | {"seconds": time.perf_counter() - start})
        write_json(a.out, result)  # what is there stays, should the next one not come to its end
    shutil.rmtree(dump)
    for entry in result["specs"]:
        show(entry)


TITLES = (
    "branch",
    "overlap",
    "kernel",
    "regs",
    "spill",
    "KiB",
    "TFLOP",
    "useful",
    "L2 GB",
    "HBM GB",
    "ms: FLOP",
    "L2",
    "HBM",
)
LINE = "{:11s} {:>7s} {:14s} {:>4s} {:>5s} {:>6s} {:>7s} {:>7s} {:>7s} {:>7s} {:>9s} {:>7s} {:>7s}"


def show(entry: Row) -> None:
    facts = {(row["branch"], row["kernel"]): row for row in entry.get("compiled", ())}
    heads = f"{entry['heads']}/{entry['kv_heads']} heads, {entry['key_dim']}/{entry['value_dim']}"
    print(f"\n{entry['name']}: {entry['length']} tokens, {heads}")
    print(LINE.format(*TITLES))
    for row in entry["counted"]:
        fact = facts.get((row["branch"], row["kernel"]), {})
        numbers = [row[name] / 1e12 for name in ("flops", "useful_flops")]
        numbers += [row[name] / 1e9 for name in ("l2_bytes", "hbm_bytes")]
        numbers += [row["floors_ms"][name] for name in ("products", "l2", "hbm")]
        said = [str(fact.get(name, "")) for name in ("registers", "spilled_bytes")]
        said.append(f"{fact['shared_bytes'] / 1024:.0f}" if fact else "")
        overlap = "" if row["overlap"] is None else f"{row['overlap']:g}"
        print(LINE.format(row["branch"], overlap, row["kernel"], *said, *(f"{n:.2f}" for n in numbers)))
    for row in entry["whole"]:
        ours = f"forward {row['forward_ms']:.2f} ms, backward {row['backward_ms']:.2f} ms"
        dense = f"dense {row['dense_forward_ms']:.2f} and {row['dense_backward_ms']:.2f} ms"
        print(f"whole at overlap {row['overlap']:g}: {ours}; {dense}")
    for name in ("outside_before", "outside"):
        for what, row in entry.get(name, {}).items():
            moved = (
                f"{row['bytes'] / 1e9:.1f} GB in {row['launches']} launches, beside {row['kernels']} kernels"
            )
            print(f"{name.replace('_', ' ')} of the kernels, {what}: {moved}")
    for row in entry.get("sums", ()):
        of = lambda device, row=row: "{forward_ms:.1f} and {backward_ms:.1f} ms".format(**row[device])
        print(f"with what is outside, at overlap {row['overlap']:g}: H100 {of('h100')}; H200 {of('h200')}")
    for row in entry["decoding"]:
        floors = "{nsa_floor_ms:.3f} ms, dense {dense_floor_ms:.3f} ms".format(**row)
        facts = f"; {row['launches']} launches" if "launches" in row else ""
        print(f"one token of {row['batch']} sequences: by bytes {floors}{facts}")
    for branch, size in entry.get("temporary_bytes", {}).items():
        print(f"temporary memory of {branch}, forward and backward: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
