"""Files of every form become the same documents; everything that is wrong with one is one line."""

import errno
import functools
import gzip
import json
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlab.data import DataSet, DocumentsConfig
from jaxlab.data.documents import preparing, readers
from jaxlab.data.documents.files import split_of
from jaxlab.data.documents.readers import Place, Progress, read_text
from jaxlab.errors import ConfigError, UserError, UserNote
from tests.data.documents.small import documents, find_model, source, texts, write_lines

TEXTS = ["one", "two lines\nof it", "drei €", "x" * 40]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def test_every_format_gives_the_same_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    datasets = pytest.importorskip("datasets")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        write_lines(tmp_path / name, ROWS)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet", row_group_size=2)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    both = datasets.DatasetDict(dev=datasets.Dataset.from_list(ROWS))
    both.save_to_disk(str(tmp_path / "several"))
    (tmp_path / "e.txt").write_text("<end>".join(TEXTS))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.md").write_text(text)
    for path, on in (
        ("a.jsonl", {}),
        ("b.jsonl.gz", {}),
        ("c.jsonl.zst", {}),
        ("d.parquet", {}),
        ("saved", {}),
        ("several", {"split": "dev"}),
        ("e.txt", {"separator": "<end>"}),
        ("folder", {}),
        ("folder/*.md", {}),
    ):
        found = source(tmp_path / path, on=on)
        found.prepare()
        assert texts(found) == TEXTS, path
        found.prepare()  # nothing is made again
        assert texts(found) == TEXTS


@pytest.mark.parametrize("separator", [None, "<e>"])
def test_a_long_text_comes_in_parts_that_do_not_depend_on_where_reading_began(
    tmp_path, monkeypatch, separator
):
    monkeypatch.setattr(readers, "LONGEST_TEXT", 50)
    text = "".join(f"line {i} of ä text\n" + "  indented\n" * (i % 3 == 0) for i in range(40))
    whole = text if separator is None else f"{text}<e>short<e>{text[:70]}"
    path = tmp_path / "a.txt"
    path.write_text(whole)
    seen = []
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        seen.append(list(read_text(path, Place(), Progress(), separator)))
    assert seen[0] == seen[1] == seen[2]
    rows = seen[0]
    assert max(len(row.value.encode()) for row in rows) <= 50
    joined = "".join(row.value + (separator or "") * row.last for row in rows)
    assert joined.removesuffix(separator or "") == whole
    assert rows[0].first
    assert rows[-1].last
    assert [row.first for row in rows[1:]] == [row.last for row in rows[:-1]]
    assert all(row.value.endswith("\n") for row in rows if not row.last)
    for number, row in enumerate(rows):
        assert list(read_text(path, row.after, Progress(), separator)) == rows[number + 1 :]


