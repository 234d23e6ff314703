"""Tokenizers of folders, and text that is shown token by token."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlab.checkpoints.tokenizer_files import read_tokenizer
from jaxlab.errors import UserError
from jaxlab.processing import TextStream

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = [*LETTERS, "th", "the", "Ġthe", "<|endoftext|>"]
MERGES = "#version: 0.2\nt h\nth e\nĠ the\n"


def byte_pairs(folder, names=("vocab.json", "merges.txt")):
    folder.mkdir()
    (folder / names[0]).write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / names[1]).write_text(MERGES)
    return folder


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_gpt2_vocabularies_and_merges(tmp_path, names, model_type):
    tokenizer = read_tokenizer(byte_pairs(tmp_path / "model", names), {"model_type": model_type})
    encoded = tokenizer.encode("the other the<|endoftext|>é")
    assert encoded.tokens == ["the", "Ġ", "o", "the", "r", "Ġthe", "<|endoftext|>", "Ã", "©"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "the other the<|endoftext|>é"


def test_text_is_shown_as_soon_as_its_letters_are_whole(tmp_path):
    tokenizer = read_tokenizer(byte_pairs(tmp_path / "model"))
    text = "the naïve 日本 🙂!"
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer, ids[:1])
    shown = [stream.add(token) for token in ids[1:]]
    assert "".join(shown) == text.removeprefix("the")
    assert "\ufffd" not in "".join(shown)
    assert shown[-5:] == ["", "", "", "🙂", "!"]
    # A row that only fills the embedding up, as to a multiple of 64, stands for no token.
    assert TextStream(tokenizer, ids).add(len(WORDS) + 3) == f"<{len(WORDS) + 3}>"


def test_byte_pairs_of_other_families_need_the_whole_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"do not say how text is split .*a tokenizer\.json does: python -c"):
        read_tokenizer(byte_pairs(tmp_path / "model"), {"model_type": "qwen2"})


def test_sentencepiece_alone_tells_how_to_mend(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"SentencePiece's own format; make a tokenizer\.json of it: python"):
        read_tokenizer(tmp_path)


def test_tokenizer_json_comes_first_and_is_checked(tmp_path):
    folder = byte_pairs(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).get_vocab() == {"a": 0, "<unk>": 1}
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("[]")
    with pytest.raises(UserError, match=r"vocab\.json: not a vocabulary"):
        read_tokenizer(folder)
    assert read_tokenizer(tmp_path) is None
