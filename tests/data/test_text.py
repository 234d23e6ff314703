"""Byte-level text: which bytes are trained on, which are held out, and what changes the identity."""

import os

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxlab.data.text import SEPARATOR, TextConfig, TextSource
from jaxlab.errors import ConfigError, UserError


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.py").write_bytes(bytes([65 + i]) * 12)
    (tmp_path / "binary.py").write_bytes(b"A\x00B" * 10)
    (tmp_path / "empty.py").touch()
    (tmp_path / "other.txt").write_bytes(b"t" * 12)
    return tmp_path


def source(folder, **changes):
    return TextSource(TextConfig(path=str(folder), **{"sequence_length": 6, "holdout_every": 4, **changes}))


def test_every_fourth_file_is_held_out_and_never_trained_on(folder):
    text = source(folder)
    trained = np.unique(np.concatenate([text.batch(0, step, 16)["tokens"] for step in range(40)]))
    assert set(trained) == {SEPARATOR, *b"ABCEFG"}
    held_out = {
        split: np.concatenate([b["tokens"] for b in text.held_out_batches(1, 99, split)])
        for split in ("validation", "test")
    }
    # 25 bytes, D * 12, separator, H * 12: two whole sequences in each half.
    np.testing.assert_array_equal(held_out["validation"], np.full((2, 6), ord("D")))
    np.testing.assert_array_equal(held_out["test"], [[SEPARATOR] + [ord("H")] * 5, [ord("H")] * 6][:2])


def test_a_batch_is_a_function_of_seed_and_step(folder):
    text, again = source(folder), source(folder)
    batch = text.batch(3, 5, 4)
    for name, values in again.batch(3, 5, 4).items():
        np.testing.assert_array_equal(values, batch[name])
    assert batch["tokens"].dtype == np.int32
    assert batch["tokens"].shape == (4, 6)
    assert batch["loss_mask"].tolist() == [[False] + [True] * 5] * 4
    assert (text.batch(3, 6, 4)["tokens"] != batch["tokens"]).any()
    assert (text.batch(4, 5, 4)["tokens"] != batch["tokens"]).any()
    assert text.tokenizer() is None


def test_the_last_byte_is_trained_on(tmp_path):
    (tmp_path / "one.py").write_bytes(b"abcdefgh" + b"-" * 8)  # one file: its second half is held out
    text = source(tmp_path / "one.py", holdout_every=2, sequence_length=4)
    seen = {bytes(row.astype(np.uint8)) for step in range(20) for row in text.batch(0, step, 4)["tokens"]}
    assert seen == {b"abcd", b"bcde", b"cdef", b"defg", b"efgh"}
    assert [b["tokens"].shape for b in text.held_out_batches(1, 5, "test")] == [(1, 4)]
    assert list(text.held_out_batches(2, 5, "test")) == []  # full batches only


def test_identity_changes_with_content_only(folder):
    first = source(folder).identity
    assert source(folder).identity == first
    os.utime(folder / "0.py", ns=(1, 1))
    assert source(folder).identity == first
    (folder / "other.txt").write_bytes(b"u")
    assert source(folder).identity == first
    (folder / "0.py").write_bytes(b"B" * 12)
    changed = source(folder)
    assert changed.identity != first
    assert changed.training[0] == ord("B")
    assert source(folder, holdout_every=3).identity not in (first, changed.identity)


def words_of(folder):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "A" * 12: 1, "?": 2}, unk_token="?"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_the_tokens_of_a_model(folder, tmp_path_factory):
    model = words_of(tmp_path_factory.mktemp("model"))
    text = source(folder, tokenizer=str(model), sequence_length=2)
    np.testing.assert_array_equal(text.training, [0, 1, *[0, 2] * 5])
    held_out = [batch["tokens"] for batch in text.held_out_batches(1, 9, "validation")]
    np.testing.assert_array_equal(held_out, [[[0, 2]]])
    assert text.tokenizer().get_vocab_size() == 3
    assert text.identity != source(folder, sequence_length=2).identity
    with pytest.raises(UserError, match="12 tokens of training text cannot fill a sequence of 13"):
        source(folder, tokenizer=str(model), sequence_length=13)
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        source(folder, tokenizer=str(model))


def test_other_patterns(folder):
    for i in range(4):
        (folder / f"{i}.txt").write_bytes(b"t" * 12)
    assert set(source(folder, pattern="*.txt").batch(0, 0, 9)["tokens"].ravel()) == {SEPARATOR, ord("t")}


def byte_pairs_of(folder, change):
    """A model's tokenizer of bytes, changed before it is stored."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def test_stored_truncation_and_padding_cut_no_text(folder, tmp_path):
    plain = source(folder, tokenizer=byte_pairs_of(tmp_path / "a", lambda t: None))
    for name, change in (
        ("b", lambda t: t.enable_truncation(5)),
        ("c", lambda t: t.enable_padding(length=500, pad_id=3)),
    ):
        stored = source(folder, tokenizer=byte_pairs_of(tmp_path / name, change))
        np.testing.assert_array_equal(stored.training, plain.training)
        np.testing.assert_array_equal(stored.held_out["test"], plain.held_out["test"])
    assert len(plain.training) == 6 * 12
    assert plain.largest_token == max(plain.training.max(), *(t.max() for t in plain.held_out.values()))


def test_a_tokenizer_reads_utf8_alone(folder, tmp_path):
    model = byte_pairs_of(tmp_path / "model", lambda t: None)
    (folder / "latin.py").write_bytes(b"caf\xe9 ole")
    with pytest.raises(UserError, match=r"latin\.py: not valid UTF-8 \(at its byte 4\)"):
        source(folder, tokenizer=model)
    assert 0xE9 in source(folder).training  # bytes may be anything
    # One file is cut between its letters.
    (folder / "one.py").write_text("日本語" * 7)
    text = source(folder / "one.py", tokenizer=model, holdout_every=2, sequence_length=4)
    assert len(text.training) == 30
    assert len(text.training) + sum(map(len, text.held_out.values())) == 63
    ours = source(folder / "one.py", holdout_every=2, sequence_length=4)
    assert len(ours.training) == 31


def test_the_standard_library_is_there():
    text = TextSource(TextConfig(sequence_length=256))
    assert len(text.training) > 5_000_000
    assert b"import" in bytes(text.batch(0, 0, 64)["tokens"].astype(np.uint8).ravel())


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("nowhere", {}, "no such file or folder; set data.path"),
        ("", {"pattern": "*.md"}, "0 files match"),
        ("", {"holdout_every": 20}, "at least 20 of text are needed"),
        ("", {"sequence_length": 13}, "12 bytes of validation text cannot fill a sequence of 13"),
        ("", {"sequence_length": 999}, "77 bytes of training text cannot fill a sequence of 999"),
    ],
)
def test_errors_are_one_line(folder, path, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        source(folder / path, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sequence_length": 1}, "sequence_length"),
        ({"holdout_every": 1}, "holdout_every"),
        ({"pattern": ""}, "pattern"),
        ({"pattern": "/etc/*"}, "pattern"),
    ],
)
def test_impossible_configs_name_the_key(changes, key):
    with pytest.raises(ConfigError) as raised:
        TextConfig(**changes)
    assert raised.value.key == key
