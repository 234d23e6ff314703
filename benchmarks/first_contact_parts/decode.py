"""One token over caches of 65,536, and the choice of blocks alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from first_contact_parts.checks import placed
from first_contact_parts.child import line_of
from first_contact_parts.steps import Item, Row
from first_contact_parts.times import SPECS, known_rates, tiny
from nsa_parts import decoding, timing

from kernels_pallas.nsa import select_blocks
from kernels_pallas.nsa.specs.arg_specs import ArgSpec

LENGTH = 65536


def items(options: dict[str, Any], part: str) -> list[Item]:
    if part.startswith("batch"):
        batch = int(part.split()[1])
        sizes, length = _sizes(options)
        return [
            Item(
                f"one token, {name}, {part}",
                functools.partial(_build, options, sizes, name, make, batch, length),
                functools.partial(_decode, options, sizes, name, batch, length),
            )
            for name, make in decoding.peers(sizes).items()
        ]
    found = []
    for spec in SPECS:
        spec = tiny(spec) if options["tiny"] else dataclasses.replace(spec, length=LENGTH)
        run = functools.partial(_run_choice, options, spec)
        found.append(Item(f"choice alone, {spec.name}", functools.partial(_choice, options, spec), run))
    return found


def _sizes(options: dict[str, Any]) -> tuple[decoding.Sizes, int]:
    names = ("mosaic_gpu", "xla")
    if options["tiny"]:
        dims: dict[str, int] = {"heads": 16, "kv_heads": 1, "key_dim": 64, "value_dim": 64}
        dims |= {"num_blocks": 3, "window": 64, "steps": 2, "repeats": 1}
        return decoding.Sizes(names, dtype="bfloat16", **dims), 128  # type: ignore[arg-type]
    return decoding.Sizes(names, dtype="bfloat16", heads=64, kv_heads=4, repeats=5), LENGTH


def _build(
    options: dict[str, Any], sizes: decoding.Sizes, name: str, make: Any, batch: int, length: int
) -> decoding.Built | str:
    try:
        with placed(options)():
            return decoding.build(sizes, make, batch, length)
    except Exception as error:
        if name.startswith("nsa"):
            raise
        return line_of(error)  # a peer that cannot run says nothing about us


def _decode(
    options: dict[str, Any],
    sizes: decoding.Sizes,
    name: str,
    batch: int,
    length: int,
    built: decoding.Built | str,
) -> list[Row]:
    if isinstance(built, str):
        return [{"name": f"one token, {name}, batch {batch}", "reason": built}]
    with placed(options)():
        measured = decoding.measure(sizes, built, batch, length)
    kind = name.partition(" ")[0]
    read = batch * getattr(decoding.traffic_of(sizes, length), f"{kind}_bytes")
    found: Row = {"seconds": measured["wall_s"], "bytes": read}
    found["name"] = f"one token, {name}, batch {batch}, {length} tokens in the cache"
    if rate := known_rates(options).get("copy_bytes_per_s"):
        found["floor_s"] = read / rate
    return [found]


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
