"""Which kernels calls without a name get: by the record of what was checked on the device, and nothing
else."""

import dataclasses
import json
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.nsa import records
from kernels_pallas.nsa.implementations import IMPLEMENTATIONS, calls_noted, operators_for
from kernels_pallas.nsa.interface import Case
from kernels_pallas.nsa.mosaic_gpu import target
from kernels_pallas.nsa.records import Key, Record
from kernels_pallas.target import OLDEST_JAX, compiled_elsewhere

KIND = "NVIDIA H200"
XLA, KERNELS = "xla", "mosaic_gpu"


def case(heads=16, dtype=jnp.bfloat16, dims=(192, 128), operator="selected_attention") -> Case:
    shape = lambda heads, dim: jax.ShapeDtypeStruct((1, 4, heads, dim), dtype)
    return Case(operator, shape(heads, dims[0]), shape(1, dims[0]), shape(1, dims[1]), 64)


KEY = Key("selected_attention", "bfloat16", 16, 192, 128)
RECORD = Record(KIND, {}, "", {KEY: True})


@pytest.fixture(autouse=True)
def hopper(monkeypatch, tmp_path):
    """A Hopper that is not there: tracing asks for no more of it than its name."""
    if jax.__version_info__ < OLDEST_JAX:
        pytest.skip(f"the kernels need jax {OLDEST_JAX}")
    monkeypatch.setattr(target, "is_hopper", lambda: True)
    device = SimpleNamespace(device_kind=KIND, platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(records.jax, "devices", lambda: [device])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(records.VARIABLE, raising=False)
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(records, "_said", set())


def write(path, **changes):
    made = dataclasses.replace(RECORD, versions=records.versions(), kernels=records.kernels_hash())
    dataclasses.replace(made, **changes).write(path)
    return path


def got(asked: Case) -> str:
    with calls_noted() as noted:
        operators_for(asked, None)
    ((name, key),) = noted
    assert key == records.key_of(asked)
    return name


def of_cache():
    return records.cache_folder() / "nvidia_h200.json"


def test_without_a_record_xla_runs_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert got(case()) == got(case(heads=4)) == XLA
    (message,) = caplog.messages
    assert (
        "XLA runs in place of the Hopper kernels: nobody has checked the kernels on this NVIDIA H200"
        in message
    )
    assert f"`{records.HOW}`" in message


def test_the_record_allows_what_was_right_and_nothing_else(caplog):
    asked = {
        case(): KERNELS,
        case(dims=(130, 70)): KERNELS,  # padded to the same
        case(heads=4): XLA,
        case(dtype=jnp.float16): XLA,
        case(dims=(128, 128)): XLA,
        case(operator="window_attention"): XLA,
    }
    wrong = Key("window_attention", *KEY[1:])
    write(of_cache(), right={KEY: True, wrong: False})
    with caplog.at_level(logging.WARNING):
        for each, name in asked.items():
            assert got(each) == name, each.operator
    failed = [m for m in caplog.messages if "the check failed for window_attention in bfloat16" in m]
    unknown = [m for m in caplog.messages if "says nothing about selected_attention in bfloat16 with 4" in m]
    assert len(failed) == len(unknown) == 1
    assert operators_for(case(heads=4), KERNELS) is IMPLEMENTATIONS[KERNELS].load()  # a named one runs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"versions": {"jax": "0.1", "jaxlib": "0.1"}}, "made with jax 0.1, and this is "),
        ({"kernels": "0123"}, "made with other kernels than these"),
        ({"device_kind": "NVIDIA H100"}, "the record of a NVIDIA H100, and this is a NVIDIA H200"),
    ],
)
def test_a_record_of_something_else_says_nothing(change, reason):
    write(of_cache(), **change)
    assert reason in records.reason_against(case())


def test_the_named_file_goes_first_then_the_users_then_what_is_shipped(monkeypatch, tmp_path):
    write(records.SHIPPED / "nvidia_h200.json")
    assert got(case()) == KERNELS
    write(of_cache(), right={KEY: False})
    assert got(case()) == XLA
    monkeypatch.setattr(records.jax, "process_count", lambda: 2)  # hosts may differ in it
    assert got(case()) == KERNELS
    monkeypatch.setenv(records.VARIABLE, str(write(tmp_path / "named.json", right={KEY: False})))
    assert got(case()) == XLA


def test_a_file_that_is_no_record_is_named(monkeypatch, tmp_path, caplog):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    monkeypatch.setenv(records.VARIABLE, str(bad))
    with pytest.raises(ValueError, match=r"bad\.json: no record of kernels"):
        operators_for(case(), None)
    monkeypatch.setenv(records.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"JAXLAB_KERNEL_RECORD=.*nowhere: there is no such file"):
        operators_for(case(), None)
    monkeypatch.delenv(records.VARIABLE)
    of_cache().parent.mkdir(parents=True)
    of_cache().write_text("[")
    assert got(case()) == XLA
    assert "no record of kernels" in caplog.text


def test_a_newer_record_keeps_what_the_older_one_says_of_other_keys(tmp_path):
    other = KEY._replace(group=4)
    older = records.read(write(tmp_path / "a.json", right={KEY: True, other: True}))
    newer = dataclasses.replace(older, right={KEY: False})
    assert newer.merged(older).right == {KEY: False, other: True}
    assert newer.merged(dataclasses.replace(older, kernels="other")).right == {KEY: False}
    assert newer.merged(None) is newer


def test_no_other_truth_than_true(tmp_path):
    path = write(tmp_path / "a.json")
    content = json.loads(path.read_text())
    content["entries"][0]["right"] = "false"
    path.write_text(json.dumps(content))
    assert records.read(path).right == {KEY: False}


def test_compiling_for_an_absent_gpu_keeps_to_what_is_named(caplog):
    write(of_cache())
    with compiled_elsewhere():
        assert got(case()) == XLA
    assert not caplog.messages


def test_the_hash_is_of_all_that_makes_a_kernel(monkeypatch, tmp_path):
    before = records.kernels_hash.__wrapped__()
    assert before == records.kernels_hash.__wrapped__()
    copies = [tmp_path / name for name in records._HASHED]
    for path in copies:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x") if path.suffix else path.mkdir()
    tiles = tmp_path / "nsa" / "mosaic_gpu" / "tiles.json"
    monkeypatch.setattr(records, "_PACKAGE", tmp_path)
    seen = {before, records.kernels_hash.__wrapped__()}
    for path in (tiles, *(path for path in copies if path.suffix)):
        path.write_text("y")
        seen.add(records.kernels_hash.__wrapped__())
    assert len(seen) == 2 + len(copies)


def test_the_hash_is_of_what_the_kernels_import():
    """All of this package, but for types, the checks of arguments and what only asks where things run."""
    package = records._PACKAGE
    no_numbers = {"nsa/checks.py", "nsa/implementations.py", "nsa/interface.py", "target.py"}
    hashed = {package / name for name in records._HASHED}
    files = {file for path in hashed for file in ([path] if path.suffix else path.rglob("*.py"))}
    for file in files:
        for found in re.finditer(r"from (kernels_pallas[\w.]*) import \(?\s*(\w+)", file.read_text()):
            module = package.parent / found[1].replace(".", "/")
            names = (module.with_suffix(".py"), module / f"{found[2]}.py", module / "__init__.py")
            source = next(path for path in names if path.exists())
            if source.relative_to(package).as_posix() not in no_numbers:
                assert source in files, (file, source)
