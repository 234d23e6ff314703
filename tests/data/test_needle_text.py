"""Needles in text read back from their tokens: the fact is where it is said to be, and tells the answer."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxlab.data.facts import draw_facts, split_keys
from jaxlab.data.needle import SPLITS
from jaxlab.data.needle_text import NeedleTextConfig, NeedleTextSource
from jaxlab.errors import ConfigError, UserError

LINE = re.compile(r"\n# The (\w+ \w+) holds (\w+)\.\n")
QUESTION = re.compile(r"\n# The (\w+ \w+) holds (\w+)$")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(f"line {i}\n" for i in range(400)))
    return str(path)


def source(text, **changes):
    config = {
        "path": text,
        "sequence_length": 300,
        "needles": 3,
        "questions": 2,
        "depths": 4,
        "holdout_every": 2,
    }
    return NeedleTextSource(NeedleTextConfig(**{**config, **changes}))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_one_fact_tells_the_answer_at_the_depth_that_is_said(text, split):
    made = source(text)
    [batch] = made.held_out_batches(8, 1, split)
    assert batch["tokens"].shape == (8, 300)
    assert batch["needle_depths"].tolist() == [0, 1, 2, 3] * 2
    for tokens, mask, position, depth in zip(
        *(batch[k] for k in ("tokens", "loss_mask", "needle_positions", "needle_depths")), strict=True
    ):
        said = bytes(tokens.tolist()).decode()
        facts = dict(LINE.findall(said))
        assert len(facts) == 3
        key, answer = QUESTION.search(said).groups()
        assert facts[key] == answer
        assert key in split_keys(split)
        assert bytes(tokens[mask].tolist()).decode() == f" {answer}"
        assert said[position:].startswith(f" {answer}.")
        before = sum(len(m.group()) for m in LINE.finditer(said) if m.start() < said.index(f"The {key}") - 3)
        room = 300 - sum(len(m.group()) for m in LINE.finditer(said)) - len(QUESTION.search(said).group())
        assert said.index(f"\n# The {key}") - before == round(depth / 3 * room)


def test_batches_follow_from_seed_step_and_row(text):
    made, again = source(text), source(text)
    whole = made.batch(1, 5, 4)
    np.testing.assert_array_equal(whole["tokens"], again.batch(1, 5, 4)["tokens"])
    np.testing.assert_array_equal(whole["tokens"][2:], made.batch(1, 5, 4, slice(2, 4))["tokens"])
    assert not np.array_equal(whole["tokens"], made.batch(1, 6, 4)["tokens"])
    for tokens in whole["tokens"]:
        told = LINE.findall(bytes(tokens.tolist()).decode())
        assert len(told) == 5  # three facts, two questions
        assert set(told[3:]) <= set(told[:3])
    assert whole["loss_mask"][:, 1:].all()
    assert made.largest_token == ord("z")  # of hazel


def test_words_of_any_tokenizer_and_its_first_token(text, tmp_path):
    words = {w: i for i, w in enumerate(["<s>", "?", "line", "The", "holds", "birch"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words["<s>"])]
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = source(text, tokenizer=str(tmp_path), sequence_length=80, fact=" The {key} holds {value} ")
    [batch] = made.held_out_batches(4, 1, "test")
    assert (batch["tokens"][:, 0] == words["<s>"]).all()
    assert (batch["tokens"] == words["<s>"]).sum() == 4
    for row, position in zip(batch["tokens"], batch["needle_positions"], strict=True):
        assert row[position - 1] == words["holds"]
        assert row[-2] == words["holds"]


def test_facts_are_of_their_split_with_different_keys_and_values():
    seen = {split: set(split_keys(split)) for split in SPLITS}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]
    facts = draw_facts(np.random.default_rng(0), 32, "test")
    assert len({f.key for f in facts}) == len({f.value for f in facts}) == 32
    with pytest.raises(UserError, match="no split 'other' of facts; there are train, validation, test"):
        split_keys("other")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"needles": 0}, "needles"),
        ({"needles": 99}, "needles"),
        ({"questions": 0}, "questions"),
        ({"depths": 0}, "depths"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"fact": "The {value} of {key}"}, "fact"),
        ({"fact": "{key} {value} {other}"}, "fact"),
        ({"fact": "{key"}, "fact"),
        ({"holdout_every": 1}, "holdout_every"),
    ],
)
def test_impossible_configs_name_the_key(changes, key):
    with pytest.raises(ConfigError) as raised:
        NeedleTextConfig(**changes)
    assert raised.value.key == key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 120}, "120 tokens leave no text beside 3 facts and the questions; raise"),
        ({"sequence_length": 3000}, "tokens of train text cannot fill a sequence of 3000; lower"),
        ({"path": "nowhere"}, "no such file or folder; set data.path"),
    ],
)
def test_what_does_not_fit_is_one_line(text, changes, message):
    with pytest.raises(UserError, match=message):
        source(text, **changes)
