"""One token over caches of 65,536, and the choice of blocks alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from first_contact_parts.checks import placed
from first_contact_parts.steps import Item, Row
from first_contact_parts.times import SPECS, known_rates, tiny
from nsa_parts import decoding, timing

from kernels_pallas.nsa import select_blocks
from kernels_pallas.nsa.specs.arg_specs import ArgSpec

LENGTH, BATCHES = 65536, (1, 8, 64)


def items(options: dict[str, Any], part: str) -> list[Item]:
    rates = known_rates(options)
    length, batches = (128, (1,)) if options["tiny"] else (LENGTH, BATCHES)
    found = [
        Item(f"one token, batch {n}", lambda: None, functools.partial(_decode, options, rates, length, n))
        for n in batches
    ]
    for spec in SPECS:
        spec = tiny(spec) if options["tiny"] else ArgSpec(LENGTH, spec.name, key_dim=spec.key_dim)
        run = functools.partial(_run_choice, options, spec)
        found.append(Item(f"choice alone, {spec.name}", functools.partial(_choice, options, spec), run))
    return found


def _decode(options: dict[str, Any], rates: Row, length: int, batch: int, _: Any) -> list[Row]:
    dims = (
        {"heads": 16, "kv_heads": 1, "key_dim": 64, "value_dim": 64}
        if options["tiny"]
        else {"heads": 64, "kv_heads": 4}
    )
    more = {"num_blocks": 3, "window": 64, "steps": 2, "repeats": 1} if options["tiny"] else {"repeats": 5}
    sizes = decoding.Sizes(("mosaic_gpu", "xla"), dtype="bfloat16", **dims, **more)  # type: ignore[arg-type]
    with placed(options)():
        measured = decoding.rows_at(sizes, length, batch)
    rows: list[Row] = []
    for row in measured:
        name = f"one token, {row['name']}, batch {batch}, {length} tokens in the cache"
        if "reason" in row:
            rows.append(
                {"name": name, "failed" if row["name"].startswith("nsa") else "reason": row["reason"]}
            )
            continue
        found: Row = {"name": name, "seconds": row["wall_s"], "bytes": batch * row["bytes"]}
        if "copy_bytes_per_s" in rates:
            found["floor_s"] = batch * row["bytes"] / rates["copy_bytes_per_s"]
        rows.append(found)
    return rows


def _choice(options: dict[str, Any], spec: ArgSpec) -> Any:
    shapes = spec.shapes()
    lse = jax.ShapeDtypeStruct(shapes["q"].shape[:3], jnp.float32)
    choose = functools.partial(select_blocks, **spec.selection_sizes, implementation="mosaic_gpu")
    with placed(options)():
        return (
            jax.jit(choose).lower(shapes["q"], shapes["k_cmp"], lse).compile(),
            shapes["q"],
            shapes["k_cmp"],
            lse,
        )


def _run_choice(options: dict[str, Any], spec: ArgSpec, built: Any) -> list[Row]:
    call, *like = built
    args = tuple(jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(like))
    with placed(options)():
        measured = timing.measure(call, [args], 10, 0.01 if options["tiny"] else 0.3)
    name = f"choice alone, {spec.name}, {spec.length} tokens"
    return [{"name": name, "seconds": measured["median_s"], "samples_s": measured["samples_s"]}]
