"""Tables from files of all makes, and one line for each way in which they can be wrong."""

import json
import sys
from types import SimpleNamespace

import pytest

from jaxlab.data import TableFormat, is_dataset, read_dataset, read_table
from jaxlab.errors import UserError

ROWS = [("a, good film", "1"), ('the "bad" one', "0"), ("ünïcode 日本", "1")]
QUOTED = [(json.dumps(text), number) for text, number in ROWS]
LINE = '{{"text": {}, "label": {}, "more": null}}\n'


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "text", "columns", "form"),
    [
        ("a.tsv", "text\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in ROWS), ("text", "label"), None),
        ("a.tsv", "".join(f"{t}\t{n}\r\n" for t, n in ROWS), (0, 1), None),
        (
            "a.csv",
            "label,text\n" + "".join('{},"{}"\n'.format(n, t.replace('"', '""')) for t, n in ROWS),
            ("text", "label"),
            None,
        ),
        ("a.txt", "".join(f"{n}:fine {t}\n" for t, n in ROWS), (1, 0), TableFormat(delimiter=" ")),
        ("a.jsonl", "".join(map(LINE.format, *zip(*QUOTED, strict=True))), ("text", "label"), None),
        ("a.json", f"[{','.join(map(LINE.format, *zip(*QUOTED, strict=True)))}]", ("text", "label"), None),
        ("a.tsv", "\ufeff" + "".join(f"{t}\t{n}\n" for t, n in ROWS), (0, 1), None),
    ],
)  # fmt: skip
def test_the_same_rows_from_every_kind_of_file(tmp_path, name, text, columns, form):
    rows = read_table(written(tmp_path / name, text), columns, form)
    assert [(t, n.removesuffix(":fine")) for t, n in (row.values for row in rows)] == ROWS
    first = 2 if columns[0] == "text" and name in ("a.tsv", "a.csv") else 1
    place = "entry" if name == "a.json" else "line"
    assert [row.where for row in rows] == [f"{tmp_path / name} {place} {first + n}" for n in range(3)]


def test_lines_count_as_they_stand_where_a_field_has_several(tmp_path):
    path = written(tmp_path / "a.csv", 'text,label\n"one\ntwo",0\n\nthree,1\n')
    assert [(row.where.rpartition(" ")[2], row.values) for row in read_table(path, ("text", "label"))] == [
        ("2", ("one\ntwo", "0")),
        ("5", ("three", "1")),
    ]


def test_other_encodings_are_read_where_they_are_named(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        path = written(tmp_path / "a.tsv", "été\t1\n", encoding)
        assert read_table(path, (0, 1), TableFormat(encoding=encoding))[0].values == ("été", "1")


@pytest.mark.parametrize(
    ("name", "raw", "columns", "form", "message"),
    [
        ("a.tsv", b"text\tlabel\nx\t1\n", ("sentence", "label"), None, r"a.tsv line 1: no column 'sentence'"),
        ("a.tsv", b"text\tlabel\nx\t1\n", ("texts", "label"), None, r"did you mean text\?"),
        ("a.tsv", b"x\t1\ny\n", (0, 1), None, r"a.tsv line 2: 1 column by the delimiter '\\t'"),
        ("a.tsv", b"x\t1\n\xe9t\t0\n", (0, 1), None, r"a.tsv line 2: not valid UTF-8; .*latin-1"),
        ("a.tsv", "x\t1\n".encode("utf-16"), (0, 1), None, r"is UTF-16.*set its encoding to utf-16"),
        ("a.tsv", b"x\t1\n", (0, 1), TableFormat(encoding="klingon"), r"no encoding 'klingon'"),
        (
            "a.csv",
            b'x,1\n"y,0\nz,1\n',
            (0, 1),
            None,
            r"a.csv line 2: unexpected end of data; mend its quotes",
        ),
        ("a.csv", b'x,1\n"y"s,0\n', (0, 1), None, r"a.csv line 2: .*set quotes to false"),
        (
            "a.jsonl",
            b'{"text": "x", "label": 1}\n{"text": "y"\n',
            ("text", "label"),
            None,
            r"line 2: not JSON",
        ),
        ("a.jsonl", b'{"text": "x"}\n', ("text", "label"), None, r"line 1: no column 'label'"),
        ("a.jsonl", b'["x", 1]\n', ("text", "label"), None, r"line 1: not an object"),
        ("a.jsonl", b'{"text": ["x"], "label": 1}\n', ("text", "label"), None, r"holds list, not text"),
        ("a.json", b"[" * 100_000, ("text", "label"), None, r"nested too deep"),
        ("a.tsv", b"text\tlabel\n", ("text", "label"), None, r"a.tsv: holds no row"),
        ("a.tsv", b"", (0, 1), None, r"a.tsv: holds no row"),
        ("a.csv", b"", ("text", "label"), None, r"a.csv: the file is empty"),
        ("a.csv", b"text,label\nx,1,y\n", ("text", "label"), None, r"line 2: 3 columns .* header names 2"),
        ("a.tsv", b"x\t1\n", ("text", "label"), TableFormat(header=False), r"needs a header"),
        ("a.txt", b"x;;1\n", (0, 1), TableFormat(delimiter=";;", quotes=True), r"a delimiter of one letter"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, raw, columns, form, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / name, columns, form)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.tsv: cannot be read: No such file"):
        read_table(tmp_path / "none.tsv", (0, 1))


def test_a_saved_data_set(tmp_path, monkeypatch):
    """By a stand-in for `datasets`, which is not among what the tests need."""

    class Table:
        column_names = ("text", "label")

        def __getitem__(self, name):
            return {"text": ["x", "y"], "label": [1, 0]}[name]

    asked = []
    stand_in = SimpleNamespace(
        load_from_disk=lambda name: {"train": Table()},
        load_dataset=lambda name, subset, split: asked.append((name, subset, split)) or Table(),
    )
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert is_dataset(tmp_path)
    assert not is_dataset(tmp_path.parent)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    rows = read_dataset(str(tmp_path), "train", ("text", "label"))
    assert [row.values for row in rows] == [("x", "1"), ("y", "0")]
    assert rows[1].where == f"{tmp_path} train row 2"
    with pytest.raises(UserError, match=r"no split 'test'; there are train"):
        read_dataset(str(tmp_path), "test", ("text", "label"))
    assert len(read_dataset("owner/name", "test", ("label", "text"))) == 2
    assert len(read_dataset("owner/name", "test", ("label", "text"), "en")) == 2
    assert asked == [("owner/name", None, "test"), ("owner/name", "en", "test")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets .*jaxlab\[datasets\]"):
        read_dataset("owner/name", "test", ("text", "label"))
