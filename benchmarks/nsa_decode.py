"""Decode steps of one layer's attention, Native Sparse Attention beside dense, over a cache that is filled.

    JAX_PLATFORMS=cpu python benchmarks/nsa_decode.py --lengths 8192 16384 --out nsa_decode.json

`steps` tokens are decoded by one program (lax.fori_loop) that carries the cache, so that nothing is launched
from Python in between: each appends its K/V, compresses a block when one is complete (a mean, so that
attention is what is timed) and attends. The dense peer appends K/V and attends to all of them. Beside the
times stand the tokens and bytes that one decoded token reads of the cache by the paper's count.
"""

import dataclasses
from pathlib import Path

import tyro
from nsa_parts import decoding

from jaxlab.app.provenance import environment
from jaxlab.files import write_json


@dataclasses.dataclass(frozen=True)
class Arguments(decoding.Sizes):
    """Sizes of the measurement, and where it goes."""

    out: Path = Path("nsa_decode.json")
    """JSON file to write."""


def main(a: Arguments) -> None:
    found = decoding.rows(a)
    write_json(a.out, {"arguments": dataclasses.asdict(a), "environment": environment(), "rows": found})
    print(" tokens batch name               tokens read   MiB read  ms a step  times dense  differs")
    for r in found:
        about = f"{r['length']:7d} {r['batch']:5d} {r['name']:18s} {r['tokens']:11d}"
        about += f" {r['batch'] * r['bytes'] / 2**20:10.2f}"
        if "reason" in r:
            print(f"{about}  {r['reason']}")
            continue
        here = [d for d in found if (d["length"], d["batch"]) == (r["length"], r["batch"])]
        peer = [d["wall_s"] for d in here if d["name"].startswith("dense") and "wall_s" in d]
        factor = f"{min(peer) / r['wall_s']:12.2f}" if peer else " " * 12
        print(f"{about} {1e3 * r['wall_s']:10.3f} {factor} {r['differs_from_first_of_kind']:8.1e}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
