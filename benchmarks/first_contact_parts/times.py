"""The whole attention and cuDNN's dense one beside it: forward, and backward from what the forward saved."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from first_contact_parts.checks import placed
from first_contact_parts.steps import Item, Row
from nsa_parts import subjects, timing

from kernels_pallas.nsa.specs import counts
from kernels_pallas.nsa.specs.arg_specs import ArgSpec

OVERLAPS = (0.0, 0.8)
PARTS = ("forward", "backward")
SPECS = (ArgSpec(1, "192/128"), ArgSpec(1, "128/128", key_dim=128))


def items(options: dict[str, Any], part: str) -> list[Item]:
    name, length = part.split(", ")
    spec = next(dataclasses.replace(s, length=int(length)) for s in SPECS if s.name == name)
    spec = tiny(spec) if options["tiny"] else spec
    run = functools.partial(_run, options, spec, known_rates(options))
    return [
        Item(f"{peer}, {part} tokens", functools.partial(_prepare, options, spec, peer == "cuDNN"), run)
        for peer in ("nsa", "cuDNN")
    ]


def tiny(spec: ArgSpec) -> ArgSpec:
    """For the interpreter."""
    sizes = {"heads": 8, "kv_heads": 1, "key_dim": 64, "value_dim": 64, "num_blocks": 3, "window": 64}
    return dataclasses.replace(spec, length=64, dtype="bfloat16", **sizes)


def known_rates(options: dict[str, Any]) -> Row:
    """What the step of the ceilings measured; nothing, if it did not."""
    path = Path(options["results"])
    if not path.exists():
        return {}
    rows = [row for step in json.loads(path.read_text())["steps"] for row in step["rows"]]
    found: Row = {}
    for row in rows:
        found |= row.get("fact", {})
    return {n: found[n] for n in ("copy_bytes_per_s", "product_flops_per_s") if n in found}


def _prepare(options: dict[str, Any], spec: ArgSpec, peer: bool) -> Any:
    subject = subjects.nsa(spec, "mosaic_gpu")
    if peer:
        if options["tiny"]:
            return "cuDNN runs on a GPU"
        subject = subjects.peers(spec, 0)[0]
    subject = subject._replace(parts=PARTS)
    like = {**spec.shapes(), "d_out": spec.output()}
    shape = (spec.batch, spec.kv_heads, spec.length, spec.num_blocks)
    like["indices"] = jax.ShapeDtypeStruct(shape, jnp.int32)
    with placed(options)():
        programs = timing.build([subject], like, 3)[subject.name]
    if isinstance(programs, str):
        if peer:  # which says nothing about us
            return programs
        raise RuntimeError(programs)
    chosen = {o: subjects.given(spec, o) for o in OVERLAPS} if subject.fixed else {None: {}}
    return subject, programs, chosen


def _run(options: dict[str, Any], spec: ArgSpec, rates: Row, built: Any) -> list[Row]:
    if isinstance(built, str):
        return [{"name": f"{spec.name}, {spec.length} tokens", "reason": built}]
    subject, programs, chosen = built
    data = subjects.draw(spec)
    sets = timing.copies(data)
    rows = []
    samples = (2, 0.01) if options["tiny"] else (12, 0.3)
    for overlap, indices in chosen.items():
        here = [each | indices for each in sets]
        with placed(options)():
            measured = timing.time_parts(subject, programs, here, *samples)
        for row in measured:
            about = "" if overlap is None else f", overlap {overlap:g}"
            name = f"{subject.name}{about}, {spec.name}, {spec.length} tokens, {row['part']}"
            if "reason" in row:
                what = "reason" if subject.name.startswith("dense") else "failed"
                rows.append({"name": name, what: row["reason"]})
                continue
            flops = products(spec, row["part"], dense=subject.name.startswith("dense"))
            found = {"name": name, "seconds": row["median_s"], "samples_s": row["samples_s"], "flops": flops}
            if "product_flops_per_s" in rates:
                found["floor_s"] = flops / rates["product_flops_per_s"]
            rows.append(found | {n: row[n] for n in ("compile_s", "temporary_mib")})
    return rows


def products(spec: ArgSpec, part: str, dense: bool) -> float:
    """Floating point operations of the pairs of a query and a key that it sees, none of masked ones; in the
    forward pass those of the choice too."""
    pairs = counts.pairs(spec)
    branches = ("dense",) if dense else ("compression", "selection", "window")
    total = 2.0 * spec.batch * spec.heads * sum(pairs[b] for b in branches)
    if part == "backward":
        return total * (2 * spec.key_dim + spec.value_dim + 2 * (spec.key_dim + spec.value_dim))
    choice = 0.0 if dense else 2.0 * pairs["compression"] * spec.batch * spec.heads * spec.key_dim
    return total * (spec.key_dim + spec.value_dim) + choice
