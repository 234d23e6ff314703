"""Files and folders that lie, by the hundred: each is one line for the user, and nothing else happens."""

import json
import os
import pickle

import numpy as np
import pytest

from jaxlab.checkpoints import write_aside
from jaxlab.checkpoints.safetensors_file import read_header
from jaxlab.checkpoints.tensor_folder import Planned, open_folder, read_json, write_folder
from jaxlab.errors import UserError

CONFIG = {"model_type": "llama"}


def container(header, data=b"", length=None):
    """Bytes of a safetensors file with any header, as an object or as raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = container({"a": entry(), "b": entry("BF16", [4], [24, 32])}, bytes(range(32)))
A = b'"a":' + json.dumps(entry()).encode()


def bad_files():
    """(what is wrong, bytes) of single files."""
    for end in range(len(GOOD)):  # cut anywhere: in the length, the header, the tensors
        yield f"cut off at {end}", GOOD[:end]
    yield "more than its header says", GOOD + b"\0"
    yield "text", b"this is not a checkpoint at all, but a text of some length"
    yield "zeros", bytes(64)
    yield "a pickle", pickle.dumps({"a": list(range(100))}, protocol=2)
    yield "a newer pickle", pickle.dumps({"a": list(range(100))}, protocol=4)
    yield "a zip", b"PK\x03\x04" + bytes(200)
    for length in (2**63, 2**64 - 1, len(GOOD), 100_000_001):
        yield f"a header of {length} bytes", container({"a": entry()}, bytes(24), length=length)
    for text in (b"", b"[]", b"3", b"null", b"{", b'{"a":}', b"\xff\xfe{}", b"{" * 4000, b"[" * 100_000):
        yield f"the header {text[:10]!r}", container(text, bytes(24))
    yield "a name twice", container(b"{" + A + b"," + A + b"}", bytes(24))
    yield "a key of an entry twice", container(A.replace(b'"a":{', b'{"a":{"dtype":"F32",') + b"}", bytes(24))
    for metadata in (3, [], {"format": 3}, {"x": None}, "pt"):
        yield f"metadata {metadata}", container({"__metadata__": metadata, "a": entry()}, bytes(24))
    for value in (None, 3, [], "F32", {}, {"dtype": "F32"}, {**entry(), "extra": 1}):
        yield f"the entry {value}", container({"a": value}, bytes(24))
    for dtype in ("F31", "", "f32", None, 4, [], "F32 ", "FLOAT", "Q4"):
        yield f"the dtype {dtype}", container({"a": entry(dtype)}, bytes(24))
    for dtype in ("F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3"):
        yield f"another dtype, {dtype}", container({"a": entry(dtype)}, bytes(24))
    shapes = (
        [2, 4],
        [],
        [0],
        [-2, -3],
        [2.0, 3],
        ["2", 3],
        [True, 6],
        None,
        6,
        "23",
        [2**40, 2**40],
        [1] * 33 + [6],
    )
    for shape in shapes:
        bad = {**entry(), "shape": shape}
        yield f"the shape {shape}", container({"a": bad}, bytes(24))
    ranges = (
        [0],
        [0, 24, 48],
        [24, 0],
        [-24, 0],
        [0, 25],
        [0, 23],
        [1, 25],
        [0.0, 24],
        None,
        24,
        ["0", "24"],
        [False, 24],
    )
    for offsets in ranges:
        yield f"the range {offsets}", container({"a": {**entry(), "data_offsets": offsets}}, bytes(24))
    yield "far beyond the file", container({"a": entry(offsets=[2**60, 2**60 + 24])}, bytes(24))
    yield "a gap", container({"a": entry(), "b": entry(offsets=[32, 56])}, bytes(56))
    yield "a gap at the start", container({"a": entry(offsets=[8, 32])}, bytes(32))
    yield "an overlap", container({"a": entry(), "b": entry(offsets=[12, 36])}, bytes(36))
    yield "the same bytes twice", container({"a": entry(), "b": entry()}, bytes(24))
    yield "no tensors but bytes", container({}, bytes(8))
    yield "a huge tensor", container({"a": entry("F32", [2**61], [0, 2**63])}, bytes(24))
    yield "numbers too long to be shown", container({"a": entry(shape=[10**4000, 10**4000])}, bytes(24))
    yield "ranges too long to be shown", container({"a": entry(offsets=[0, 10**4200])}, bytes(24))
    yield (
        "an empty tensor too large for numpy",
        container({"a": entry(shape=[2**61, 2**61, 0], offsets=[0, 0])}),
    )
    yield "half a surrogate pair", container(A.replace(b'"a"', b'{"\\ud800"') + b"}", bytes(24))
    many = b",".join(b'"%d":0' % i for i in range(100_000))
    yield "a name twice, after many others", container(b"{" + many + b',"z":0,"z":0}')


BAD_FILES = list(bad_files())


def assert_one_line(error):
    assert "\n" not in str(error.value)
    assert 0 < len(str(error.value)) < 600


@pytest.mark.parametrize(("what", "data"), BAD_FILES, ids=[what for what, _ in BAD_FILES])
def test_a_bad_file_is_one_line(tmp_path, what, data):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_header(file)
    assert_one_line(error)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_there_are_enough_of_them_and_the_good_one_is_good(tmp_path):
    assert len(BAD_FILES) >= 200
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    tensors = read_header(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        tensors["a"].read().reshape(-1), np.frombuffer(bytes(range(24)), np.float32)
    )


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50])
def test_a_good_header_whose_length_looks_like_a_pickle(tmp_path, length):
    text = json.dumps({"a": entry()}).encode().ljust(length)
    assert container(text)[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
    (tmp_path / "model.safetensors").write_bytes(container(text, bytes(24)))
    assert list(read_header(tmp_path / "model.safetensors")) == ["a"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_called_one(tmp_path, protocol):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps({"a": list(range(100))}, protocol))
    with pytest.raises(UserError, match="a pickle under the name"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (-1, 1), (2, 1), (3, 3)])
def test_rows_beyond_a_tensor_are_not_those_of_the_next(tmp_path, start, stop):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    with pytest.raises(IndexError):
        read_header(tmp_path / "model.safetensors")["a"].read_rows(start, stop)


def folder_with(path, index=None, config=CONFIG, **files):
    """A folder of files by name (with __ for a dot), JSON where they are objects."""
    for name, content in {"config__json": config, "model__safetensors__index__json": index, **files}.items():
        if content is not None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (path / name.replace("__", ".")).write_bytes(data)
    return path


ONE = container({"a": entry()}, bytes(24))
OTHER = container({"b": entry()}, bytes(24))


def index_of(**places):
    return {"weight_map": {name: f"{shard}.safetensors" for name, shard in places.items()}}


BAD_FOLDERS = {
    "no config": {"config": None, "model__safetensors": ONE},
    "a config that is a list": {"config": [], "model__safetensors": ONE},
    "a config that is no JSON": {"config": b"{'a': 1}", "model__safetensors": ONE},
    "a config with a key twice": {"config": b'{"a": 1, "a": 2}', "model__safetensors": ONE},
    "a config that is not text": {"config": b"\xff\xfe\x00", "model__safetensors": ONE},
    "no tensors": {},
    "pickles only": {"pytorch_model__bin": b"PK\x03\x04"},
    "an empty index": {"index": {}},
    "an index that is a list": {"index": []},
    "an index of numbers": {"index": {"weight_map": {"a": 3}}},
    "a missing shard": {"index": index_of(a="x", b="y"), "x__safetensors": ONE},
    "a tensor that is not in its shard": {"index": index_of(a="x", b="x"), "x__safetensors": ONE},
    "a tensor in two shards": {
        "index": index_of(a="x", b="y"),
        "x__safetensors": ONE,
        "y__safetensors": GOOD,
    },
    "shards swapped": {"index": index_of(a="y", b="x"), "x__safetensors": ONE, "y__safetensors": OTHER},
    "a shard that is a pickle": {"index": index_of(a="x"), "x__safetensors": pickle.dumps([1] * 99)},
    "a pickle under another name": {"model__safetensors": pickle.dumps([1] * 99)},
    "an index of nothing": {"index": {"weight_map": {}}},
    "a name too long for a file": {"index": index_of(a="x" * 300)},
    "an index beside a single file": {
        "index": index_of(a="x"),
        "x__safetensors": ONE,
        "model__safetensors": ONE,
    },
}
OUTSIDE = [
    "../x.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "x\0.safetensors",
]


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_line(tmp_path, name):
    folder_with(tmp_path, **BAD_FOLDERS[name])
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    assert_one_line(error)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_does_not_lead_out_of_the_folder(tmp_path, shard):
    (tmp_path / "x.safetensors").write_bytes(ONE)
    (tmp_path / "model").mkdir()
    folder_with(tmp_path / "model", index={"weight_map": {"a": shard}})
    with pytest.raises(UserError, match="outside of it") as error:
        open_folder(tmp_path / "model")
    assert_one_line(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "secret").write_bytes(ONE if name != "config.json" else b"{}")
    (tmp_path / "model").mkdir()
    folder_with(tmp_path / "model", model__safetensors=ONE)
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out"):
        open_folder(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to(name)  # to itself
    with pytest.raises(UserError, match="cannot be read") as error:
        open_folder(tmp_path / "model")
    assert_one_line(error)
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to("absent")
    with pytest.raises(UserError, match="a link to a file that is missing"):
        open_folder(tmp_path / "model")


def test_links_inside_the_cache_of_a_hub_are_followed(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in (("config.json", b"{}"), ("model.safetensors", ONE)):
        (blobs / name[:3]).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{name[:3]}")
    assert list(open_folder(snapshot)) == ["a"]


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    file = folder_with(tmp_path, model__safetensors=GOOD) / "model.safetensors"
    tensors = open_folder(tmp_path)
    file.write_bytes(GOOD[:-8])
    with pytest.raises(UserError, match="cut off"):
        tensors["b"].read()
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        tensors["a"].read()


def test_json_files_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlab.checkpoints.tensor_folder.MAX_JSON", 10)
    (tmp_path / "x.json").write_text('{"a": "0123456789"}')
    with pytest.raises(UserError, match="too large"):
        read_json(tmp_path / "x.json")


def planned(name, values):
    return Planned(name, values.dtype, values.shape, lambda: values)


@pytest.mark.parametrize("fault", ["no room", "no room later", "wrong shape", "twice"])
def test_what_goes_wrong_in_writing_leaves_what_was_there(tmp_path, monkeypatch, fault):
    with write_aside(tmp_path / "out") as folder:
        (folder / "kept").write_text("old")
    values = np.arange(6, dtype=np.float32)
    tensors = [planned("a", values), planned("b", values)]
    if fault == "no room":

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
    elif fault == "no room later":

        def fails():
            raise OSError(28, "No space left on device")

        tensors[1] = tensors[1]._replace(get=fails)
    elif fault == "wrong shape":
        tensors[1] = tensors[1]._replace(get=lambda: values[:3])
    else:
        tensors[1] = planned("a", values)
    with pytest.raises((UserError, ValueError), match=r"no room|not as planned|named a"):
        write_folder(tmp_path / "out", tensors, config={}, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "kept").read_text() == "old"
    with pytest.raises(UserError, match="exists already"):
        write_folder(tmp_path / "out", [], config={})


def test_a_limit_on_file_sizes_is_told_too(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="no room"):
            write_folder(tmp_path / "out", [planned("a", np.zeros(5000, np.float32))], config={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_folders_made_for_what_cannot_be_written_go_again(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="no room"):
        write_folder(tmp_path / "there" / "new" / "deep", [planned("a", np.ones(3))], config={})
    with pytest.raises(UserError, match="too long"):
        write_folder(tmp_path / ("x" * 300), [planned("a", np.ones(3))], config={})
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
