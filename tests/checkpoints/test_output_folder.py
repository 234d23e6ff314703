"""What an output may replace, and that the old folder stays until the new one is whole."""

import json
import os
import shutil

import pytest

from jaxlab.checkpoints import output_folder, resolve, split_adapter
from jaxlab.checkpoints.output_folder import MARKER, check_output, write_aside
from jaxlab.errors import UserError
from jaxlab.files import shipped


def write(path, text="new", **options):
    with write_aside(path, **options) as folder:
        (folder / "a").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text(text)
    return path


@pytest.fixture
def made(tmp_path):
    """A place with an input, a link to it, a folder of ours, one of somebody else, and a file."""
    (tmp_path / "input" / "inner").mkdir(parents=True)
    (tmp_path / "input" / "weights").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "input")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    write(tmp_path / "ours", "old")
    return tmp_path


def everything(folder):
    return {
        str(p.relative_to(folder)): (p.read_text() if p.is_file() else None, os.stat(p).st_ino)
        for p in folder.rglob("*")
        if p.exists()
    }


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("input", "is an input"),
        ("../{here}/input/../input", "is an input"),
        (".", "holds the input"),
        ("input/inner", "lies in the input"),
        ("input/new/model", "lies in the input"),
        ("link", "a link; name the folder itself"),
        ("link/inner", "lies in the input"),
        ("nowhere", "a link"),
        ("file", "is no folder"),
        ("other", "exists already|not a folder that this tool wrote"),
    ],
)
def test_only_what_was_written_here_is_replaced(made, name, message, overwrite):
    path = made / name.format(here=made.name)
    before = everything(made)
    with pytest.raises(UserError, match=message):
        check_output(path, [made / "input"], overwrite=overwrite)
    with pytest.raises(UserError, match=message):
        write(path, inputs=[made / "input"], overwrite=overwrite)
    assert everything(made) == before


def test_an_input_that_is_named_by_a_link_is_known_all_the_same(made):
    write(made / "input2", "old")
    (made / "link2").symlink_to(made / "input2")
    with pytest.raises(UserError, match="is an input"):
        check_output(made / "input2", [made / "link2"], overwrite=True)


def test_our_own_is_replaced_only_when_asked(made):
    with pytest.raises(UserError, match="exists already; choose another place or use --overwrite"):
        write(made / "ours")
    write(made / "ours", overwrite=True, inputs=[made / "input"])
    assert (made / "ours" / "a").read_text() == (made / "ours" / "inner" / "b").read_text() == "new"
    assert json.loads((made / "ours" / MARKER).read_text()) == {"written": ["a", "inner/b"]}
    assert {p.name for p in made.iterdir()} == {"input", "link", "other", "file", "nowhere", "ours"}


@pytest.mark.parametrize("name", ["notes", "inner/notes"])
def test_what_was_put_beside_our_files_is_not_lost(made, name):
    (made / "ours" / name).write_text("precious")
    with pytest.raises(UserError, match=f"holds {name}, which this tool did not write"):
        write(made / "ours", overwrite=True)
    (made / "ours" / name).unlink()
    (made / "ours" / "a").unlink()  # what is missing is no loss
    check_output(made / "ours", overwrite=True)


@pytest.mark.parametrize("marker", ["{", "[]", '{"written": 3}', "link"])
def test_a_marker_that_is_damaged_or_borrowed_is_none(made, marker):
    (made / "other" / MARKER).write_text(marker)
    if marker == "link":
        (made / "other" / MARKER).unlink()
        (made / "other" / MARKER).symlink_to(made / "ours" / MARKER)
    with pytest.raises(UserError, match=r"damaged|no \.jaxlab-output"):
        check_output(made / "other", overwrite=True)


class Crash(BaseException):
    pass


def crash_while_writing(path, **options):
    with write_aside(path, **options) as folder:
        (folder / "a").write_text("half")
        raise Crash


def test_a_crash_leaves_the_old_folder_as_it_was(made, monkeypatch):
    before = everything(made)
    with pytest.raises(Crash):
        crash_while_writing(made / "ours", overwrite=True)
    assert everything(made) == before
    with pytest.raises(Crash):
        crash_while_writing(made / "new" / "deep")
    assert everything(made) == before
    rename = os.rename

    def fail(source, target):
        if target == made / "ours" and not str(source).endswith("-old"):
            raise Crash
        rename(source, target)

    monkeypatch.setattr(output_folder.os, "rename", fail)
    with pytest.raises(Crash):
        write(made / "ours", overwrite=True)
    assert everything(made) == before


def test_the_old_folder_goes_last(made, monkeypatch):
    remove, seen = shutil.rmtree, []

    def watched(path, **options):
        if str(path).endswith("-old"):
            seen.append((made / "ours" / "a").read_text())
        remove(path, **options)

    monkeypatch.setattr(output_folder.shutil, "rmtree", watched)
    write(made / "ours", overwrite=True)
    assert seen == ["new"]


def write_while_another_does(path):
    with write_aside(path) as folder:
        (folder / "a").write_text("new")
        path.mkdir()
        (path / "b").write_text("precious")


def test_what_came_to_the_place_meanwhile_stays(made):
    with pytest.raises(UserError, match="exists already"):
        write_while_another_does(made / "new")
    assert (made / "new" / "b").read_text() == "precious"
    assert [p.name for p in made.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 300, "a name of 300 bytes|File name too long"),
        ("a" * 250, "a name of 250 bytes"),  # what is written beside it has a longer name
        ("missing/" + "a" * 300, "a name of 300 bytes"),
        ("a/" * 3000, "File name too long"),
        ("a\0b", "a null byte"),
        ("file/inner", "Not a directory"),
    ],
)
def test_what_cannot_be_a_name_is_refused_in_one_line(made, name, message):
    before = everything(made)
    with pytest.raises(UserError, match=message) as caught:
        check_output(made / name)
    assert "\n" not in str(caught.value)
    assert everything(made) == before


def test_a_tilde_is_the_home_as_in_a_shell(made, monkeypatch):
    monkeypatch.setenv("HOME", str(made))
    assert check_output("~/new") == made / "new"
    assert resolve("~/input") == made / "input"
    assert split_adapter("~/input") == ("~/input", None)
    assert shipped("~/input") == made / "input"


def test_an_empty_folder_is_filled_at_once_or_not_at_all(made, monkeypatch):
    (made / "empty").mkdir()

    def fail():
        with write_aside(made / "empty") as folder:
            (folder / "a").write_text("new")
            assert not list((made / "empty").iterdir())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list((made / "empty").iterdir())
    write(made / "empty")
    assert (made / "empty" / "a").read_text() == "new"
    assert {p.name for p in made.iterdir()} == {"input", "link", "other", "file", "nowhere", "ours", "empty"}
    (made / "mount").mkdir()
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path.name == "mount")
    with pytest.raises(UserError, match="a mount point"):
        write(made / "mount")
