"""The digit questions: batches are checked against the answers in words, computed here a second time."""

import time

import numpy as np
import pytest

from jaxlab.data.digits import (
    HELD_OUT,
    TASKS,
    DigitsConfig,
    DigitsSource,
    describe,
    evaluation_batches,
    load_images,
    make_batch,
    tokenizer,
)
from jaxlab.data.digits_words import CONTEXT, ENGLISH, FIGURES, FRENCH, IMAGE_ID, PAD_ID, ROMAN, VOCABULARY
from jaxlab.errors import ConfigError, UserError

ALL = DigitsConfig(mixture={task: 1.0 for task in TASKS})
WORDS = {i: word for word, i in VOCABULARY.items()}
NAMES = {name: d for names in (ENGLISH, FIGURES, ROMAN) for d, name in enumerate(names)}


def expected_answer(question: str, digit: int) -> str:
    """The answer, written independently of the tables."""
    word = ENGLISH[digit]
    if "plus" in question or "times" in question:
        _, _, _, operation, operand, _ = question.split()
        k = ENGLISH.index(operand)
        total = digit + k if operation == "plus" else digit * k
        return " ".join(ENGLISH[int(figure)] for figure in str(total))
    endings = {
        "use figures .": f"it is {digit}",
        "in figures .": str(digit),
        "use roman numerals .": f"it is {ROMAN[digit]}",
        "in roman numerals .": ROMAN[digit],
        "in capitals .": f"IT IS {word.upper()}",
        "in brackets .": f"[ {word} ]",
        "say it twice .": f"{word} {word}",
        "as json .": f'{{ "digit" : {word} }}',
        "spell it .": " ".join(word),
        "est-ce ?": f"c'est un {FRENCH[digit]}",
        "vois-tu ?": f"je vois un {FRENCH[digit]}",
        "nomme ce chiffre .": f"le {FRENCH[digit]}",
        "name this digit .": word,
        "what digit is this ?": f"it is {word}",
        "number is shown ?": f"it is {word}",
    }
    return next(answer for ending, answer in endings.items() if question.endswith(ending))


def parts(tokens: np.ndarray, loss_mask: np.ndarray) -> tuple[list[str], str, list[str]]:
    """Context, question and targets of a row, in words."""
    words = [WORDS[int(t)] for t in tokens]
    start = int(np.flatnonzero(loss_mask)[0])
    assert words[:3] == ["<bos>", "picture", ":"]
    assert words[start - 1] == "answer"
    targets = [word for word, target in zip(words, loss_mask, strict=True) if target]
    return words[CONTEXT], " ".join(words[CONTEXT.stop : start - 1]), targets


def test_answers_follow_from_the_text() -> None:
    batch = make_batch(DigitsConfig(mixture={t: 1.0 for t in TASKS if t.startswith("text_")}), 0, 0, 512)
    assert "images" not in batch
    seen = set()
    for tokens, targets in zip(batch["tokens"], batch["loss_mask"], strict=True):
        context, question, answer = parts(tokens, targets)
        named = np.bincount([NAMES[word] for word in context], minlength=10)
        digit = int(np.argmax(named))
        assert np.sum(named == named[digit]) == 1
        assert named[digit] >= 2
        assert answer == [*expected_answer(question, digit).split(), "<eos>"]
        seen.add(question)
    assert len(seen) == 32


def test_answers_follow_from_the_picture() -> None:
    config = DigitsConfig(mixture={t: 1.0 for t in TASKS if t.startswith("image_")})
    pictures, labels = load_images("test")
    (batch,) = evaluation_batches(config, "test")
    np.testing.assert_array_equal(batch["images"][:, 0, :, :, 0], pictures)
    for tokens, targets, digit in zip(batch["tokens"], batch["loss_mask"], labels, strict=True):
        context, question, answer = parts(tokens, targets)
        assert context == ["<image>"] * 4
        assert answer == [*expected_answer(question, int(digit)).split(), "<eos>"]


def test_shapes_and_padding() -> None:
    batch = make_batch(ALL, 3, 7, 64)
    assert {name: value.dtype.name for name, value in batch.items()} == {
        "tokens": "int32",
        "loss_mask": "bool",
        "segment_ids": "int32",
        "images": "float32",
    }
    assert batch["images"].shape == (64, 1, 8, 8, 1)
    assert batch["images"].min() >= 0
    assert batch["images"].max() <= 1
    np.testing.assert_array_equal(batch["segment_ids"], batch["tokens"] != PAD_ID)
    assert np.all(np.diff(batch["segment_ids"], axis=1) <= 0)  # padding only at the end
    is_text = np.sum(batch["tokens"] == IMAGE_ID, axis=1) == 0
    np.testing.assert_array_equal(np.any(batch["images"], axis=(1, 2, 3, 4)), ~is_text)


