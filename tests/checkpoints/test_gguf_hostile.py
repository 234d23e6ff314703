"""GGUF files that lie: each is one line for the user, in a moment and in little memory, and that is all."""

import dataclasses
import re
import resource
import struct
import time

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxlab.checkpoints import families, open_model
from jaxlab.checkpoints.gguf_config import origin
from jaxlab.checkpoints.gguf_header import GGUFHeader, can_dequantize, read_gguf
from jaxlab.checkpoints.gguf_tokenizer import GGUFTokens
from jaxlab.errors import UserError
from tests.checkpoints import folders, gguf_files

U8, I32, U32, STRING, ARRAY, U64, BOOL, F32 = 0, 5, 4, 8, 9, 10, 7, 6


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    return string(name) + struct.pack("<I", kind) + value


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", min(value, 2**64 - 1))


def array(kind, count, values=b""):
    return u32(kind) + u64(count) + values


def info(name="t", shape=(4, 2), kind=0, offset=0, axes=None):
    """Of a tensor; the shape with the fastest axis first."""
    sizes = b"".join(map(u64, shape))
    return string(name) + u32(len(shape) if axes is None else axes) + sizes + u32(kind) + u64(offset)


ONE = (info(),)


def container(keys=(), tensors=ONE, data=bytes(32), *, counts=None, version=3, magic=b"GGUF"):
    head = magic + u32(version)
    head += b"".join(map(u64, counts or (len(tensors), len(keys))))
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


GOOD = container(
    [
        key("general.architecture", STRING, string("llama")),
        key("flags", ARRAY, array(BOOL, 3, b"\x01\x00\x01")),
        key("words", ARRAY, array(STRING, 2, string("a") + string("ä"))),
        key("number", F32, struct.pack("<f", 0.1)),
    ],
    [info("a"), info("b", (32,), 8, 32)],
    bytes(32 + 34),
)


def bad_files():
    """(what is wrong, bytes)."""
    for end in range(len(GOOD)):  # cut anywhere: in a count, a name, an array, the tensors
        yield f"cut off at {end}", GOOD[:end]
    yield "text", b"this is not a checkpoint at all, but a text of some length"
    yield "zeros", bytes(64)
    yield "safetensors", (24).to_bytes(8, "little") + b"{" + b" " * 30
    yield "another magic", container(magic=b"GGML")
    for version in (0, 1, 4, 99, 1 << 16, 3 << 24, 2**32 - 1):
        yield f"version {version}", container(version=version)
    for count in (2, 3, 1 << 20, 1 << 40, 2**63, 2**64 - 1):
        yield f"{count} tensors", container(counts=(count, 0))
        yield f"{count} keys", container(counts=(1, count))
        yield f"a name of {count + 40} bytes", container(tensors=[u64(count + 40) + b"t" + bytes(40)])
        yield f"a text of {count}", container([key("k", STRING, u64(count + 200))])
        for kind in (U8, U32, U64, STRING, BOOL, F32):
            yield f"an array of {count}", container([key("k", ARRAY, array(kind, count + 200))])
    for kind in (13, 14, 255, 2**32 - 1):
        yield f"a value of type {kind}", container([key("k", kind, bytes(8))])
        yield f"an array of type {kind}", container([key("k", ARRAY, array(kind, 1, bytes(8)))])
    yield "arrays in arrays", container([key("k", ARRAY, array(ARRAY, 1, array(ARRAY, 1, array(U8, 0))))])
    deep = b"".join(array(ARRAY, 1) for _ in range(10_000))
    yield "deep arrays", container([key("k", ARRAY, deep)])
    yield "a key twice", container([key("k", U32, u32(1)), key("k", U32, u32(2))])
    yield "a tensor twice", container(tensors=[info("t"), info("t", offset=32)], data=bytes(64))
    yield "a key that is no UTF-8", container([key(b"\xff\xfe", U32, u32(1))])
    yield "a text that is no UTF-8", container([key("k", STRING, string(b"\xc3\x28"))])
    yield "a token that is no UTF-8", container([key("k", ARRAY, array(STRING, 1, string(b"\xff")))])
    yield "a tensor's name that is no UTF-8", container(tensors=[info(b"\xff")])
    for alignment in (0, 3, 33, 1 << 20, 2**32 - 1):
        yield f"alignment {alignment}", container([key("general.alignment", U32, u32(alignment))])
    yield "alignment in words", container([key("general.alignment", STRING, string("32"))])
    for axes in (0, 5, 255, 2**32 - 1):
        yield f"{axes} axes", container(tensors=[info(axes=axes)])
    for shape in ((0, 2), (4, 0), (5, 2), (4, 3), (2**63, 2), (2**32, 2**32), (2**64 - 1,) * 4, (1 << 61,)):
        yield f"the shape {shape}", container(tensors=[info(shape=shape)])
    for kind in (2, 3, 4, 5, 8, 12, 14, 30, 28, 36, 41, 100, 2**32 - 1):
        yield f"type {kind}", container(tensors=[info(kind=kind)], data=b"")
    for offset in (1, 8, 32, 1 << 20, 2**63, 2**64 - 32):
        yield f"at {offset}", container(tensors=[info(offset=offset)])
    yield "overlapping", container(tensors=[info("a"), info("b")], data=bytes(64))
    yield "one over the end of another", container(tensors=[info("a"), info("b", offset=16)], data=bytes(64))
    yield "a gap", container(tensors=[info("a"), info("b", offset=64)], data=bytes(96))
    yield "round about", container(tensors=[info("a", offset=32), info("b", offset=32)], data=bytes(96))
    for count in (2**40, 1001, 3):
        yield f"{count} shards", container([key("split.count", U64, u64(count))])
    yield "shards in words", container([key("split.count", STRING, string("2"))])