def test_parts_of_a_text_end_once(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_TEXT", 20)
    (tmp_path / "a.txt").write_text("0123456789\n" * 9)
    found = source(tmp_path / "a.txt")
    found.prepare()
    kept = documents(found)
    assert bytes(token for tokens in kept for token in tokens) == b"0123456789\n" * 9 + b"\0"
    assert len(kept) > 3


def test_rows_without_text_are_counted_and_said(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": "  "}, {"text": ""}, {"text": "b"}]
    found = source(write_lines(tmp_path / "a.jsonl", rows))
    with pytest.warns(UserWarning, match=r"a.jsonl: of 5 rows passed by: 1 without a value, 2 empty"):
        found.prepare()
    assert texts(found) == ["a", "b"]


BAD = {
    "not JSON": ('{"text": "a"}\n{"text": \n', r"a.jsonl line 2: not JSON: .*on_bad_rows"),
    "no column": ('{"txt": "a"}\n', r"line 1: no column 'text'; did you mean txt\?; its columns are 'txt'"),
    "a list": ("[1]\n", r"line 1: not an object like"),
    "a number": ('{"text": 3}\n', r"line 1: the column holds int, not a text"),
    "a surrogate": ('{"text": "\\ud800"}\n', r"line 1: half of a surrogate pair"),
    "deep": ('{"text": ' + "[" * 100_000 + "\n", r"line 1: not JSON"),
    "the end byte": ('{"text": "a\\u0000b"}\n', r"line 1: holds the byte 0"),
    "not UTF-8": (b'{"text": "\xff"}\n', r"line 1: not valid UTF-8 \(at its byte 11\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_with_their_place_or_skipped(tmp_path, name):
    text, message = BAD[name]
    raw = text if isinstance(text, bytes) else text.encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw + b'{"text": "good"}\n')
    with pytest.raises(UserError, match=message) as error:
        source(path).prepare()
    assert "\n" not in str(error.value)
    skipping = source(path, on_bad_rows="skip")
    with pytest.warns(UserWarning, match=r"1 bad \(the first: "):
        skipping.prepare()
    assert texts(skipping)[-1] == "good"
    with pytest.raises(UserError, match="1 such rows"):  # what was skipped is not refused silently
        source(path).prepare()


def damaged_files(folder):
    good = gzip.compress(b'{"text": "abcdefgh"}\n' * 50)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    yield "cut.jsonl.gz", good[:-10], r"damaged"
    yield "flipped.jsonl.gz", bytes(flipped), r"damaged"
    yield "none.jsonl.gz", b"hello", r"damaged"
    yield "none.parquet", b"hello" * 10, r"damaged, or of another format"
    yield "empty.jsonl", b"", "the file is empty"
    yield "utf16.txt", "hello".encode("utf-16"), r"UTF-16"
    yield "latin.txt", b"caf\xe9 x", r"not valid UTF-8 \(at its byte 4\)"


def test_damaged_files_are_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    for name, raw, message in damaged_files(tmp_path):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match=message) as error:
            source(tmp_path / name).prepare()
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_damaged_zst_and_a_parquet_without_the_column(tmp_path):
    zstandard, pa = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    from pyarrow import parquet

    frames = zstandard.compress(b'{"text": "a"}\n' * 99) * 2
    (tmp_path / "two.jsonl.zst").write_bytes(frames)
    whole = source(tmp_path / "two.jsonl.zst")
    whole.prepare()
    assert len(texts(whole)) == 198
    (tmp_path / "a.jsonl.zst").write_bytes(frames[:-6])
    with pytest.raises(UserError, match=r"a.jsonl.zst: damaged"):
        source(tmp_path / "a.jsonl.zst").prepare()
    parquet.write_table(pa.table({"txet": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column 'text'; did you mean txet\?"):
        source(tmp_path / "a.parquet").prepare()
    with pytest.raises(UserError, match="the column holds int, not a text"):
        source(tmp_path / "a.parquet", on={"column": "n"}).prepare()


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    for path, on, message in (
        ("nothing.jsonl", {}, "no such file or folder"),
        ("*.parquet", {}, "no such file or folder"),
        (".", {}, "none of its files is text"),
        (".", {"format": "dataset"}, "not a folder that datasets saved"),
    ):
        with pytest.raises(UserError, match=message):
            source(tmp_path / path, on=on)
    (tmp_path / "a.arrow").write_bytes(b"x")
    with pytest.raises(UserError, match="name its folder"):
        source(tmp_path / "a.arrow")
    with pytest.raises(UserError, match="set format: dataset"):
        source("owner/name")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sources": ()}, "sources"),
        ({"sources": (DataSet("a/x.txt"), DataSet("b/x.txt"))}, "sources"),
        ({"held_out": 1.0}, "held_out"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"attend_across": True}, "attend_across"),
        ({"sources": (DataSet("a", content="chat"),)}, "tokenizer"),
        ({"chat_template": "x"}, "chat_template"),
        ({"end_of_text": "x"}, "end_of_text"),
    ],
)
def test_configs_that_make_no_sense(changes, key):
    with pytest.raises(ConfigError) as error:
        DocumentsConfig(**{"sources": (DataSet("a"),), **changes})
    assert error.value.key == key


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"path": ""}, "path"),
        ({"weight": 0.0}, "weight"),
        ({"separator": ""}, "separator"),
        ({"separator": "x", "format": "jsonl"}, "separator"),
        ({"content": "chat", "format": "text"}, "format"),
        ({"subset": "en", "format": "auto"}, "subset"),
    ],
)
def test_data_sets_that_make_no_sense(changes, key):
    with pytest.raises(ConfigError) as error:
        DataSet(**{"path": "a", **changes})
    assert error.value.key == key


