"""Folders beside the safetensors library: what one writes the other reads, bit for bit."""

import functools
import json
import os
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlab.checkpoints.output_folder import MARKER
from jaxlab.checkpoints.tensor_folder import Planned, open_folder, write_folder

RNG = np.random.default_rng(0)
DTYPES = [
    np.bool_,
    np.uint8,
    np.int8,
    np.uint16,
    np.int16,
    np.uint32,
    np.int32,
    np.uint64,
    np.int64,
    np.float16,
    np.float32,
    np.float64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]
SHAPES = [(), (1,), (0, 3), (3, 5), (2, 3, 4), (7,)]


def drawn(dtype, shape):
    raw = RNG.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    values = (raw & 1) if dtype is np.bool_ else raw
    return np.ascontiguousarray(values).reshape(-1).view(dtype).reshape(shape)


TENSORS = {f"{np.dtype(d).name}.{i}": drawn(d, s) for d in DTYPES for i, s in enumerate(SHAPES)}


def planned(tensors):
    return [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()]


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def test_the_library_reads_what_we_write(tmp_path):
    """Except bfloat16 and float8, for which it has no arrays of numpy."""
    write_folder(tmp_path / "m", planned(TENSORS), config={"model_type": "x"})
    with safe_open(tmp_path / "m" / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(TENSORS)
        assert file.metadata() == {"format": "pt"}
        for name, expected in TENSORS.items():
            if expected.dtype.type.__module__ == "numpy":
                same_bits(file.get_tensor(name), expected)
    ours = open_folder(tmp_path / "m")
    assert ours.config == {"model_type": "x"}
    for name, expected in TENSORS.items():
        same_bits(ours[name].read(), expected)
        assert ours[name].nbytes == expected.nbytes


def test_we_read_what_the_library_writes(tmp_path):
    known = {name: x for name, x in TENSORS.items() if x.dtype.type.__module__ == "numpy"}
    save_file(known, tmp_path / "model.safetensors", metadata={"format": "np"})
    (tmp_path / "config.json").write_text("{}")
    folder = open_folder(tmp_path)
    assert set(folder) == set(known)
    for name, expected in known.items():
        same_bits(folder[name].read(), expected)
        if expected.ndim and expected.shape[0] > 1:
            same_bits(folder[name].read_rows(1, 2), expected[1:2])
            same_bits(folder[name].read_rows(1, 1), expected[1:1])


def test_shards_hold_no_more_than_they_may_and_are_listed(tmp_path):
    tensors = {f"t{i}": RNG.standard_normal((i + 1, 10)).astype(np.float32) for i in range(6)}
    done = []
    write_folder(tmp_path / "m", planned(tensors), config={}, shard_bytes=200, progress=done.append)
    files = sorted(f for f in os.listdir(tmp_path / "m") if f.endswith(".safetensors"))
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    total = sum(x.nbytes for x in tensors.values())
    assert index["metadata"] == {"total_parameters": total // 4, "total_size": total}
    assert index["weight_map"]["t1"] == files[0]
    assert sum(done) == total
    folder = open_folder(tmp_path / "m")
    for name, expected in tensors.items():
        same_bits(folder[name].read(), expected)


@pytest.mark.parametrize("shard_bytes", [100, 1 << 30])
def test_what_a_tensor_keeps_is_let_go_when_it_is_written(tmp_path, shard_bytes):
    alive = weakref.WeakSet()
    most = 0

    class Kept:
        """What a `get` may keep between the tensors of one leaf."""

    def get(kept):
        nonlocal most
        alive.add(kept)
        most = max(most, len(alive))
        return np.ones(20, np.float32)

    def tensors():
        for i in range(6):
            yield Planned(f"t{i}", np.dtype(np.float32), (20,), functools.partial(get, Kept()))

    write_folder(tmp_path / "m", tensors(), config={}, shard_bytes=shard_bytes)
    assert most <= 2  # the one that is written, and the one before it


def test_companions_are_copied_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "modeling_x.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text(name)
    write_folder(tmp_path / "m", planned({"a": np.ones(1)}), config={}, copy_from=source)
    expected = [MARKER, "config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "m")) == expected
    write_folder(tmp_path / "m", planned({"b": np.ones(1)}), config={}, overwrite=True)
    assert list(open_folder(tmp_path / "m")) == ["b"]
    assert sorted(os.listdir(tmp_path)) == ["m", "source"]


def test_tensors_begin_where_they_can_be_mapped(tmp_path):
    write_folder(tmp_path / "m", planned({"a": np.ones(3, np.float32)}), config={})
    length = int.from_bytes((tmp_path / "m" / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0
    write_folder(tmp_path / "all", planned(TENSORS), config={})
    raw = (tmp_path / "all" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, expected in TENSORS.items():
        assert header[name]["data_offsets"][0] % expected.itemsize == 0


@pytest.mark.parametrize("rows", [(0, 3), (1, 2), (2, 3), (3, 3)])
def test_rows_are_read_alone(tmp_path, rows):
    x = drawn(ml_dtypes.bfloat16, (3, 4, 2))
    write_folder(tmp_path / "m", planned({"before": np.ones(5, np.int8), "x": x}), config={})
    same_bits(open_folder(tmp_path / "m")["x"].read_rows(*rows), x[slice(*rows)])
