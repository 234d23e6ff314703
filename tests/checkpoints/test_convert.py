"""The task convert: every form into every other, checked byte by byte."""

import json
import shutil

import numpy as np
import pytest

from jaxlab.checkpoints import open_model, verification
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.checkpoints.formats.orbax_folder import OrbaxFolder
from jaxlab.checkpoints.output_folder import MARKER
from jaxlab.tasks import main
from tests.checkpoints import folders
from tests.checkpoints.test_tokenizer_files import byte_pairs


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """GPT-2 as old versions wrote it: masks, the head once more, vocabulary and merges."""
    path = tmp_path_factory.mktemp("convert") / "gpt2"
    folders.make(path, "gpt2", layout=folders.layouts("gpt2")[1])
    files = byte_pairs(path.parent / "files")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(files / name, path)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 112]}')
    (path / "train.py").write_text("raise SystemExit")
    (path.parent / "other").mkdir()
    (path.parent / "other" / "thesis").write_text("precious")
    return path


def run(*words):
    return main(["convert", *map(str, words)])


def test_there_and_back_again(gpt2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verification, "compare_logits", lambda *_: (0.0, 1.0))
    assert run(gpt2, tmp_path / "ours", "--verify") == 0
    said = capsys.readouterr().out
    assert "40 tensors used, 6 ignored by rule, lm_head.weight stored beside a tied embedding" in said
    assert "verified: all 41 tensors are the same bytes" in said
    assert run(tmp_path / "ours", tmp_path / "theirs", "--verify") == 0
    assert "verified: all 41 tensors are the same bytes" in capsys.readouterr().out
    before, after = folders.read_all(gpt2), folders.read_all(tmp_path / "theirs")
    assert before.keys() - after.keys() == {
        name for name in before if ".attn.bias" in name or "masked" in name
    }
    for name, value in after.items():
        assert (value.dtype, value.tobytes()) == (before[name].dtype, before[name].tobytes())
    # What Hugging Face needs came along; what is no part of a model did not.
    copied = {"config.json", "generation_config.json", "vocab.json", "merges.txt"}
    for name in copied:
        texts = [(folder / name).read_text() for folder in (tmp_path / "theirs", gpt2)]
        assert texts[0] == texts[1] or json.loads(texts[0]) == json.loads(texts[1])
    files = {file.name for file in (tmp_path / "theirs").iterdir()}
    assert files == copied | {"model.safetensors", "tokenizer.json", MARKER}
    theirs, ours = open_model(gpt2), open_model(tmp_path / "ours")
    assert theirs.end_tokens == ours.end_tokens == {7, 112}
    assert ours.tokenizer.encode(" the").ids == theirs.tokenizer.encode(" the").ids


def test_logits_are_compared(gpt2, tmp_path, capsys):
    assert run(gpt2, tmp_path / "half", "--dtype", "bfloat16", "--to", "hf", "--verify") == 0
    said = capsys.readouterr().out
    assert "same bytes" not in said
    largest = float(said.partition("differ by at most ")[2].split()[0])
    assert 1e-4 < largest < 0.5
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {value.dtype.name for value in folders.read_all(tmp_path / "half").values()} == {"bfloat16"}


def test_a_tensor_that_changed_is_found(gpt2, tmp_path, monkeypatch):
    read = OrbaxFolder.read

    def damaged(self, **more):
        params = read(self, **more)
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].add(1e-6)
        return params

    monkeypatch.setattr(OrbaxFolder, "read", damaged)
    with pytest.raises(RuntimeError, match=r"1 tensors are not those of IN: transformer\.ln_f\.weight"):
        run(gpt2, tmp_path / "ours", "--verify")


def test_check_reads_no_tensor_and_writes_nothing(gpt2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(HuggingFaceFolder, "read", None)
    assert run(gpt2, tmp_path / "out", "--check", "--dtype", "bfloat16") == 0
    assert "gpt2, 33,306 parameters, 66,612 bytes per device" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{gpt2}", "{gpt2}"], "is an input; choose another place"),
        (["{gpt2}", "{folder}", "--overwrite"], "holds the input"),
        (["{gpt2}", "{folder}/other", "--overwrite"], "not a folder that this tool wrote"),
        (["{gpt2}", "{out}", "--revision", "main"], "--revision is for a hub id"),
        (["{gpt2}", "{out}", "--adapter", "{gpt2}"], "adapter_config.json: is missing"),
        (["{gpt2}/nothing", "{out}"], "no such model: a model folder, a run folder"),
        (["{gpt2}/train.py", "{out}"], "not a model: name its folder"),
        (
            ["{folder}", "{out}"],
            "not a model folder: it needs config.yaml and params/ .ours., or config.json",
        ),
        (["{gpt2}", "{out}", "--to", "gguf"], "--to: expected hf|orbax"),
    ],
)
def test_mistakes_are_one_line(gpt2, tmp_path, capsys, words, message):
    places = {"gpt2": gpt2, "out": tmp_path / "out", "folder": gpt2.parent}
    assert run(*(word.format(**places) for word in words)) == 2
    captured = capsys.readouterr()
    assert message.replace(".ours.", "(ours)") in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert (gpt2 / "train.py").exists()


def test_what_cannot_be_written_is_known_before_anything_is_read(gpt2, tmp_path, capsys, monkeypatch):
    path = tmp_path / "ours"
    assert run(gpt2, path) == 0
    kept = path / "huggingface" / "config.json"
    kept.write_text(kept.read_text().replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 0.5'))
    monkeypatch.setattr(OrbaxFolder, "read", None)
    assert run(path, tmp_path / "theirs") == 2
    assert "not this model any more: norm_eps is 1e-05 and 0.5" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_refused_if_asked(tmp_path, capsys):
    tensors = dict(folders.weights("llama2"))
    tensors["model.norm.weight"] = np.full(32, np.inf, np.float32)
    path = folders.write(tmp_path / "in", folders.config("llama2"), tensors)
    assert run(path, tmp_path / "out", "--check-finite") == 2
    assert "model.norm.weight holds NaN or infinities" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_identity_of_a_folder_changes_with_any_file(gpt2, tmp_path):
    copy = shutil.copytree(gpt2, tmp_path / "copy")
    identities = {open_model(gpt2).identity, open_model(copy).identity}
    assert len(identities) == 1
    (copy / "merges.txt").write_text("#version: 0.2\n")
    assert len(identities | {open_model(copy).identity}) == 2
    assert open_model(copy).config == open_model(gpt2).config