def read_all(path):
    return [tensor.read().shape for tensor in read_gguf(path).tensors.values()]


@pytest.mark.parametrize(
    ("what", "raw"), list(bad_files()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_file_that_lies_is_one_line(tmp_path, what, raw):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    before, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        print(what, read_all(path))
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 300
    assert time.monotonic() - before < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # KiB


def test_the_good_one_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    for raw in (GOOD, GOOD + bytes(100)):  # what is behind the tensors is llama.cpp's affair neither
        path.write_bytes(raw)
        header = read_gguf(path)
        assert header.metadata["words"] == ["a", "ä"]
        assert header.metadata["flags"].tolist() == [True, False, True]
        assert header.metadata["number"] == np.float32(0.1)
        assert {name: tensor.shape for name, tensor in header.tensors.items()} == {"a": (2, 4), "b": (32,)}
        assert header.tensors["b"].read().tolist() == [0.0] * 32
    path.write_bytes(container(version=2))
    assert read_gguf(path).tensors["t"].read().shape == (2, 4)


def test_a_file_that_is_cut_off_while_it_is_open_is_one_line(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD)
    tensor = read_gguf(path).tensors["b"]
    path.write_bytes(GOOD[:-10])
    with pytest.raises(UserError, match="cut off while it was read"):
        tensor.read()


def test_a_model_with_bytes_changed_at_random_is_read_or_one_line(tmp_path):
    """Two hundred files, each with some bytes of the header of a whole model changed."""
    rng = np.random.default_rng(0)
    others = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [chr(33 + i) for i in range(90)],
        "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.eos_token_id": 3,
    }
    config = folders.config("llama2", 4)
    made = gguf_files.make(tmp_path / "good.gguf", config, folders.weights("llama2"), others=others)
    good = made.read_bytes()
    header = good.index(b"token_embd.weight") + 400
    path, said = tmp_path / "m.gguf", []
    for number in range(200):
        raw = bytearray(good)
        for at in rng.integers(4, header, rng.integers(1, 4)):
            raw[at] = rng.choice([0, 1, 255, 128, raw[at] ^ (1 << int(rng.integers(8)))])
        path.write_bytes(bytes(raw))
        opened = open_model(path)
        for ask in ("tokenizer", "end_tokens", "config_json", *(["account"] if number % 10 == 0 else [])):
            try:
                getattr(opened, ask)
            except UserError as error:
                said.append(str(error))
    assert len({re.sub(r"\d+", "#", line) for line in said}) > 40
    assert not any("\n" in line or "Error" in line for line in said)


NUMBERS = (0, -1, 2**31, 1.5, -1.0, 0.0, float("nan"), float("inf"), True)
ARRAYS = (np.asarray([1, 2]), np.asarray([0.5]), np.asarray([True, False]), np.asarray([], np.int32))
BAD = ("x", "", ["a", "b"], *NUMBERS, *ARRAYS)


@pytest.mark.parametrize("case", ["llama3", "gemma2", "gemma3_text", "phi3_longrope", "exaone4", "granite"])
def test_a_key_with_another_value_is_read_or_one_line(tmp_path, case):
    """Each key of each kind of model with values of every type."""
    config = folders.config(case, 4)
    header = read_gguf(gguf_files.make(tmp_path / "m.gguf", config, folders.weights(case)))
    prefix = f"{gguf_files.ARCHITECTURE[config['model_type']]}."
    more = ("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window_pattern")
    read, said = 0, []
    for key in (*(k for k in header.metadata if k.startswith(prefix)), *(prefix + name for name in more)):
        for value in BAD:
            changed = dataclasses.replace(header, metadata={**header.metadata, key: value})
            try:
                families.read_config(origin(changed, "m.gguf").config, "m.gguf")
                read += 1
            except UserError as error:
                said.append(str(error))
    assert read
    assert len(said) > 60
    assert not any("\n" in line or "Error" in line or len(line) > 400 for line in said)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_key_of_the_tokenizer_with_another_value_is_read_or_one_line(kind):
    texts = ["<unk>", "<s>", "</s>", *map(chr, range(97, 107)), "ab"]
    keys = {
        "model": kind,
        "pre": "llama-bpe",
        "tokens": texts,
        "token_type": np.asarray([2, 3, 3, *[1] * 11], np.int32),
        "scores": np.zeros(14, np.float32),
        "merges": ["a b"],
        "add_space_prefix": True,
        "add_bos_token": True,
        **{f"{name}_token_id": number for number, name in enumerate(("unknown", "bos", "eos", "padding"))},
    }
    good = {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": "x"}
    assert GGUFTokens(good, "m.gguf").tokenizer.encode("ab").ids[0] == 1
    said = []
    for key in (*good, "general.architecture", "general.type"):
        for value in (*BAD, None):
            changed = {**good, key: value}
            tokens = GGUFTokens({k: v for k, v in changed.items() if v is not None}, "m.gguf")
            for ask in (lambda t: t.tokenizer, lambda t: t.companions(), lambda t: t.ends):
                try:
                    ask(tokens)
                except UserError as error:
                    said.append(str(error))
            if key.startswith("general."):
                header = GGUFHeader(changed, {}, ())
                with pytest.raises(UserError):
                    origin(header, "m.gguf")
    assert len(said) > 100
    assert not any("\n" in line or "Error" in line or len(line) > 500 for line in said)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    kind = GGMLQuantizationType.Q8_1  # of activations; never in files
    assert not can_dequantize(kind)
    block, size = GGML_QUANT_SIZES[kind]
    config = folders.config("llama2", 4)
    tensors = gguf_files.converted(config, folders.weights("llama2"))
    writer = gguf_files.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in gguf_files.metadata(config).items():
        gguf_files.add(writer, f"llama.{name}", value)
    for name, values in tensors.items():
        if name == "blk.0.attn_q.weight":
            writer.add_tensor(name, np.zeros((32, 32 // block * size), np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=rf"cannot be dequantised: {kind.name} \(1 tensors\)"):
        _ = open_model(tmp_path / "m.gguf").config


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="a pointer of Git LFS in place of the file"):
        _ = open_model(path).config