def test_files_of_a_texts_folder_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".hidden.txt").write_text("h")
    (tmp_path / "b.py").write_text("b")
    write_lines(tmp_path / "c.jsonl", [{"text": "c"}])
    found = source(tmp_path)
    found.prepare()
    assert texts(found) == ["c"]  # texts beside tables tell of them
    (tmp_path / "c.jsonl").rename(tmp_path / "c.json")
    found = source(tmp_path)
    found.prepare()
    assert texts(found) == ["a"]
    every = source(tmp_path, on={"format": "text"})
    every.prepare()
    assert texts(every) == ["a", "b", json.dumps({"text": "c"}) + "\n"]


def mutated(raw, draw):
    """Bytes with some of them changed, cut off, or left out."""
    raw = bytearray(raw)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw) - 1))
        match draw(st.sampled_from(("flip", "cut", "drop"))):
            case "flip":
                raw[at] ^= draw(st.integers(1, 255))
            case "cut" if at > 8:
                del raw[at:]
            case "drop":
                del raw[at : at + 3]
        raw = raw or bytearray(b"x")
    return bytes(raw)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_documents_or_one_line(tmp_path_factory, data):
    """Whatever a file holds; what is skipped is counted."""
    pa, zstandard = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("fuzz")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    good = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": sink.getvalue().to_pybytes(),
        "a.txt": "drei €\nvier".encode(),
    }
    name = data.draw(st.sampled_from(sorted(good)))
    (folder / name).write_bytes(mutated(good[name], data.draw))
    said = ""
    try:
        found = source(folder / name, on_bad_rows="skip")
        found.prepare()
    except UserError as error:
        said = str(error)
    if said:
        assert name in said
        assert "\n" not in said
    else:
        counts = found.counts()[name]
        assert len(documents(found)) == counts.rows - counts.bad - counts.null - counts.empty


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch, cache, fails_at):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(40)])
    monkeypatch.setattr(preparing, "BATCH_ROWS", 10)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    found = source(path)
    [[unit]] = found._units.values()
    prepare = lambda: preparing.prepare_units(
        [unit], found.config, found._encoders, find_model, shard_tokens=60
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; make room there"):
            prepare()
    assert len(unit.shards()) == fails_at - 1
    assert not list(cache.rglob(".0*"))  # nothing torn is left
    prepare()
    assert texts(found) == [f"text {i}" for i in range(40)]


def test_reading_goes_on_from_any_row(tmp_path):
    pa, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    from pyarrow import parquet

    rows = [{"text": f"row {i}"} for i in range(11)]
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        write_lines(tmp_path / name, rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    lines = [
        functools.partial(readers.read_json_lines, tmp_path / f"a.jsonl{suffix}", column="text")
        for suffix in ("", ".gz", ".zst")
    ]
    for read in (
        *lines,
        functools.partial(readers.read_parquet, tmp_path / "a.parquet", column="text"),
        functools.partial(readers.read_saved, str(tmp_path / "saved"), "train", column="text"),
    ):
        whole = list(read(start=Place(), progress=Progress()))
        assert [row.value for row in whole] == [row["text"] for row in rows]
        for number, row in enumerate(whole):
            assert list(read(start=row.after, progress=Progress())) == whole[number + 1 :]


def test_of_a_folder_as_on_the_hub_one_split_is_read(tmp_path, monkeypatch):
    pa, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    from pyarrow import parquet

    folder = tmp_path / "owner" / "name"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("of the set\n")
    for split, some in (("train", TEXTS[:1]), ("test", TEXTS[1:2])):
        table = pa.table({"text": some})
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for on in ({}, {"format": "dataset"}):
        for split, expected in (("train", TEXTS[:1]), ("test", TEXTS[1:2])):
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                found = source(folder, on={"split": split, **on})
                found.prepare()
                assert texts(found) == expected
            told = [str(note.message) for note in notes if note.category is UserNote]
            assert len(told) == (0 if on else 1)
            assert all(f"reads 1 of 2 files, of the split {split}, and not 1 of t" in n for n in told)
        with pytest.raises(UserError, match=r"no files of the split dev|name: datasets cannot read it"):
            source(folder, on={"split": "dev", **on}).prepare()
    (folder / "name.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="comes with code, which is not run"):
        source(folder, on={"format": "dataset"})


@pytest.mark.parametrize(
    ("names", "split", "read", "said"),
    [
        (
            "train test extra",
            "train",
            "train",
            "reads 1 of 3 files, of the split train, and not 1 of test, 1 of none",
        ),
        ("data test", "train", "data", "reads 1 of 2 files, of the split train, and not 1 of test"),
        ("data test", "test", "test", "of the split test, and not 1 of train"),
        ("test a-test", "train", "a-test test", None),
        ("a b", "train", "a b", None),
    ],
)
def test_which_files_of_a_folder_are_read(tmp_path, names, split, read, said):
    for name in names.split():
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    found = source(tmp_path, on={"split": split})
    assert sorted(texts_after_preparing(found)) == sorted(read.split())
    assert [said in note for note in found.notes] == ([] if said is None else [True])


@pytest.mark.parametrize(
    ("names", "split", "read", "said"),
    [
        ("Stories-train Stories-valid", "train", "Stories-train", "reads 1 of 2 files, of the split train"),
        ("Stories-train Stories-valid", "validation", "Stories-valid", "and not 1 of train"),
        ("train test README", "train", "train", "reads 1 of 3 files, of the split train, and not 1 of test"),
        ("train test notes", "train", "notes test train", None),  # pages, of which one is called test
        ("train-1 train-2", "train", "train-1 train-2", None),
        ("test_a test_b", "train", "test_a test_b", None),
    ],
)
def test_which_texts_of_a_folder_are_read(tmp_path, names, split, read, said):
    for name in names.split():
        (tmp_path / f"{name}.txt").write_text(name)
    found = source(tmp_path, on={"split": split})
    assert sorted(texts_after_preparing(found)) == sorted(read.split())
    assert [said in note for note in found.notes] == ([] if said is None else [True])


def texts_after_preparing(found):
    with warnings.catch_warnings(action="ignore", category=UserNote):
        found.prepare()
    return texts(found)


@pytest.mark.parametrize("names", ["train", "a"])
def test_a_split_that_is_not_there_is_not_replaced(tmp_path, names):
    write_lines(tmp_path / f"{names}.jsonl", [{"text": "x"}])
    with pytest.raises(
        UserError, match=r"holds no files of the split validation, (but of train|by their names)"
    ):
        source(tmp_path, on={"split": "validation"})


def test_tables_of_other_forms_are_not_taken_for_text(tmp_path):
    (tmp_path / "data.json").write_text('[{"text": "one"}]')
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    (tmp_path / "README.md").write_text("of the data\n")
    assert "passed by: is JSON, and rows are read of JSON Lines" in source(tmp_path).notes[0]
    for path in ("data.json", "c4.json.gz", "*.json"):
        with pytest.raises(UserError, match=r"is JSON, .* set format: text to read it as it stands"):
            source(tmp_path / path)
    assert texts_after_preparing(source(tmp_path / "c4.json.gz", on={"format": "jsonl"})) == ["one"]
    assert len(texts_after_preparing(source(tmp_path / "data.json", on={"format": "text"}))) == 1


def test_a_saved_set_has_no_subsets_and_no_other_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"]}, split="test").save_to_disk(tmp_path / "one")
    assert texts_after_preparing(source(tmp_path / "one")) == ["a"]
    for on, said in (
        ({"split": "dev"}, "no split 'dev', but 'test' alone"),
        ({"format": "dataset", "subset": "en"}, "leave subset out"),
    ):
        with pytest.raises(UserError, match=said):
            source(tmp_path / "one", on=on).prepare()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_sft-00000-of-00001.parquet", "train_sft"),
        ("en/c4-train.00000-of-01024.jsonl.gz", "train"),
        ("my-dev.jsonl", "validation"),
        ("test/a.jsonl", "test"),
        ("latest.jsonl", ""),
        ("contest/a.parquet", ""),
        ("val/part-00000-of-00003.parquet", "validation"),
        ("part-00000-of-00003.parquet", ""),
    ],
)
def test_splits_by_names_of_files(name, split):
    assert split_of(Path(name)) == split
