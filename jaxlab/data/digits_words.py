"""The words of the digit questions: what can be asked of a picture, what the answers are, and the vocabulary.

A sequence is `<bos> picture : CONTEXT QUESTION answer ANSWER <eos>`. The context has as many places as an
image has patches. In a picture they are placeholders of image tokens; in text each holds a word that names a
digit, and the digit that is named most often is meant, so that a language model learns to weigh evidence from
all places. All models of the demonstration share this vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
PLACES = 4
"""Places of the context: patches of an image, or words."""

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FRENCH = ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf")
ROMAN = ("N", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
FIGURES = tuple("0123456789")
CONTEXT_WORDS = (ENGLISH, FIGURES, ROMAN)
"""What a digit may be called in a context, for every model."""


def _in_tens(number: int) -> str:
    """A number below a hundred as the words of its figures."""
    return " ".join(ENGLISH[int(figure)] for figure in str(number))


def _plus(k: int) -> tuple[str, Callable[[int], str]]:
    return f"what is this plus {ENGLISH[k]} ?", lambda digit: _in_tens(digit + k)


def _times(k: int) -> tuple[str, Callable[[int], str]]:
    return f"what is this times {ENGLISH[k]} ?", lambda digit: _in_tens(digit * k)


SKILLS: dict[str, tuple[tuple[str, Callable[[int], str]], ...]] = {
    "words": (
        ("what digit is this ?", lambda d: f"it is {ENGLISH[d]}"),
        ("which number is shown ?", lambda d: f"it is {ENGLISH[d]}"),
        ("name this digit .", lambda d: ENGLISH[d]),
    ),
    "figures": (
        ("what digit is this ? use figures .", lambda d: f"it is {FIGURES[d]}"),
        ("write this in figures .", lambda d: FIGURES[d]),
    ),
    "roman": (
        ("what digit is this ? use roman numerals .", lambda d: f"it is {ROMAN[d]}"),
        ("write this in roman numerals .", lambda d: ROMAN[d]),
    ),
    "french": (
        ("quel chiffre est-ce ?", lambda d: f"c'est un {FRENCH[d]}"),
        ("quel nombre vois-tu ?", lambda d: f"je vois un {FRENCH[d]}"),
        ("nomme ce chiffre .", lambda d: f"le {FRENCH[d]}"),
    ),
    "format": (
        ("what digit is this ? in capitals .", lambda d: f"IT IS {ENGLISH[d].upper()}"),
        ("what digit is this ? in brackets .", lambda d: f"[ {ENGLISH[d]} ]"),
        ("what digit is this ? say it twice .", lambda d: f"{ENGLISH[d]} {ENGLISH[d]}"),
        ("what digit is this ? as json .", lambda d: f'{{ "digit" : {ENGLISH[d]} }}'),
        ("what digit is this ? spell it .", lambda d: " ".join(ENGLISH[d])),
    ),
    "arithmetic": (*(_plus(k) for k in range(1, 10)), *(_times(k) for k in range(2, 10))),
}
"""By skill: questions, and the answer to each as a function of the digit."""


class Rows(NamedTuple):
    """Every question with every answer: `first[skill] + i` is question i of the skill; then the digit."""

    tokens: np.ndarray
    """int32[questions, 10, T]; the context holds placeholders."""
    targets: np.ndarray
    """bool[questions, 10, T], True at the answer and the end after it."""
    first: dict[str, int]
    questions: dict[str, int]
    """How many a skill has."""


def _sequence(question: str, answer: str) -> tuple[list[str], int]:
    """The words of a sequence, and where its answer begins."""
    prompt = [BOS, "picture", ":", *[IMAGE] * PLACES, *question.split(), "answer"]
    return [*prompt, *answer.split(), EOS], len(prompt)


def _vocabulary() -> dict[str, int]:
    words = [PAD, BOS, EOS, UNKNOWN, IMAGE, *ENGLISH, *FIGURES, *ROMAN]
    for questions in SKILLS.values():
        words += [
            w for question, answer in questions for d in range(10) for w in _sequence(question, answer(d))[0]
        ]
    return {word: i for i, word in enumerate(dict.fromkeys(words))}


VOCABULARY = _vocabulary()
"""Ids by word."""
PAD_ID, IMAGE_ID = VOCABULARY[PAD], VOCABULARY[IMAGE]
CONTEXT = slice(3, 3 + PLACES)
"""Where the context stands in a sequence."""
CONTEXT_IDS = np.array([[VOCABULARY[word] for word in words] for words in CONTEXT_WORDS], np.int32)


@functools.cache
def rows() -> Rows:
    """The table from which batches are gathered."""
    sequences = [
        [_sequence(question, answer(digit)) for digit in range(10)]
        for questions in SKILLS.values()
        for question, answer in questions
    ]
    length = max(len(words) for row in sequences for words, _ in row)
    tokens = np.full((len(sequences), 10, length), PAD_ID, np.int32)
    targets = np.zeros(tokens.shape, bool)
    for i, row in enumerate(sequences):
        for digit, (words, start) in enumerate(row):
            tokens[i, digit, : len(words)] = [VOCABULARY[word] for word in words]
            targets[i, digit, start : len(words)] = True
    questions = {skill: len(asked) for skill, asked in SKILLS.items()}
    first = dict(zip(questions, np.cumsum([0, *questions.values()]).tolist(), strict=False))
    return Rows(tokens, targets, first, questions)


@functools.cache
def digits_tokenizer() -> Tokenizer:
    """One token for every word; words are separated by spaces; encoding puts `<bos>` in front."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNKNOWN, IMAGE])
    return tokenizer