def test_batches_are_functions_of_seed_step_and_split() -> None:
    batches = [
        make_batch(ALL, *where)
        for where in ((0, 0, 32), (0, 0, 32), (0, 1, 32), (1, 0, 32), (0, 0, 32, "test"))
    ]
    same = [all(np.array_equal(batches[0][name], b[name]) for name in b) for b in batches]
    assert same == [True, True, False, False, False]


def test_mixture_gives_the_shares() -> None:
    config = DigitsConfig(
        mixture={"text_words": 1.0, "image_words": 2.0, "text_french": 1.0, "image_french": 0.0}
    )
    for step in range(4):
        tokens = make_batch(config, 0, step, 32)["tokens"]
        assert np.sum(np.any(tokens == IMAGE_ID, axis=1)) == 16
        questions = [" ".join(WORDS[int(t)] for t in row) for row in tokens]
        assert 7 <= sum(any(w in q for w in ("chiffre", "nombre")) for q in questions) <= 9


def test_splits_share_no_picture() -> None:
    splits = [load_images(name)[0] for name in ("train", "validation", "test")]
    assert [len(s) for s in splits] == [1157, HELD_OUT, HELD_OUT]
    assert len(np.unique(np.concatenate(splits).reshape(1797, -1), axis=0)) == 1797


def test_held_out_batches_make_up_the_split() -> None:
    source = DigitsSource(ALL)
    whole = list(source.held_out_batches(HELD_OUT, 8, "validation"))
    assert len(whole) == 1
    parts = list(source.held_out_batches(96, 8, "validation"))
    assert [len(p["tokens"]) for p in parts] == [96, 96, 96, 32]
    for name, value in whole[0].items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), value)
    assert len(list(source.held_out_batches(96, 2))) == 2


def test_tokenizer_reads_what_batches_hold() -> None:
    batch = make_batch(ALL, 0, 0, 32)
    tok = tokenizer(ALL)
    assert tok.get_vocab_size() == len(VOCABULARY)
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        text = " ".join(WORDS[int(t)] for t in tokens[segments == 1][1:])
        assert tok.encode(text).ids == tokens[segments == 1].tolist()
    assert tok.encode("never heard").tokens == ["<bos>", "<unk>", "<unk>"]


def test_examples_show_the_models_answers() -> None:
    batch = make_batch(ALL, 0, 0, 32)
    right = np.roll(batch["tokens"], -1, axis=1)
    for example, tokens, targets in zip(
        describe(batch, right), batch["tokens"], batch["loss_mask"], strict=True
    ):
        _, question, answer = parts(tokens, targets)
        assert example.prompt.endswith(f"{question} answer")
        assert example.expected == example.answer == " ".join(answer[:-1])
    wrong = np.full_like(right, VOCABULARY["huit"])
    assert set(describe(batch, wrong)[0].answer.split()) == {"huit"}


def test_identity_changes_with_the_data() -> None:
    configs = [
        DigitsConfig(),
        DigitsConfig(mixture={"text_words": 1.0}),
        DigitsConfig(mixture={"image_words": 1.0}),
        ALL,
    ]
    identities = [DigitsSource(config).identity for config in configs]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": {"text_frnch": 1.0}}, "did you mean 'text_french'"),
        ({"mixture": {"text_words": 0.0}}, "nothing to ask"),
        ({"mixture": {}}, "nothing to ask"),
        ({"mixture": {"text_words": -1.0}}, "not negative"),
        ({"agreeing": 1}, "from 2 to 4"),
        ({"shift": -1}, "not be negative"),
        ({"noise": float("inf")}, "finite"),
    ],
)
def test_mistakes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DigitsConfig(**arguments)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        make_batch(ALL, 0, 0, 4, "dev")


def test_batches_are_quick() -> None:
    make_batch(ALL, 0, 0, 64)
    start = time.process_time()
    for step in range(20):
        make_batch(ALL, 0, step, 64)
    assert (time.process_time() - start) / 20 < 5e-3
