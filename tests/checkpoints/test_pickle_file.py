"""PyTorch's files made by hand, without PyTorch: read without running anything, or refused."""

import io
import json
import pickle
import struct
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints.pickle_file import pickled_tensors
from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.errors import UserError

TYPES = {
    "float32": "FloatStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


class Global:
    """Pickles as a reference to module.name, which need not exist here."""

    def __init__(self, module, name, arguments=()):
        self.module, self.name, self.arguments = module, name, arguments


class Storage(tuple):
    """Pickles as a persistent id."""


class Pickler(pickle._Pickler):
    """Writes what PyTorch would: globals by name, storages by persistent ids."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Storage):
            self.save(tuple(obj))
            self.write(pickle.BINPERSID)
        else:
            super().save(obj, save_persistent_id=False)


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def view(array, key, offset=0, shape=None, strides=None):
    kind = Global("torch", TYPES[array.dtype.name])
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(np.cumprod([1, *shape[:0:-1]])[::-1].tolist()) if shape else ()
    storage = Storage(("storage", kind, key, "cpu", array.size))
    return Call(
        REBUILD, storage, offset, tuple(shape), strides, False, Call(Global("collections", "OrderedDict"))
    )


def torch_file(path, state, storages, *, protocol=2, compression=zipfile.ZIP_STORED, order=b"little"):
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(state)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", order)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5).astype(ml_dtypes.bfloat16)
C = np.asarray([True, False])


def test_views_of_storages(tmp_path):
    state = {
        "whole": view(A, "0"),
        "transposed": view(A, "0", shape=(4, 3), strides=(1, 4)),
        "part": view(A, "0", offset=5, shape=(2, 2), strides=(4, 1)),
        "bf16": view(B, "1"),
        "bool": view(C, "2"),
        "scalar": view(A, "0", offset=7, shape=(), strides=()),
        "empty": view(A, "0", shape=(0, 4), strides=(4, 1)),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"),
            view(B, "1"),
            True,
            Call(Global("collections", "OrderedDict")),
        ),
    }
    found = pickled_tensors(torch_file(tmp_path / "x.bin", state, {"0": A, "1": B, "2": C}))
    expected = {
        "whole": A,
        "transposed": A.T,
        "part": A.reshape(-1)[[[5, 6], [9, 10]]],
        "bf16": B,
        "bool": C,
        "scalar": np.float32(7),
        "empty": A[:0],
        "parameter": B,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == np.shape(value)
        np.testing.assert_array_equal(found[name].read(), value)
    np.testing.assert_array_equal(found["transposed"].read_rows(1, 3), A.T[1:3])
    np.testing.assert_array_equal(found["part"].read_rows(1, 2), A.reshape(-1)[[[9, 10]]])
    assert found["whole"].read_rows(2, 2).shape == (0, 4)


def test_a_storage_without_type_holds_bytes(tmp_path):
    for module in ("torch", "torch.storage"):
        storage = Storage(("storage", Global(module, "UntypedStorage"), "0", "cpu", 5))
        state = {"a": Call(REBUILD, storage, 1, (4,), (1,))}
        found = pickled_tensors(torch_file(tmp_path / "x.bin", state, {"0": np.arange(5, dtype=np.uint8)}))
        np.testing.assert_array_equal(found["a"].read(), np.arange(1, 5, dtype=np.uint8))


def test_a_directory_that_lies_about_a_storage_reads_no_foreign_memory(tmp_path):
    large = np.empty(1_000_000, np.float32)
    file = torch_file(tmp_path / "x.bin", {"a": view(large, "0")}, {"0": A})
    raw = bytearray(file.read_bytes())
    entry = raw.rfind(b"PK\x01\x02")  # of the storage, which is the last member
    raw[entry + 24 : entry + 28] = struct.pack("<I", large.nbytes)
    file.write_bytes(raw)
    with pytest.raises(UserError, match="another size"):
        pickled_tensors(file)
    raw[entry + 20 : entry + 24] = struct.pack("<I", large.nbytes)
    file.write_bytes(raw)
    with pytest.raises(UserError, match="cut off"):
        pickled_tensors(file)["a"].read()
    file = torch_file(tmp_path / "x.bin", {"a": view(A, "0")}, {"0": A})
    raw = bytearray(file.read_bytes())
    raw[raw.rfind(b"PK\x03\x04")] = 0
    file.write_bytes(raw)
    with pytest.raises(UserError, match="not where the file says"):
        pickled_tensors(file)["a"].read()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x80\x02}r\xff\xff\xff\x00.", "more memory"),  # a slot of the memo that needs all before it
        (b"\x80\x02}p9999999\n.", "more memory"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.", "damaged"),  # bytes beyond the end
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\x00\x00\x00evilK\x01s\x86b.", "damaged"),
        (b"\x80\x02ctorch\nFloatStorage\n(K\x03X\x01\x00\x00\x00>NNNK\x04K\x04K\x00tb.", "damaged"),
    ],
    ids=["memo", "memo in text", "length", "attributes", "dtype"],
)
def test_a_pickle_neither_takes_memory_nor_changes_what_it_refers_to(tmp_path, code, message):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with pytest.raises(UserError, match=message) as error:
        pickled_tensors(tmp_path / "x.bin")
    assert "\n" not in str(error.value)


def reused():
    """A dict with a key of pairs of pairs of ..., each made of one that is used twice."""
    doubled = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(20))
    return b"\x80\x02})q\x00" + doubled + b"K\x01s."


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (reused(), "a tuple larger than"),
        (b"\x80\x02](" + b"K\x01" * 250 + b"ta.", "a tuple larger than"),
        (b"\x80\x02ccollections\nOrderedDict\n)Rq\x00h\x00h\x00\x87.", "a tuple larger than"),
        (b"\x80\x02]te.", "damaged"),
        (b"\x80\x02K\x01\x86.", "damaged"),
        (b"\x80\x02})ctorch._utils\n_rebuild_parameter\n)\x85RK\x01s.", "a parameter is no tensor"),
        (b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "damaged"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "not described with NEWOBJ"),
        (b"\x80\x04(\x91.", "not described with FROZENSET"),
        (b"\x80\x02}2.", "not described with DUP"),
    ],
    ids=[
        "tuples",
        "a tuple",
        "of made ones",
        "no mark",
        "no second",
        "no tensor",
        "copies",
        "classes",
        "sets",
        "twice",
    ],
)
def test_a_pickle_takes_neither_time_nor_memory_beyond_its_size(tmp_path, code, message):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with pytest.raises(UserError, match=message):
        pickled_tensors(tmp_path / "x.bin")


def test_a_dict_that_hides_its_own_method(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        code = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsNsb."
        archive.writestr("archive/data.pkl", code)
    assert pickled_tensors(tmp_path / "x.bin") == {}


def test_a_description_that_is_compressed_or_there_twice(tmp_path):
    file = tmp_path / "x.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(UserError, match="its description is compressed"):
        pickled_tensors(file)
    for second, message in (("other/data.pkl", "more than one"), ("archive/data.pkl", "one name")):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            with warnings.catch_warnings(action="ignore"):
                archive.writestr(second, b"\x80\x02}.")
        with pytest.raises(UserError, match=message):
            pickled_tensors(file)


def test_a_folder_of_pickles_needs_leave(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch_file(tmp_path / "pytorch_model.bin", {"a": view(A, "0")}, {"0": A})
    with pytest.raises(UserError, match="--allow-pickle"):
        open_folder(tmp_path)
    np.testing.assert_array_equal(open_folder(tmp_path, allow_pickle=True)["a"].read(), A)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "one.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin"}}))
    np.testing.assert_array_equal(open_folder(tmp_path, allow_pickle=True)["a"].read(), A)


def test_nothing_in_a_pickle_runs(tmp_path):
    """Each would leave a file if it ran."""
    trace = tmp_path / "ran"
    attacks = [
        Call(Global("os", "system"), f"touch {trace}"),
        Call(Global("builtins", "open"), str(trace), "w"),
        Call(Global("builtins", "eval"), f"open({str(trace)!r}, 'w')"),
        Call(Global("torch.serialization", "load"), str(trace)),
        Call(Global("pathlib", "Path.touch"), str(trace)),
        {"a": Call(Call(Global("builtins", "getattr"), Global("os", "system")), f"touch {trace}")},
        Call(Global("torch", "FloatStorage.__init__"), str(trace)),
    ]
    for attack in attacks:
        file = torch_file(tmp_path / "x.bin", {"a": attack}, {})
        with pytest.raises(UserError, match="refused") as error:
            pickled_tensors(file)
        assert "\n" not in str(error.value)
    assert not trace.exists()


BAD = {
    "a list": ([view(A, "0")], {"0": A}),
    "a number": ({"a": 3}, {}),
    "nested": ({"model": {"a": view(A, "0")}}, {"0": A}),
    "names that are numbers": ({1: view(A, "0")}, {"0": A}),
    "no storage": ({"a": view(A, "0")}, {}),
    "a storage too small": ({"a": view(A, "0")}, {"0": A[:2]}),
    "an offset too far": ({"a": view(A, "0", offset=1)}, {"0": A}),
    "a negative offset": ({"a": view(A, "0", offset=-1)}, {"0": A}),
    "negative strides": ({"a": view(A, "0", shape=(3,), strides=(-1,))}, {"0": A}),
    "strides that blow up": ({"a": view(A, "0", shape=(10**9,), strides=(0,))}, {"0": A}),
    "shape and strides of two lengths": ({"a": view(A, "0", shape=(3,), strides=(1, 1))}, {"0": A}),
    "a storage in another folder": ({"a": view(A, "../0")}, {"../0": A}),
    "a tensor of nothing": ({"a": Call(REBUILD, 1, 0, (1,), (1,))}, {}),
    "fewer bytes than the storage": (
        {
            "a": Call(
                REBUILD, Storage(("storage", Global("torch", "FloatStorage"), "0", "cpu", 13)), 0, (1,), (1,)
            )
        },
        {"0": A},
    ),
    "a storage without size": (
        {
            "a": Call(
                REBUILD,
                Storage(("storage", Global("torch", "FloatStorage"), "0", "cpu", None)),
                0,
                (1,),
                (1,),
            )
        },
        {"0": A},
    ),
    "a stride out of reach": ({"a": view(A, "0", shape=(1,), strides=(10**30,))}, {"0": A}),
    "an empty tensor out of reach": (
        {"a": view(A, "0", shape=(0, 10**14, 10**14), strides=(1, 1, 1))},
        {"0": A},
    ),
    "too many axes": ({"a": view(A, "0", shape=(1,) * 70, strides=(1,) * 70)}, {"0": A}),
    "another storage": ({"a": Storage(("module", 1, "0", "cpu", 3))}, {}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_dict_of_tensors_is_one_line(tmp_path, name):
    with pytest.raises(UserError) as error:
        pickled_tensors(torch_file(tmp_path / "x.bin", *BAD[name]))
    assert "\n" not in str(error.value)


def test_other_files_are_one_line(tmp_path):
    file = tmp_path / "x.bin"
    torch_file(file, {"a": view(A, "0")}, {"0": A})
    whole = file.read_bytes()
    variants = [b"", b"PK", whole[:-30], whole[: len(whole) // 2], pickle.dumps({"a": 1}), bytes(100)]
    for data in variants:
        file.write_bytes(data)
        with pytest.raises(UserError):
            pickled_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", b"x")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        pickled_tensors(file)
    for damaged in (b"", b"\x80\x02}", b"garbage."):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", damaged)
        with pytest.raises(UserError):
            pickled_tensors(file)
    torch_file(file, {"a": view(A, "0")}, {"0": A})
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        description = archive.read("archive/data.pkl")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/data/0", A.tobytes(), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        pickled_tensors(file)
    torch_file(file, {"a": view(A, "0")}, {"0": A}, order=b"big")
    with pytest.raises(UserError, match="little-endian"):
        pickled_tensors(file)
