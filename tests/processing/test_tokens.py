"""Tokenizers from files, text to tokens and back, and the rows that tokens need."""

import json
import os
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxlab.errors import UserError
from jaxlab.processing import TextStream, check_token_ids, decode, encode, encode_batch, make_tokenizer
from tests.models.tiny import make_config


def words(**changes):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return json.dumps({**json.loads(tokenizer.to_str()), **changes})


def made(**changes):
    return make_tokenizer(lambda: Tokenizer.from_str(words(**changes)), "FILE")


def test_no_text_is_cut_or_filled():
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 9}
    padding = {
        "strategy": {"Fixed": 10**12},
        "direction": "Left",
        "pad_to_multiple_of": 10**12,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "b",
    }
    tokenizer = made(truncation=truncation, padding=padding)
    assert encode("a b a b", tokenizer) == [0, 1, 0, 1]
    assert json.loads(tokenizer.to_str())["truncation"] is None
    own = Tokenizer.from_str(words())
    own.enable_truncation(2)
    own.enable_padding(length=9)
    assert encode("a b a b", own) == [0, 1, 0, 1]  # also one that a caller has made


def test_bytes_where_there_is_no_tokenizer():
    assert encode("é", None) == [195, 169]
    found = encode_batch(["a", "bc"], None)
    assert [ids.tolist() for ids in found] == [[97], [98, 99]]


@pytest.mark.parametrize("tokenizer", [None, "made"])
def test_text_that_is_no_utf8(tokenizer):
    tokenizer = made() if tokenizer else None
    with pytest.raises(UserError, match=r"--prompt is not valid UTF-8 \(at its character 3\)"):
        encode("ab\udcff", tokenizer, where="--prompt")


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "("}}}, "FILE: not a tokenizer"),
        ({"model": {"type": "Nope"}}, "FILE: not a tokenizer"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "FILE: not a tokenizer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 99}}, r"6\.34e\+29 times as long"),
    ],
)
def test_what_is_no_tokenizer(changes, message, capfd):
    with pytest.raises(UserError, match=message) as error:
        made(**changes)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_tokenizer_that_fails_on_a_text(capfd):
    with pytest.raises(UserError, match=r"line 3: the tokenizer fails on it \(Onig.*retry-limit"):
        encode("a" * 40 + "b", made(pre_tokenizer=SPLIT), where="line 3")
    with pytest.raises(UserError, match="fails to decode"):
        decode([0], made(decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5}))
    assert capfd.readouterr().err == ""


def test_what_others_write_meanwhile_is_not_lost(capfd):
    def make():
        os.write(2, b"from below\n")
        print("from Python", file=sys.__stderr__, flush=True)
        return Tokenizer.from_str(words())

    make_tokenizer(make, "FILE")
    assert capfd.readouterr().err.split("\n")[0] == "from below"


def test_rows_of_the_embedding():
    config = make_config(vocab_size=2, tie_embeddings=False, extra_embeddings=1)
    check_token_ids([0, 1, 2], config)
    check_token_ids(np.zeros((1, 0), np.int32), config)
    with pytest.raises(UserError, match="the text holds the token 3 and the model's embedding has 3 rows"):
        check_token_ids([0, 3], config)
    with pytest.raises(UserError, match=r"line 2 holds the token '<unk>', id 2, and the .* 2 rows; take"):
        check_token_ids(np.asarray([[0, 2]]), make_config(vocab_size=2), made(), where="line 2")
    with pytest.raises(UserError, match="holds the token -1"):
        check_token_ids([-1], config, made())


def test_letters_that_are_never_whole_do_not_hold_a_text_for_ever():
    tokenizer = Tokenizer(models.BPE({f"<0x{i:02X}>": i for i in range(256)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(tokenizer)
    shown = [stream.add(0x80) for _ in range(20)]
    assert "\ufffd" in "".join(shown)
    assert "".join(stream.add(byte) for byte in b"ab" * 9).endswith("ab")
