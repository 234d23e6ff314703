"""Tile sizes from data files: by device, kernel, branch and padded head dims."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa import window_attention
from kernels_pallas.nsa.base import Positions
from kernels_pallas.nsa.mosaic_gpu import operators, tuning, vjp
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.nsa.specs.arg_specs import ArgSpec, with_tag
from kernels_pallas.target import OLDEST_JAX, compiled_elsewhere, interpreted
from tests.kernels_pallas.nsa.cases import cotangents, relative_error

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.tuned.cache_clear()
    yield tmp_path
    tuning.tuned.cache_clear()


def write(folder, kind, *entries):
    names = ("kernel", "branch", "key_dim", "value_dim", "tuning")
    rows = [dict(zip(names, entry, strict=True)) for entry in entries]
    (folder / tuning.file_of(kind).name).write_text(json.dumps({"entries": rows}))


def test_an_entry_is_found_by_padded_head_dims_and_nothing_else_is(folder, caplog):
    write(folder, "NVIDIA H100 80GB HBM3", ("forward", "window", 192, 128, {"keys": 128, "stages": 3}))
    assert (folder / "nvidia_h100_80gb_hbm3.json").exists()
    caplog.set_level(logging.DEBUG, logger="kernels_pallas.nsa.mosaic_gpu.tuning")
    find = lambda *wanted: tuning.tuned("NVIDIA H100 80GB HBM3", *wanted)
    assert find("forward", "window", 192, 128) == Tuning(keys=128, stages=3)
    assert find("forward", "window", 130, 100) == Tuning(keys=128, stages=3)  # padded to 192 and 128
    assert not caplog.messages
    for other in (
        ("forward", "window", 128, 128),
        ("forward", "selection", 192, 128),
        ("query_gradient", "window", 192, 128),
    ):
        assert find(*other) == Tuning()
    assert len(caplog.messages) == 3
    assert caplog.messages[0] == (
        "no tile sizes for forward of window at 128/128 on NVIDIA H100 80GB HBM3: the defaults"
    )


def test_an_unknown_device_gets_the_defaults(folder, caplog):
    caplog.set_level(logging.DEBUG, logger="kernels_pallas.nsa.mosaic_gpu.tuning")
    assert tuning.tuned("NVIDIA H200", "scores", "block_selection", 64, 64) == Tuning()
    assert "on NVIDIA H200: the defaults" in caplog.text


def test_the_interpreter_takes_no_registers_and_no_file(folder):
    write(folder, tuning.COMPILED_FOR, ("forward", "window", 64, 64, {"keys": 128}))
    k = jnp.zeros((1, 1, 1, 64))
    with interpreted():
        assert operators.kernel_tuning("forward", "window", k, k) == Tuning(registers=False)
    with compiled_elsewhere():
        assert operators.kernel_tuning("forward", "window", k, k) == Tuning(keys=128)


def test_each_kernel_has_its_own_sizes(folder):
    sizes = {"forward": 2, "query_gradient": 3, "key_gradients": 4}
    entries = [(kernel, "selection", 64, 64, {"stages": stages}) for kernel, stages in sizes.items()]
    write(folder, tuning.COMPILED_FOR, *entries)
    k = jnp.zeros((1, 1, 1, 64))
    with compiled_elsewhere():
        found = operators.with_tuning(vjp.Kernels(1.0), "selection", k, k)
    assert (found.forward.stages, found.query.stages, found.key.stages) == (2, 3, 4)


@pytest.mark.slow
@needs_pallas
@pytest.mark.parametrize(
    "sizes", [((1, 128, 3), (2, 64, 2), 3), ((2, 64, 3), (1, 128, 2), 2)], ids=["one and two", "two and one"]
)
def test_sizes_that_tuning_may_find_give_the_same(sizes):
    """In the interpreter: tiles and warpgroups that differ between the kernels of one attention."""
    spec = ArgSpec(150, heads=3, kv_heads=1, key_dim=64, value_dim=64, window=90, dtype="bfloat16")
    forward, query, key = (Tuning(*sizes[0]), Tuning(*sizes[1]), Tuning(stages=sizes[2]))
    tunings = {"forward": forward, "query": query, "key": key}
    tunings = {name: dataclasses.replace(t, registers=False) for name, t in tunings.items()}
    kernels = vjp.Kernels(spec.key_dim**-0.5, window=spec.window, **tunings)
    args, first = spec.arguments(), 110  # queries after the first tile of keys
    operands = [args["q"][:, first:], args["k_win"], args["v_win"]]
    positions = jnp.arange(first, spec.length, dtype=jnp.int32)[None]

    def by_kernels(q, k, v):
        return vjp.attend(kernels, q[:, :, None], k, v, None, Positions(positions))[0][:, :, 0]

    def by_xla(q, k, v):
        return window_attention(q, k, v, window=spec.window, q_positions=positions, implementation="xla")

    def step(attend, operands, d_out):
        out, pull = jax.vjp(attend, *operands)
        return out, *pull(d_out)

    d_out = cotangents(spec)[0][:, first:].astype(jnp.bfloat16)
    with interpreted():
        found = jax.jit(lambda *x: step(by_kernels, *x))(operands, d_out)
    wide = [x.astype(jnp.float32) for x in operands]
    expected = jax.jit(lambda *x: step(by_xla, *x))(wide, d_out.astype(jnp.float32))
    for x, reference in zip(found, expected, strict=True):
        assert relative_error(x, reference) < 0.005


def test_the_file_that_is_shipped_covers_what_is_tuned_and_says_how_it_was_found():
    files = list(tuning.FOLDER.glob("*.json"))
    assert files
    for path in files:
        data = json.loads(path.read_text())
        assert path == tuning.file_of(data["device_kind"])
        assert data["command"].startswith("python benchmarks/nsa_tune.py")
        assert data["found"].startswith(("timed", "compiled only"))
        assert data["environment"]["versions"]["jax"]
        for entry in data["entries"]:
            assert entry["key_dim"] % 64 == entry["value_dim"] % 64 == 0
            assert Tuning(**entry["tuning"]).keys == 64 or entry["branch"] != "selection"
            chosen = [row for row in entry["tried"] if row["tuning"] == entry["tuning"]]
            assert [row["fits"] for row in chosen] == [True]
        at = [(e["kernel"], e["branch"], e["key_dim"], e["value_dim"]) for e in data["entries"]]
        assert len(set(at)) == len(at)
        for spec in with_tag("tune").values():
            for kernel in ("forward", "query_gradient", "key_gradients"):
                for branch in ("compression", "selection", "window"):
                    assert (kernel, branch, spec.key_dim, spec.value_dim) in at
            assert ("scores", "block_selection", spec.key_dim, spec.key_dim) in at
